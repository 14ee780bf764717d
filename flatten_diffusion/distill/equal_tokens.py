"""Equal text tokens fed as one: exact, and far less work where pictures are small.

StableDiffusion3Pipeline without its T5 encoder hands the transformer 256 zero tokens at the end of its text. They are
equal and have no positions, so they stay equal in every block: one of them, counted as often as it stands there
wherever it is a key, gives what all of them give.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import nn
from torch.overrides import TorchFunctionMode

from ..mixers.joint import SharedNormalizer
from ..models import MIXER, ReboundProcessor


class CountedLastKey(TorchFunctionMode):
    """Within it, the last key of every scaled dot-product attention counts `counts` [B] times, for each sample."""

    def __init__(self, counts: torch.Tensor) -> None:
        super().__init__()
        self.bias = counts.float().log().reshape(-1, 1, 1, 1)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value, given = (*args, kwargs.pop("attn_mask", None))[:4]
        if given is not None:
            raise RuntimeError("A masked attention cannot count its last key: feed all tokens.")
        mask = F.pad(self.bias.to(query.dtype), (key.shape[-2] - 1, 0))
        return function(query, key, value, mask.expand(-1, -1, query.shape[-2], -1), *args[4:], **kwargs)


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
    """Whether a joint transformer, converted or not, gives with a counted token what it gives with all of them.

    It must see the text in every attention, as the last keys, through PyTorch's own product and in one pass.
    """
    if getattr(model, "gradient_checkpointing", False):  # recomputes outside of the mode
        return False
    return all(_counts(module) for module in model.modules() if hasattr(module, "processor"))


def _counts(attn: Any) -> bool:
    native = attn.processor.native if isinstance(attn.processor, ReboundProcessor) else attn.processor
    mixer = getattr(attn, MIXER, None)
    exact = mixer is None or isinstance(mixer.joint, SharedNormalizer)
    return type(native) is JointAttnProcessor2_0 and attn.add_k_proj is not None and exact
