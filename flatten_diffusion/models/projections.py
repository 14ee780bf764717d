"""Where an attention module keeps its query, key, value and output projections, and deltas added to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_PARTS = ("q", "k", "v")
# Linear modules whose first 3 * inner_dim output features are the image's query, key and value.
_ALWAYS_FUSED = ("to_qkv_mlp_proj", "img_qkv_proj", "img_attn_qkv", "to_qkv")
_KANDINSKY = {"q": "to_query", "k": "to_key", "v": "to_value", "out": "out_layer"}
# What classes call the image's projections, where not to_q, to_k, to_v and to_out.
_NAMES: dict[str, dict[str, str]] = {
    "Kandinsky5Attention": _KANDINSKY,
    "Kandinsky6Attention": _KANDINSKY,
    "JoyImageAttention": {"out": "img_attn_proj"},
    "JoyImageEditPlusAttention": {"out": "img_attn_proj"},
    "Cosmos3PackedMoTAttention": {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "out": "to_add_out"},
}


@dataclass(frozen=True)
class Projection:
    """One projection of an attention module: a linear module, or a part of a wider one.

    Attributes:
        path: of the module, below the attention module.
        rows: (start, stop) of the output features that are this projection; None for all.
        columns: (start, stop) of the input features that it sees; None for all.
    """

    path: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    def module(self, attn: nn.Module) -> Any:
        """The linear module, LoRA around it included."""
        return attn.get_submodule(self.path)

    def base(self, attn: nn.Module) -> Any:
        """The linear module itself."""
        module = self.module(attn)
        return getattr(module, "base_layer", module)

    def in_features(self, attn: nn.Module) -> int:
        """Width of the input that this projection sees."""
        return _width(self.columns, self.module(attn).in_features)

    def out_features(self, attn: nn.Module) -> int:
        """Width of this projection's output."""
        return _width(self.rows, self.module(attn).out_features)

    def weight(self, attn: nn.Module) -> torch.Tensor:
        """[out_features, in_features], a view of the base weight."""
        weight: torch.Tensor = self.base(attn).weight
        if self.rows is None and self.columns is None:
            return weight
        return weight[slice(*self.rows or (None,)), slice(*self.columns or (None,))]


def _width(part: tuple[int, int] | None, whole: int) -> int:
    return whole if part is None else part[1] - part[0]


def heads_of(attn: Any) -> int:
    """Number of query heads of an attention module."""
    for attribute in ("heads", "num_heads", "num_attention_heads"):
        if hasattr(attn, attribute):
            return int(getattr(attn, attribute))
    raise ValueError(f"{type(attn).__name__} does not say how many heads it has.")


def inner_dim_of(attn: Any) -> int:
    """Width of the query over all heads."""
    for attribute in ("head_dim", "dim_heads"):
        if hasattr(attn, attribute):
            return heads_of(attn) * int(getattr(attn, attribute))
    if hasattr(attn, "inner_dim"):
        return int(attn.inner_dim)
    query = find_projection(attn, "q")
    assert query is not None, "a fused projection belongs to a class that says its width"
    return int(query.base(attn).out_features)


def find_projection(attn: Any, name: str) -> Projection | None:
    """The projection `name` (out of "q", "k", "v", "out") of an attention module; None where it has none of its own.

    Single-stream blocks of Flux and HunyuanVideo, for instance, leave the output projection to the block.
    """
    path = _NAMES.get(type(attn).__name__, {}).get(name, f"to_{name}")
    if name == "out":
        return _find_out(attn, path)
    if isinstance(getattr(attn, path, None), nn.Module):
        return Projection(path)
    for path in _ALWAYS_FUSED:
        if hasattr(attn, path):
            start = _PARTS.index(name) * inner_dim_of(attn)
            return Projection(path, rows=(start, start + inner_dim_of(attn)))
    return None


def _find_out(attn: Any, path: str) -> Projection | None:
    to_out = getattr(attn, path, None)
    if isinstance(to_out, (nn.ModuleList, nn.Sequential)):
        return Projection(f"{path}.0")
    if not isinstance(to_out, nn.Module) or isinstance(to_out, nn.Identity):
        return None
    inner_dim = inner_dim_of(attn)
    whole = getattr(to_out, "in_features", inner_dim) == inner_dim
    return Projection(path, columns=None if whole else (0, inner_dim))


class _Added:
    """A projection with deltas: [(delta, rows, columns)] on top of what the module gives."""

    def __init__(self, module: Any, parts: list[tuple[Any, tuple[int, int] | None, tuple[int, int] | None]]) -> None:
        self.module = module
        self.parts = parts

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.module(hidden_states)
        for delta, rows, columns in self.parts:
            seen = hidden_states if columns is None else hidden_states[..., columns[0] : columns[1]]
            added = delta(seen)
            if rows is not None:
                added = F.pad(added, (rows[0], output.shape[-1] - rows[1]))
            output = output + added
        return output


class SeenAttention:
    """An attention module as its native processor sees it while its mixer counts: with projection deltas, and with what
    the call was given for mixers that need it.

    Attributes:
        attn: the attention module; every attribute that carries no delta is its own.
        has_deltas: whether any projection carries one.
        hidden_states: [B, N, C], the layer's input.
    """

    def __init__(
        self, attn: Any, deltas: Mapping[str, nn.Module] | nn.ModuleDict, hidden_states: torch.Tensor | None = None
    ) -> None:
        self.attn = attn
        self.has_deltas = len(deltas) > 0
        self.hidden_states = hidden_states
        self._samples = 0
        whole: dict[str, list[Any]] = {}
        for name in ("q", "k", "v", "out"):
            if name not in deltas:
                continue
            place = find_projection(attn, name)
            assert place is not None
            whole.setdefault(place.path, []).append((deltas[name], place.rows, place.columns))
            if name != "out" and place.path != "to_qkv" and hasattr(attn, "to_qkv"):
                # Fused beside: which of the two a processor reads is its own affair, and never both.
                start = _PARTS.index(name) * inner_dim_of(attn)
                rows = (start, start + inner_dim_of(attn))
                whole.setdefault("to_qkv", []).append((deltas[name], rows, place.columns))
        for path, parts in whole.items():
            if path == "to_out.0":
                self.to_out = [_Added(attn.to_out[0], parts), *list(attn.to_out)[1:]]
            else:
                setattr(self, path, _Added(getattr(attn, path), parts))

    def input_of(self, samples: int) -> torch.Tensor | None:
        """The layer's input for a product over so many samples: all of it, or the next ones where the native code runs
        sample by sample (Mochi)."""
        if self.hidden_states is None or samples >= len(self.hidden_states):
            return self.hidden_states
        self._samples += samples
        return self.hidden_states[self._samples - samples : self._samples]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attn, name)
