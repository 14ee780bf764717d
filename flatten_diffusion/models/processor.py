"""The processor that diffusers calls in place of AttnProcessor2_0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.utils import deprecate
from torch import nn

from ..mixers import MixerSpec
from ..ops import BACKENDS, focused_linear_attention
from .crossover import AUTO, softmax_below
from .layer import LAYER, MIXER, ConvertedLayer, native_processor


class FocusedLinearAttnProcessor:
    """Self-attention as focused linear attention; every other call exactly as diffusers computes it.

    `model.set_attn_processor(FocusedLinearAttnProcessor())` is the parameter-free swap: one stateless object for every
    layer of a model whose native processor is `AttnProcessor2_0`. Self-attention becomes focused; cross-attention,
    calls with a mask and layers with added key and value projections return the native output bit for bit. A layer
    that holds a mixer (see `linearize`) uses that mixer's parameters and settings instead of the ones given here.

    The object cannot see where a layer sits, so it also converts the temporal self-attention of video models and
    GLIGEN's attention over image and grounding tokens; `linearize` keeps those softmax. `set_attn_processor` discards
    the processors it replaces: `restore` then puts diffusers' own defaults back.

    Args:
        focusing_factor: power of the focused map, positive (Han et al., ICCV 2023, eq. 5-6).
        min_tokens: calls with fewer tokens stay softmax. "auto": fewer than from which linear attention is faster on
            the call's device, in its dtype and at its head size; timed at the first such call and kept on disk (see
            `AdapterConfig`).
        backend: see `focused_linear_attention`.

    Raises:
        ValueError: an argument out of range.
        TypeError, NotImplementedError: at the call, for an attention whose native processor is of another kind
            (joint text-image attention, rotary embeddings).
    """

    def __init__(
        self, focusing_factor: float = 3.0, min_tokens: int | Literal["auto"] = 0, backend: str = "auto"
    ) -> None:
        if not 0 < focusing_factor < math.inf:
            raise ValueError(f"focusing_factor is {focusing_factor}: pass a positive, finite number.")
        if min_tokens != AUTO and (not isinstance(min_tokens, int) or min_tokens < 0):
            raise ValueError(f"min_tokens is {min_tokens!r}: pass a whole number, 0 or more, or 'auto'.")
        if backend not in BACKENDS:
            raise ValueError(f"Unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
        self.focusing_factor = focusing_factor
        self.min_tokens = min_tokens
        self.backend = backend

    # diffusers filters keyword arguments by this signature: the native one, then those of processors that cannot be
    # replaced by this one, so that they arrive and raise instead of being dropped.
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        image_rotary_emb: Any = None,
        rotary_emb: Any = None,
        query_rotary_emb: Any = None,
        freqs_cis: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See `Attention.forward`: hidden_states [B, N, C] or [B, C, height, width], the output has the same shape."""
        _check_replaceable(attn, image_rotary_emb, rotary_emb, query_rotary_emb, freqs_cis)
        layer: ConvertedLayer | None = getattr(attn, LAYER, None)
        native = native_processor(attn) if layer is None else layer.native
        if (
            (layer is not None and not layer.enabled)
            or not _is_self_attention(attn, hidden_states, encoder_hidden_states, attention_mask)
            or _count_tokens(hidden_states) < self._softmax_below(attn, layer, hidden_states)
        ):
            if attn.added_kv_proj_dim is not None:  # has no `temb`
                return native(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
            return native(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        if len(args) > 0 or kwargs.get("scale") is not None:
            deprecate("scale", "1.0.0", "`scale` is ignored: pass it to the pipeline as `cross_attention_kwargs`.")
        fused = isinstance(native, FusedAttnProcessor2_0)
        return self._focused(attn, layer, hidden_states, temb, fused)

    def _softmax_below(self, attn: Attention, layer: ConvertedLayer | None, hidden_states: torch.Tensor) -> int:
        """The number of tokens below which this call stays softmax."""
        if layer is not None:
            return layer.min_tokens
        if isinstance(self.min_tokens, int):
            return self.min_tokens
        spec = MixerSpec(attn.heads, attn.inner_dim // attn.heads, self.focusing_factor, kernel_size=0)
        return softmax_below(hidden_states, "focused_linear", spec)

    def _focused(
        self,
        attn: Attention,
        layer: ConvertedLayer | None,
        hidden_states: torch.Tensor,
        temb: torch.Tensor | None,
        fused: bool,
    ) -> torch.Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        picture_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if picture_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        deltas = {} if layer is None or layer.merged else getattr(attn, MIXER).deltas
        query, key, value = _project(attn, hidden_states, fused, deltas)
        if layer is None:
            mixed = focused_linear_attention(
                query, key, value, focusing_factor=self.focusing_factor, backend=self.backend
            )
        else:
            mixer = getattr(attn, MIXER)
            grid = None
            if mixer.uses_grid:
                grid = layer.grid_of(query.shape[1]) if picture_shape is None else tuple(picture_shape[2:])
            mixed, _ = mixer.attend(query, key, value, grid, scale=attn.scale)
        # `upcast_attention` asks for float32 inside the product: the operator always accumulates in float32.
        mixed = mixed.flatten(2).to(query.dtype)

        hidden_states = attn.to_out[0](mixed)
        if "out" in deltas:
            hidden_states = hidden_states + deltas["out"](mixed)
        hidden_states = attn.to_out[1](hidden_states)
        if picture_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(picture_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


def _check_replaceable(attn: Any, *rotary: Any) -> None:
    if not isinstance(attn, Attention):
        raise TypeError(
            f"FocusedLinearAttnProcessor cannot run on {type(attn).__name__}: it replaces AttnProcessor2_0 on "
            "diffusers' Attention; keep this model's own processors."
        )
    if getattr(attn, "add_q_proj", None) is not None:
        raise NotImplementedError(
            "FocusedLinearAttnProcessor cannot run joint text-image attention: keep this model's own processors."
        )
    for argument in rotary:
        if argument is not None:
            raise NotImplementedError(
                "FocusedLinearAttnProcessor cannot run attention with rotary embeddings: keep this model's processors."
            )


def _is_self_attention(
    attn: Attention,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> bool:
    if attention_mask is not None or attn.added_kv_proj_dim is not None:
        return False
    if not attn.scale_qk or attn.inner_kv_dim != attn.inner_dim:
        return False
    if encoder_hidden_states is None:
        return True
    # The native code normalises only the query's side when the context is passed explicitly.
    normalised = attn.group_norm is not None or attn.spatial_norm is not None or attn.norm_cross is not None
    return encoder_hidden_states is hidden_states and hidden_states.ndim == 3 and not normalised


def _count_tokens(hidden_states: torch.Tensor) -> int:
    return hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2] * hidden_states.shape[3]


def _project(
    attn: Attention, hidden_states: torch.Tensor, fused: bool, deltas: Mapping[str, nn.Module] | nn.ModuleDict
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value [B, N, H, D], normalised per head where the layer does so."""
    if fused:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    if "q" in deltas:
        query = query + deltas["q"](hidden_states)
    if "k" in deltas:
        key = key + deltas["k"](hidden_states)
    if "v" in deltas:
        value = value + deltas["v"](hidden_states)
    query, key, value = (x.unflatten(-1, (attn.heads, x.shape[-1] // attn.heads)) for x in (query, key, value))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value
