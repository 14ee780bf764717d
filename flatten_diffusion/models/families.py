"""Which attention layers of which models hold pictures, as data: one row per module class that sees a picture's size.

To add a family, add a row to `FAMILIES`: see the README.md beside this file.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from diffusers.models.attention_processor import Attention
from torch import nn

from . import readings
from .grid import Read
from .layer import Place


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        owner: name of the module class (subclasses included).
        image: paths below the owner, with wildcards, of layers that attend over the picture alone.
        joint: paths of layers whose sequence holds other tokens too (text, registers, padding).
        place: where the picture's tokens stand in a joint sequence, "first" or "last".
        kept: paths below the owner -> why they stay softmax; looked at before `image` and `joint`.
        offered: paths -> why they are converted only where the config's `include` names them.
        read: (owner, *its arguments) -> the grid, or a `Reading`; see `readings`. None when the attention itself
            receives [B, C, height, width].
        arguments: names of the owner's arguments that `read` wants; None stands for one that was not passed.
        native: names of the processor classes that are run as they are, with their product exchanged; empty where
            `FocusedLinearAttnProcessor` takes the place of AttnProcessor2_0.
    """

    owner: str
    image: tuple[str, ...] = ()
    joint: tuple[str, ...] = ()
    place: Place = "last"
    kept: Mapping[str, str] = field(default_factory=dict)
    offered: Mapping[str, str] = field(default_factory=dict)
    read: Read | None = None
    arguments: tuple[str, ...] = ("hidden_states",)
    native: tuple[str, ...] = ()


