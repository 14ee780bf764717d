"""The attention of Sana and Sana-Video, written by hand: linear already, it calls no product to be exchanged."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .attention import exchange


def sana_attention(
    native: Any,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`SanaLinearAttnProcessor2_0` with its ReLU attention exchanged; [B, N, C] in and out."""
    query, key, value = _projected(attn, hidden_states, encoder_hidden_states)
    output = exchange(attn, query, key, value, None, None, _relu_attention).flatten(2).to(hidden_states.dtype)
    output = attn.to_out[1](attn.to_out[0](output))
    return output.clip(-65504, 65504) if output.dtype == torch.float16 else output


def _projected(
    attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as the native processors make them, [B, N, H, D]."""
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
    return query, key, value


def _relu_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """What the native processor computes, [B, N, H, D], mask unused there too."""
    query, key, value = F.relu(query).float(), F.relu(key).float(), value.float()
    state = torch.einsum("bmhd,bmhe->bhde", key, value)
    mass = torch.einsum("bnhd,bhd->bnh", query, key.sum(dim=1))
    return torch.einsum("bnhd,bhde->bnhe", query, state) / (mass + 1e-15).unsqueeze(-1)


def sana_video_attention(
    native: Any,
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`SanaLinearAttnProcessor3_0` with its ReLU attention exchanged; [B, N, C] in and out.

    Its features are rotated after the ReLU, in the numerator alone.
    """
    query, key, value = _projected(attn, hidden_states, encoder_hidden_states)
    plain_query, plain_key = F.relu(query), F.relu(key)
    query, key = (
        (plain_query, plain_key) if rotary_emb is None else (_rotate(x, *rotary_emb) for x in (plain_query, plain_key))
    )

    def relu_attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        state = torch.einsum("bmhd,bmhe->bhde", key.float(), value.float())
        mass = torch.einsum("bnhd,bhd->bnh", plain_query, plain_key.sum(dim=1))
        return torch.einsum("bnhd,bhde->bnhe", query.float(), state) / (mass + 1e-15).unsqueeze(-1)

    output = exchange(attn, query, key, value, None, None, relu_attention).flatten(2).to(hidden_states.dtype)
    return attn.to_out[1](attn.to_out[0](output))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs of channels (2i, 2i + 1) turned by their angles; cos and sin [1, N, 1, D] hold each angle twice."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2).type_as(x)
