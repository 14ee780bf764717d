"""Sana's attention, written by hand: it is linear already and never calls a product that could be exchanged."""

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
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
    output = exchange(attn, query, key, value, None, None, _relu_attention).flatten(2).to(hidden_states.dtype)
    output = attn.to_out[1](attn.to_out[0](output))
    return output.clip(-65504, 65504) if output.dtype == torch.float16 else output


def _relu_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """What the native processor computes, [B, N, H, D], mask unused there too."""
    query, key, value = F.relu(query).float(), F.relu(key).float(), value.float()
    state = torch.einsum("bmhd,bmhe->bhde", key, value)
    mass = torch.einsum("bnhd,bhd->bnh", query, key.sum(dim=1))
    return torch.einsum("bnhd,bhde->bnhe", query, state) / (mass + 1e-15).unsqueeze(-1)
