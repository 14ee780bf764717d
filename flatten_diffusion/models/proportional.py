"""Proportional attention: scores grow with the log of the number of keys, so that softmax stays as sharp as trained.

Softmax over more keys than a model was trained with is flatter: its entropy grows with the log of their number. With N
keys where training had N / r, the scores are multiplied by sqrt(log N / log(N / r)).

Source: Jin et al., "Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis", NeurIPS 2023.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from torch import nn

from .attention import dispatch_attention_fn, score_factor
from .attention_layers import LayerInfo, find_attention_layers
from .layer import LAYER, ConvertedLayer
from .wrapped import recompiled

_PLAIN = (AttnProcessor2_0, FusedAttnProcessor2_0)


@contextmanager
def proportional_attention(model: nn.Module, token_ratio: float) -> Iterator[None]:
    """Inside, the scores of every self-attention layer over the image are multiplied by `score_factor`.

    Softmax layers run a processor of their own for as long; converted layers hand the factor to their mixer, in the
    scale of its scores: the pyramid, windows, and the softmax over text beside any mixer are scaled as the softmax is;
    agent attention in both of its softmaxes, in the second to the power of its `sharpness`; the focused map is a ratio
    of powers, in which a factor on every query cancels. Cross-attention and attention over text alone are left as
    they are. On converted layers it holds for the passes of this thread, on others for every pass.

    Args:
        model: a denoiser, converted or not, or several in a `ModuleDict`.
        token_ratio: r, how many times the tokens of training the image has; 1 changes nothing.

    Raises:
        ValueError: a ratio out of range, no layer over an image is known, or one runs a processor whose scores cannot
            be reached (sliced, xFormers, custom). Nothing is changed then.
    """
    if not 0 < token_ratio < math.inf:
        raise ValueError(f"token_ratio is {token_ratio!r}: pass a positive number.")
    layers = [info for info in find_attention_layers(model) if info.reason is None and info.offered is None]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no self-attention over an image that proportional scores know.")
    replaced = {info.name: _scaled(info, token_ratio) for info in layers if not hasattr(info.attn, LAYER)}
    with ExitStack() as stack:
        for info in layers:
            if info.name in replaced:
                stack.callback(setattr, info.attn, "processor", info.attn.processor)
                info.attn.processor = replaced[info.name]
            else:
                layer: ConvertedLayer = getattr(info.attn, LAYER)
                stack.callback(layer.scale_scores, layer.state.token_ratio)
                layer.scale_scores(token_ratio)
        yield


def _scaled(info: LayerInfo, token_ratio: float) -> Any:
    native: Any = info.attn.processor
    name = type(native).__name__
    known = () if info.architecture is None else info.architecture.native
    if name not in known and type(native) not in _PLAIN:
        raise ValueError(
            f"{info.name} runs {name}, whose scores cannot be reached: put its default processor back, or convert with "
            "linearize(); or leave proportional attention off."
        )
    return proportional(native, token_ratio)


def proportional(native: Any, token_ratio: float) -> Any:
    """A processor that does what `native` does, with scaled scores."""
    native_class: Any = type(native)
    return _class(native_class, token_ratio)(native)


class ProportionalProcessor:
    """A native processor whose scores are scaled; made by `proportional`, and inert beyond its call."""

    def __init__(self, native: Any) -> None:
        self.native = native

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """Made for each native class and ratio, with the class's signature."""
        raise NotImplementedError("Make a ProportionalProcessor by proportional().")


@functools.lru_cache(maxsize=128)
def _class(native_class: Any, token_ratio: float) -> type[ProportionalProcessor]:
    def heads_first(
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        scale = _grown(query, key.shape[-2], scale)
        options: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **options
        )

    def tokens_first(
        attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any
    ) -> torch.Tensor:
        bound = inspect.signature(dispatch_attention_fn).bind(query, key, value, *args, **options)
        bound.arguments["scale"] = _grown(query, key.shape[1], bound.arguments.get("scale"))
        return dispatch_attention_fn(*bound.args, **bound.kwargs)

    def _grown(query: torch.Tensor, keys: int, scale: float | None) -> float:
        return score_factor(keys, token_ratio) * (query.shape[-1] ** -0.5 if scale is None else scale)

    function = recompiled(native_class, heads_first, tokens_first)

    def __call__(self: ProportionalProcessor, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self.native, attn, *args, **kwargs)

    # Attention modules filter keyword arguments by this signature.
    __call__.__signature__ = inspect.signature(native_class.__call__)  # type: ignore[attr-defined]
    name = f"Proportional{native_class.__name__}"
    return type(name, (ProportionalProcessor,), {"__call__": __call__})
