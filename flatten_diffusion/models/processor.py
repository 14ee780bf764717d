"""The processor that diffusers calls in place of AttnProcessor2_0."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.utils import deprecate
from torch import nn

from ..mixers import FocusedLinearConfig, LayerShape
from ..ops import BACKENDS, focused_linear_attention
from .attention import mix, score_factor, skips_scores, unsupported
from .autotune import AUTO, Kind, softmax_below
from .layer import LAYER, MIXER, ConvertedLayer, native_processor
from .proportional import proportional


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
        focusing_factor: power of the focused map, positive; 3 unless given (Han et al., ICCV 2023, eq. 5-6).
        min_tokens: calls with fewer tokens stay softmax; 0 unless given. "auto": fewer than from which linear attention
            is faster on the call's device, in its dtype and at its head size; timed at the first such call and kept on
            disk (see `AdapterConfig`).
        backend: see `focused_linear_attention`; "auto" unless given.

    Raises:
        ValueError: an argument out of range.
        TypeError, NotImplementedError: at the call, for an attention whose native processor is of another kind
            (joint text-image attention, rotary embeddings).
    """

    settings: tuple[float, int | Literal["auto"], str] = (3.0, 0, "auto")

    def __init__(
        self,
        focusing_factor: float | None = None,
        min_tokens: int | Literal["auto"] | None = None,
        backend: str | None = None,
    ) -> None:
        known_factor, known_tokens, known_name = type(self).settings
        factor = known_factor if focusing_factor is None else focusing_factor
        tokens = known_tokens if min_tokens is None else min_tokens
        name = known_name if backend is None else backend
        self.config = FocusedLinearConfig(factor, kernel_size=0)
        if tokens != AUTO and (not isinstance(tokens, int) or tokens < 0):
            raise ValueError(f"min_tokens is {tokens!r}: pass a whole number, 0 or more, or 'auto'.")
        if name not in BACKENDS:
            raise ValueError(f"Unknown backend {name!r}: choose one of {', '.join(BACKENDS)}.")
        self.min_tokens, self.backend = tokens, name
        given = (self.config.focusing_factor, tokens, name)
        if given != type(self).settings:
            # `load_ip_adapter` makes processors anew as `type(processor)()`: the class has to know the settings.
            self.__class__ = _class_with(given)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.settings,)

    @property
    def focusing_factor(self) -> float:
        """The power of the map."""
        return self.config.focusing_factor

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
        native = self.native_of(attn) if layer is None else layer.native
        if not _is_self_attention(attn, hidden_states, encoder_hidden_states, attention_mask) or self._stays_softmax(
            attn, layer, hidden_states
        ):
            if layer is not None and layer.state.token_ratio != 1.0:
                native = proportional(native, layer.state.token_ratio)
            if attn.added_kv_proj_dim is not None:  # has no `temb`
                return native(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
            return native(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        if len(args) > 0 or kwargs.get("scale") is not None:
            deprecate("scale", "1.0.0", "`scale` is ignored: pass it to the pipeline as `cross_attention_kwargs`.")
        fused = isinstance(native, FusedAttnProcessor2_0)
        return self._mixed(attn, layer, hidden_states, temb, fused)

    def native_of(self, attn: Attention) -> Any:
        """The processor that stands for softmax on a layer without a mixer."""
        return native_processor(attn)

    def _stays_softmax(self, attn: Attention, layer: ConvertedLayer | None, hidden_states: torch.Tensor) -> bool:
        tokens = _count_tokens(hidden_states)
        if layer is not None:
            reason = layer.stays_softmax(tokens)
            if reason is None:
                reason = unsupported(getattr(attn, MIXER), layer.grid, None)
                if reason is not None and not torch.compiler.is_compiling():
                    layer.last_softmax = reason
            return reason is not None
        if isinstance(self.min_tokens, int):
            return tokens < self.min_tokens
        shape = LayerShape(attn.heads, attn.inner_dim // attn.heads, attn.query_dim)
        return tokens < softmax_below(hidden_states, Kind(self.config, shape))

    def _mixed(
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
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
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
            grid = None if image_shape is None else (image_shape[2], image_shape[3])
            ratio, scale = layer.state.token_ratio, attn.scale
            if ratio != 1.0:
                scale = scale * score_factor(key.shape[1], ratio)
            mixed = (
                value
                if skips_scores(attn)
                else mix(layer, getattr(attn, MIXER), query, key, value, grid, None, scale, hidden_states)
            )
        # `upcast_attention` asks for float32 inside the product: every mixer accumulates in float32.
        mixed = mixed.flatten(2).to(query.dtype)

        hidden_states = attn.to_out[0](mixed)
        if "out" in deltas:
            hidden_states = hidden_states + deltas["out"](mixed)
        hidden_states = attn.to_out[1](hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


class AdapterAttnProcessor(FocusedLinearAttnProcessor):
    """What `linearize` puts on layers that ran AttnProcessor2_0: on a layer that carries no mixer it is diffusers' own
    default, so that one left behind (diffusers stashes processors while projections are fused) does nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return AdapterAttnProcessor, ()

    def native_of(self, attn: Attention) -> Any:
        """As if not fused: diffusers puts it back when it unfuses, and leaves the layer's flag up."""
        return native_processor(attn, fused=False)

    def _stays_softmax(self, attn: Attention, layer: ConvertedLayer | None, hidden_states: torch.Tensor) -> bool:
        return layer is None or super()._stays_softmax(attn, layer, hidden_states)


@functools.cache
def _class_with(settings: tuple[float, int | Literal["auto"], str]) -> type[FocusedLinearAttnProcessor]:
    """A subclass that is this processor with these settings when it is made without arguments."""
    base = FocusedLinearAttnProcessor
    return type(base.__name__, (base,), {"settings": settings, "__module__": base.__module__})


def _unpickled(settings: tuple[float, int | Literal["auto"], str]) -> FocusedLinearAttnProcessor:
    return FocusedLinearAttnProcessor(*settings)


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
