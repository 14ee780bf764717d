"""Which attention layers of which models hold pictures, as data: one row per module class that sees a picture's size.

To add a family, add a row to `FAMILIES`: the class whose `forward` receives the picture, how to read (height, width)
of its token grid from that argument, the paths below it of the attention layers whose tokens are exactly that picture
in row-major order, and why the others stay softmax.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from .grid import ReadGrid


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        owner: name of the module class (subclasses included).
        image: paths below the owner, with wildcards, of layers that attend over the picture alone.
        kept: paths below the owner -> why they stay softmax; looked at before `image`.
        grid: (owner, its argument) -> (height, width) in tokens; None when the attention itself receives
            [B, C, height, width].
        argument: name of the owner's argument that `grid` reads.
    """

    owner: str
    image: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    grid: ReadGrid | None = None
    argument: str = "hidden_states"


def _pixels(module: nn.Module, tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.shape[-2], tensor.shape[-1]


def _patches(module: Any, tensor: torch.Tensor) -> tuple[int, int]:
    patch = module.config.patch_size
    return tensor.shape[-2] // patch, tensor.shape[-1] // patch


def _transformer_2d(module: Any, tensor: torch.Tensor) -> tuple[int, int]:
    if module.is_input_vectorized:
        return module.height, module.width
    patch = module.patch_size if module.is_input_patches else 1
    return tensor.shape[-2] // patch, tensor.shape[-1] // patch


def _square_patches(module: Any, tensor: torch.Tensor) -> tuple[int, int]:
    height, width = _patches(module, tensor)
    if height != width:
        raise ValueError(
            f"{type(module).__name__} unpatchifies every output as a square: a {height}x{width} token grid comes out "
            "scrambled in diffusers itself; pass square latents."
        )
    return height, width


def _uvit_codes(module: Any, tensor: torch.Tensor) -> tuple[int, int]:
    factor = 2 if module.down_block.downsample is not None else 1
    return tensor.shape[-2] // factor, tensor.shape[-1] // factor


_BLOCKS = ("transformer_blocks.*.attn1", "transformer_blocks.*.attn2")
_CROSS = "cross-attention"
_TEMPORAL = "temporal attention: its tokens are frames"
_PICTURE_INPUT = (
    "AttnDownBlock2D",
    "AttnUpBlock2D",
    "AttnSkipDownBlock2D",
    "AttnSkipUpBlock2D",
    "AttnDownEncoderBlock2D",
    "AttnUpDecoderBlock2D",
    "UNetMidBlock2D",
)

FAMILIES: tuple[Family, ...] = (
    # Stable Diffusion 1.x, 2.x, XL, ControlNet, and the spatial layers of UNetMotion and UNet3D.
    Family(
        "Transformer2DModel",
        image=_BLOCKS,
        kept={"*.fuser.attn": "attends over image and grounding tokens together"},
        grid=_transformer_2d,
    ),
    Family("DiTTransformer2DModel", image=_BLOCKS, grid=_square_patches),
    Family("PixArtTransformer2DModel", image=_BLOCKS, grid=_patches),
    Family(
        "LatteTransformer3DModel",
        image=_BLOCKS,
        kept={"temporal_transformer_blocks.*": _TEMPORAL},
        grid=_patches,
    ),
    Family(
        "TransformerSpatioTemporalModel",  # Stable Video Diffusion
        image=_BLOCKS,
        kept={"temporal_transformer_blocks.*": _TEMPORAL},
        grid=_pixels,
    ),
    Family("UVit2DModel", image=("transformer_layers.*",), grid=_uvit_codes, argument="input_ids"),
    Family("UVitBlock", kept={"*": _CROSS}),
    Family("KAttentionBlock", image=("attn1", "attn2"), grid=_pixels),
    Family("TransformerTemporalModel", kept={"*": _TEMPORAL}),
    Family("AnimateDiffTransformer3D", kept={"*": _TEMPORAL}),
    Family("I2VGenXLTransformerTemporalEncoder", kept={"*": _TEMPORAL}),
    *(Family(owner, image=("attentions.*",)) for owner in _PICTURE_INPUT),
)

_BY_OWNER = {family.owner: family for family in FAMILIES}


@dataclass(frozen=True)
class Finding:
    """One attention layer of a model, as the table sees it.

    Attributes:
        name, attn: the path and the attention module.
        reason: why the layer must stay softmax; None when its tokens are a picture and it can be converted.
        family, owner_name, owner: the row that applies and the module it applies to; None when no row does.
    """

    name: str
    attn: nn.Module
    reason: str | None
    family: Family | None = None
    owner_name: str = ""
    owner: nn.Module | None = None

    @property
    def argument_position(self) -> int:
        """Where the grid's argument stands in the owner's `forward`, `self` not counted."""
        if self.owner is None or self.family is None:
            raise ValueError(f"{self.name}: no family row applies.")
        # The class's own forward: offloading replaces the instance's by a wrapper of another signature.
        return list(inspect.signature(type(self.owner).forward).parameters).index(self.family.argument) - 1


def survey(model: nn.Module) -> list[Finding]:
    """Every attention layer of `model` (every module that takes a processor), in the order of `named_modules`."""
    modules = dict(model.named_modules())
    return [
        _judge(name, module, modules)
        for name, module in modules.items()
        if hasattr(module, "set_processor") and hasattr(module, "processor")
    ]


def _judge(name: str, attn: nn.Module, modules: Mapping[str, nn.Module]) -> Finding:
    owner_name, family = _nearest_row(name, modules)
    if family is None:
        kind = f"{type(attn).__name__} with {type(attn.processor).__name__}"
        return Finding(name, attn, _own_reason(attn) or f"{kind}: outside the families this version knows")
    path = name[len(owner_name) + 1 :] if owner_name else name
    reason = next((why for pattern, why in family.kept.items() if fnmatchcase(path, pattern)), None)
    if reason is None:
        reason = _own_reason(attn)
    if reason is None and not any(fnmatchcase(path, pattern) for pattern in family.image):
        reason = f"not among the image layers known in {family.owner}"
    return Finding(name, attn, reason, family, owner_name, modules[owner_name])


def _nearest_row(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, Family | None]:
    """The nearest ancestor of the module `name` that has a row, and the row."""
    while name:
        name = name.rpartition(".")[0]
        for cls in type(modules[name]).__mro__:
            if cls.__name__ in _BY_OWNER:
                return name, _BY_OWNER[cls.__name__]
    return "", None


def _own_reason(attn: nn.Module) -> str | None:
    """What the attention module itself says against a conversion."""
    if not isinstance(attn, Attention):
        return f"{type(attn).__name__}: outside the families this version knows"
    if getattr(attn, "add_q_proj", None) is not None:
        return "joint text-image attention"
    if attn.added_kv_proj_dim is not None:
        return "image and text keys share one softmax (added key and value projections)"
    if attn.is_cross_attention:
        return _CROSS
    if attn.inner_kv_dim != attn.inner_dim:
        return "fewer key and value heads than query heads"
    if not attn.scale_qk:
        return "unscaled attention: its native processor is not AttnProcessor2_0"
    return None
