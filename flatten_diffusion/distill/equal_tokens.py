"""Equal text tokens fed as one: exact, and far less work where images are small.

StableDiffusion3Pipeline without its T5 encoder hands the transformer 256 zero tokens at the end of its text. They are
equal and have no positions, so they stay equal in every block: one of them, counted as often as it stands there
wherever it is a key, gives what all of them give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import nn

from ..models import LAYER, WrappedProcessor


@contextmanager
def counted_last_key(model: nn.Module, counts: torch.Tensor) -> Iterator[None]:
    """Inside, the last key of every attention of a converted model counts `counts` [B] times, for each sample."""
    layers = [getattr(module, LAYER) for module in model.modules() if hasattr(module, LAYER)]
    try:
        for layer in layers:
            layer.count_last_key(counts)
        yield
    finally:
        for layer in layers:
            layer.count_last_key(None)


def merge_zeros(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T, C] -> the same with its zero tokens at the end as one, and [B], how many that one stands for (at least 1,
    so that a last token of its own counts once)."""
    filled = (embeddings != 0).any(dim=-1).any(dim=0).nonzero()
    keep = min(int(filled[-1]) + 2 if len(filled) else 1, embeddings.shape[1])
    return embeddings[:, :keep], torch.full((len(embeddings),), embeddings.shape[1] - keep + 1)


def repeat_last(embeddings: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The inverse of `merge_zeros`."""
    copies = embeddings[:, -1:].expand(-1, int(counts[0]) - 1, -1)
    return torch.cat([embeddings, copies], dim=1)


def can_count(model: nn.Module) -> bool:
    """Whether a joint transformer gives with a counted token what it gives with all of them: every attention is a
    converted one that sees the text, as its last keys."""
    return all(_counts(module) for module in model.modules() if hasattr(module, "processor"))


def _counts(attn: Any) -> bool:
    converted = hasattr(attn, LAYER) and isinstance(attn.processor, WrappedProcessor)
    return converted and type(attn.processor.native) is JointAttnProcessor2_0 and attn.add_k_proj is not None