_BLOCKS = ("transformer_blocks.*.attn1", "transformer_blocks.*.attn2")
_STREAMS = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
_CROSS = "cross-attention"
_TEXT = "attends over the text alone"
_TEMPORAL = "temporal attention: its tokens are frames"
_ALREADY = "linear already (ReLU attention): name it in `include` to give it the focused mixer"
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
        read=readings.transformer_2d,
    ),
    Family("DiTTransformer2DModel", image=_BLOCKS, read=readings.square_patches),
    Family("PixArtTransformer2DModel", image=_BLOCKS, read=readings.patches),
    Family(
        "LatteTransformer3DModel",
        image=_BLOCKS,
        kept={"temporal_transformer_blocks.*": _TEMPORAL},
        read=readings.patches,
    ),
    Family(
        "TransformerSpatioTemporalModel",  # Stable Video Diffusion
        image=_BLOCKS,
        kept={"temporal_transformer_blocks.*": _TEMPORAL},
        read=readings.pixels,
    ),
    Family("UVit2DModel", image=("transformer_layers.*",), read=readings.uvit_codes, arguments=("input_ids",)),
    Family("UVitBlock", kept={"*": _CROSS}),
    Family("KAttentionBlock", image=("attn1", "attn2"), read=readings.pixels),
    Family("TransformerTemporalModel", kept={"*": _TEMPORAL}),
    Family("AnimateDiffTransformer3D", kept={"*": _TEMPORAL}),
    Family("I2VGenXLTransformerTemporalEncoder", kept={"*": _TEMPORAL}),
    *(Family(owner, image=("attentions.*",)) for owner in _PICTURE_INPUT),
    # From here on the native processors run as they are, but for their product.
    Family(
        "HunyuanDiT2DModel",
        image=("blocks.*.attn1",),
        kept={"blocks.*.attn2": _CROSS},
        read=readings.patches,
        native=("HunyuanAttnProcessor2_0", "FusedHunyuanAttnProcessor2_0"),
    ),
    Family(
        "SD3Transformer2DModel",
        image=("transformer_blocks.*.attn2",),
        joint=("transformer_blocks.*.attn",),
        place="first",
        read=readings.patches,
        native=("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"),
    ),
    Family(
        "AuraFlowTransformer2DModel",
        joint=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        read=readings.patches,
        native=("AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0"),
    ),
    Family(
        "FluxTransformer2DModel",
        joint=_STREAMS,
        read=readings.position_ids,
        arguments=("img_ids",),
        native=("FluxAttnProcessor", "FluxAttnProcessor2_0", "FusedFluxAttnProcessor2_0"),
    ),
    Family(
        "Flux2Transformer2DModel",
        joint=_STREAMS,
        read=readings.position_ids,
        arguments=("img_ids",),
        native=("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"),
    ),
    Family(
        "ChromaTransformer2DModel",
        joint=_STREAMS,
        read=readings.masked_position_ids,
        arguments=("img_ids", "attention_mask"),
        native=("FluxAttnProcessor", "FluxAttnProcessor2_0", "FusedFluxAttnProcessor2_0"),
    ),
    Family(
        "QwenImageTransformer2DModel",
        joint=("transformer_blocks.*.attn",),
        read=readings.image_shapes,
        arguments=("img_shapes",),
        native=("QwenDoubleStreamAttnProcessor2_0",),
    ),
    Family(
        "CogView4Transformer2DModel",
        joint=("transformer_blocks.*.attn1",),
        read=readings.unmasked_patches,
        arguments=("hidden_states", "attention_mask"),
        native=("CogView4AttnProcessor",),
    ),
    Family(
        "Lumina2Transformer2DModel",
        image=("noise_refiner.*.attn",),
        joint=("layers.*.attn",),
        kept={"context_refiner.*": _TEXT},
        read=readings.ragged_patches,
        arguments=("hidden_states", "encoder_attention_mask"),
        native=("Lumina2AttnProcessor2_0",),
    ),
    Family(
        "HiDreamImageTransformer2DModel",
        joint=("double_stream_blocks.*.block.attn1", "single_stream_blocks.*.block.attn1"),
        place="first",
        read=readings.patches_or_sizes,
        arguments=("hidden_states", "img_sizes"),
        native=("HiDreamAttnProcessor",),
    ),
    Family(
        "OmniGenTransformer2DModel",
        joint=("layers.*.self_attn",),
        read=readings.causal_text_patches,
        arguments=("hidden_states", "attention_mask"),
        native=("OmniGenAttnProcessor2_0",),
    ),
    Family(
        "ZImageTransformer2DModel",
        joint=("noise_refiner.*.attention", "layers.*.attention"),
        place="first",
        kept={"context_refiner.*": _TEXT, "siglip_refiner.*": "attends over features of reference images"},
        read=readings.latent_list,
        arguments=("x", "patch_size", "f_patch_size"),
        native=("ZSingleStreamAttnProcessor",),
    ),
    Family(
        "PRXTransformer2DModel",
        joint=("blocks.*.attention",),
        read=readings.patches,
        native=("PRXAttnProcessor2_0",),
    ),
    Family(
        "SanaTransformer2DModel",
        offered={"transformer_blocks.*.attn1": _ALREADY},
        image=("transformer_blocks.*.attn1",),
        kept={"transformer_blocks.*.attn2": _CROSS},
        read=readings.patches,
        native=("SanaLinearAttnProcessor2_0",),
    ),
    Family(
        "CogVideoXTransformer3DModel",
        joint=("transformer_blocks.*.attn1",),
        read=readings.frames_first_video,
        native=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
    ),
    Family(
        "LTXVideoTransformer3DModel",
        image=("transformer_blocks.*.attn1",),
        kept={"transformer_blocks.*.attn2": _CROSS},
        read=readings.given_video,
        arguments=("num_frames", "height", "width"),
        native=("LTXVideoAttnProcessor", "LTXVideoAttentionProcessor2_0"),
    ),
    Family(
        "WanTransformer3DModel",
        image=("blocks.*.attn1",),
        kept={"blocks.*.attn2": _CROSS},
        read=readings.video,
        native=("WanAttnProcessor", "WanAttnProcessor2_0"),
    ),
    Family(
        "HunyuanVideoTransformer3DModel",
        joint=_STREAMS,
        place="first",
        kept={"context_embedder.*": _TEXT},
        read=readings.video,
        native=("HunyuanVideoAttnProcessor2_0",),
    ),
    Family(
        "MochiTransformer3DModel",
        joint=("transformer_blocks.*.attn1",),
        place="first",
        read=readings.video,
        native=("MochiAttnProcessor2_0",),
    ),
    Family(
        "AllegroTransformer3DModel",
        image=("transformer_blocks.*.attn1",),
        kept={"transformer_blocks.*.attn2": _CROSS},
        read=readings.video,
        native=("AllegroAttnProcessor2_0",),
    ),
    Family(
        "StableAudioDiTModel",
        joint=("transformer_blocks.*.attn1",),  # a global token, then the signal
        kept={"transformer_blocks.*.attn2": _CROSS},
        read=readings.signal,
        native=("StableAudioAttnProcessor2_0",),
    ),
)

