"""Which attention layers of a model hold images, by the table of architectures, and why the others stay softmax."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from diffusers.models.attention_processor import Attention
from torch import nn

from .architectures import ARCHITECTURES, REFUSED, Architecture
from .layer import Place

_BY_OWNER: dict[str, list[Architecture]] = {}
for _family in ARCHITECTURES:
    _BY_OWNER.setdefault(_family.owner, []).append(_family)


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer of a model, as the table sees it.

    Attributes:
        name, attn: the path and the attention module.
        reason: why the layer must stay softmax; None when it holds an image and can be converted.
        offered: why it is left alone unless `include` names it; None when nothing speaks against it.
        place: where the image's tokens stand in its sequence.
        architecture, owner_name, owner: the row that applies and the module it applies to; None when no row does.
    """

    name: str
    attn: nn.Module
    reason: str | None
    architecture: Architecture | None = None
    owner_name: str = ""
    owner: nn.Module | None = None
    offered: str | None = None
    place: Place = "alone"

    @property
    def argument_positions(self) -> tuple[tuple[str, int], ...]:
        """(name, place in the owner's `forward`, `self` not counted) of what the grid is read from."""
        if self.owner is None or self.architecture is None:
            raise ValueError(f"{self.name}: no family row applies.")
        # The class's own forward: offloading replaces the instance's by a wrapper of another signature.
        known = list(inspect.signature(type(self.owner).forward).parameters)
        return tuple(
            (name, known.index(name) - 1 if name in known else len(known)) for name in self.architecture.arguments
        )


def find_attention_layers(model: nn.Module) -> list[LayerInfo]:
    """Every attention layer of `model` (every module that takes a processor), in the order of `named_modules`."""
    modules = dict(model.named_modules())
    return [_judge(name, module, modules) for name, module in modules.items() if _is_attention(module)]


def _is_attention(module: nn.Module) -> bool:
    # MochiAttention has no `set_processor`; a pipeline component may have a `processor` and be no attention.
    return hasattr(module, "processor") and (hasattr(module, "set_processor") or "Attention" in type(module).__name__)


def _judge(name: str, attn: nn.Module, modules: Mapping[str, nn.Module]) -> LayerInfo:
    owner_name, architecture = _nearest_row(name, modules)
    if architecture is None:
        kind = f"{type(attn).__name__} with {type(attn.processor).__name__}"
        unknown = f"{kind}: outside the families this version knows"
        return LayerInfo(name, attn, _refusal(name, modules) or _own_reason(attn) or unknown)
    path = name[len(owner_name) + 1 :] if owner_name else name
    reason = _first_match(path, architecture.kept)
    if reason is None and not architecture.native:
        reason = _own_reason(attn)
    if reason is None and architecture.unless is not None:
        reason = architecture.unless(modules[owner_name], attn)
    joint = any(fnmatchcase(path, pattern) for pattern in architecture.joint)
    if reason is None and not joint and not any(fnmatchcase(path, pattern) for pattern in architecture.image):
        reason = f"not among the image layers known in {architecture.owner}"
    offered, place = _first_match(path, architecture.offered), architecture.place if joint else "alone"
    return LayerInfo(name, attn, reason, architecture, owner_name, modules[owner_name], offered, place)


def _first_match(path: str, reasons: Mapping[str, str]) -> str | None:
    return next((why for pattern, why in reasons.items() if fnmatchcase(path, pattern)), None)


def _nearest_row(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, Architecture | None]:
    """The nearest ancestor of the module `name` that has rows, and the one of them that speaks of the module."""
    owner = name
    while owner:
        owner = owner.rpartition(".")[0]
        for cls in type(modules[owner]).__mro__:
            rows = _BY_OWNER.get(cls.__name__)
            if rows is not None:
                path = name[len(owner) + 1 :] if owner else name
                return owner, next((row for row in rows if _speaks_of(row, path)), rows[0])
    return "", None


def _speaks_of(architecture: Architecture, path: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in (*architecture.kept, *architecture.image, *architecture.joint))


def _refusal(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """What `REFUSED` says of the nearest ancestor of the module `name` that it names."""
    while name:
        name = name.rpartition(".")[0]
        for cls in type(modules[name]).__mro__:
            if cls.__name__ in REFUSED:
                return REFUSED[cls.__name__]
    return None


def _own_reason(attn: nn.Module) -> str | None:
    """What the attention module itself says against a conversion."""
    if not isinstance(attn, Attention):
        return f"{type(attn).__name__}: outside the families this version knows"
    if getattr(attn, "add_q_proj", None) is not None:
        return "joint text-image attention"
    if attn.added_kv_proj_dim is not None:
        return "image and text keys share one softmax (added key and value projections)"
    if attn.is_cross_attention:
        return "cross-attention"
    if attn.inner_kv_dim != attn.inner_dim:
        return "fewer key and value heads than query heads"
    if not attn.scale_qk:
        return "unscaled attention: its native processor is not AttnProcessor2_0"
    return None