_BY_OWNER = {family.owner: family for family in FAMILIES}


@dataclass(frozen=True)
class Finding:
    """One attention layer of a model, as the table sees it.

    Attributes:
        name, attn: the path and the attention module.
        reason: why the layer must stay softmax; None when it holds a picture and can be converted.
        offered: why it is left alone unless `include` names it; None when nothing speaks against it.
        place: where the picture's tokens stand in its sequence.
        family, owner_name, owner: the row that applies and the module it applies to; None when no row does.
    """

    name: str
    attn: nn.Module
    reason: str | None
    family: Family | None = None
    owner_name: str = ""
    owner: nn.Module | None = None
    offered: str | None = None
    place: Place = "alone"

    @property
    def argument_positions(self) -> tuple[tuple[str, int], ...]:
        """(name, place in the owner's `forward`, `self` not counted) of what the grid is read from."""
        if self.owner is None or self.family is None:
            raise ValueError(f"{self.name}: no family row applies.")
        # The class's own forward: offloading replaces the instance's by a wrapper of another signature.
        known = list(inspect.signature(type(self.owner).forward).parameters)
        return tuple((name, known.index(name) - 1 if name in known else len(known)) for name in self.family.arguments)


def survey(model: nn.Module) -> list[Finding]:
    """Every attention layer of `model` (every module that takes a processor), in the order of `named_modules`."""
    modules = dict(model.named_modules())
    return [_judge(name, module, modules) for name, module in modules.items() if _is_attention(module)]


def _is_attention(module: nn.Module) -> bool:
    # MochiAttention has no `set_processor`; a pipeline component may have a `processor` and be no attention.
    return hasattr(module, "processor") and (hasattr(module, "set_processor") or "Attention" in type(module).__name__)


def _judge(name: str, attn: nn.Module, modules: Mapping[str, nn.Module]) -> Finding:
    owner_name, family = _nearest_row(name, modules)
    if family is None:
        kind = f"{type(attn).__name__} with {type(attn.processor).__name__}"
        return Finding(name, attn, _own_reason(attn) or f"{kind}: outside the families this version knows")
    path = name[len(owner_name) + 1 :] if owner_name else name
    reason = _first_match(path, family.kept)
    if reason is None and not family.native:
        reason = _own_reason(attn)
    joint = any(fnmatchcase(path, pattern) for pattern in family.joint)
    if reason is None and not joint and not any(fnmatchcase(path, pattern) for pattern in family.image):
        reason = f"not among the image layers known in {family.owner}"
    offered, place = _first_match(path, family.offered), family.place if joint else "alone"
    return Finding(name, attn, reason, family, owner_name, modules[owner_name], offered, place)


def _first_match(path: str, reasons: Mapping[str, str]) -> str | None:
    return next((why for pattern, why in reasons.items() if fnmatchcase(path, pattern)), None)


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
