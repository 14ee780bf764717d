"""The one place where attention calls pass: checks, masks, frames, the split into image and text, the capture."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..mixers import Context, Grid, JoinInputs, LayerMixer, OtherTokens, count_tokens, images_of
from .layer import LAYER, MIXER, ConvertedLayer
from .projections import SeenAttention

try:
    from diffusers.models.attention_dispatch import dispatch_attention_fn
except ImportError:  # diffusers before 0.35 has no backends, and no processor that calls it
    dispatch_attention_fn = None

Softmax = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""The native product of query, key and value [B, N, H, D] and a mask, [B, N, H, D]."""

_PADDED = -5000.0
"""An additive mask counts a key where it is above this: diffusers pads with -10000, the lowest float, or -inf."""


def heads_first_product(
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
    """In place of `F.scaled_dot_product_attention`: [B, H, N, D] all over, after the attention module."""
    scale = _grown(attn, query, key.shape[-2], scale)
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if enable_gqa:
        options["enable_gqa"] = True

    def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, **options
        ).transpose(1, 2)

    exact = dropout_p == 0.0 and not is_causal
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return exchange(attn, query, key, value, attn_mask, scale, softmax, exact).transpose(1, 2)


def tokens_first_product(
    attn: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """In place of diffusers' `dispatch_attention_fn`: [B, N, H, D] all over, after the attention module."""
    if parallel_config is not None:
        name = getattr(_module(attn), LAYER).name
        raise RuntimeError(f"{name}: context parallelism splits the tokens between devices: call restore() first.")
    scale = _grown(attn, query, key.shape[1], scale)
    options: dict[str, Any] = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "attention_kwargs": attention_kwargs,
        "backend": backend,
    }

    def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return dispatch_attention_fn(q, k, v, attn_mask=mask, **options)

    if attn_mask is not None and attn_mask.dim() == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]  # key padding, as diffusers' own backends read it
    exact = dropout_p == 0.0 and not is_causal
    return exchange(attn, query, key, value, attn_mask, scale, softmax, exact)


def exchange(
    seen: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    softmax: Softmax,
    exact: bool = True,
) -> torch.Tensor:
    """The product of a wrapped layer, [B, N, H, D].

    Args:
        seen: the attention module, or the `SeenAttention` around it.
        query, key, value: [B, N or M, H, D], as the native code hands them to its product.
        mask: as the native code hands it on.
        scale: of the softmax.
        softmax: the native product.
        exact: False where the native call asks for what mixers have not (dropout, causality).

    Raises:
        RuntimeError: the tokens do not fit the grid, or the call needs softmax while deltas are in the projections.
    """
    attn = _module(seen)
    layer: ConvertedLayer = getattr(attn, LAYER)
    mixer: LayerMixer = getattr(attn, MIXER)
    counted = _count_last_key(layer, softmax)
    reading = layer.state.reading
    elsewhere = reading is not None and reading.keys not in (None, key.shape[1])
    if elsewhere or layer.stays_softmax(query.shape[1]) is not None:
        output = counted(query, key, value, mask)
        recorder = layer.state.recorder
        if recorder is not None and not layer.enabled and not elsewhere:
            recorder.native(output)
        return output
    if skips_scores(attn):
        return counted(query, key, value, mask)  # which is the values, with what the adapter added to them
    padding = _key_padding(layer, mask, key)
    reason = None
    if not exact:
        reason = "it asks for dropout or causality"
    elif padding is None and mask is not None:
        reason = "its mask is no key padding"
    reason = reason or unsupported(mixer, layer.grid, padding)
    if reason is not None:
        if layer.merged or (isinstance(seen, SeenAttention) and seen.has_deltas):
            raise RuntimeError(
                f"{layer.name}: this call needs softmax ({reason}), but its projections carry what the adapter "
                "learned: call the model without it, or inside adapter.disabled()."
            )
        if not torch.compiler.is_compiling():
            layer.last_softmax = reason
        return counted(query, key, value, mask)
    if key.shape[2] != query.shape[2]:
        key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    hidden_states = seen.input_of(query.shape[0]) if isinstance(seen, SeenAttention) else None
    if layer.place == "alone":
        return mix(layer, mixer, query, key, value, None, padding, scale, hidden_states)
    return _joint(layer, mixer, query, key, value, mask, padding, scale, counted, hidden_states)


def mix(
    layer: ConvertedLayer,
    mixer: LayerMixer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid | None,
    key_mask: torch.Tensor | None,
    scale: float | None,
    hidden_states: torch.Tensor | None,
    others: OtherTokens | None = None,
) -> torch.Tensor:
    """The product of a layer's image queries: where every converted call, of any processor, passes.

    query, key, value: [B, N, H, D], of the image; grid: where the call tells it, else the pass's; `others` beside it.
    """
    needs = mixer.needs
    if "grid" in needs and grid is None:
        grid = layer.grid_of(query.shape[1])
    if "hidden_states" in needs and (hidden_states is None or hidden_states.shape[1] != query.shape[1]):
        raise RuntimeError(f"{layer.name}: {mixer.mixer.config.name} needs the layer's input, which is not told here.")
    if torch.compiler.is_compiling() and "compile" not in mixer.mixer.supports:
        raise RuntimeError(f"{layer.name}: {mixer.mixer.config.name} does not support torch.compile: run it eagerly.")
    grid = grid if "grid" in needs else None
    hidden_states = hidden_states if "hidden_states" in needs else None
    context = Context(grid, key_mask, scale, hidden_states, layer.group)
    recorder = layer.state.recorder
    if recorder is not None:
        recorder.mixed(JoinInputs(query, key, value, context, others))
    output: torch.Tensor = mixer(query, key, value, context, others)
    return output


def score_factor(keys: int, token_ratio: float) -> float:
    """sqrt(log N / log(N / r)) of N keys that stand for N / r in training; see `proportional`."""
    return math.sqrt(math.log(max(keys, 2)) / math.log(max(keys / token_ratio, 2)))


def _grown(seen: Any, query: torch.Tensor, keys: int, scale: float | None) -> float | None:
    """The scale of a call's scores, grown where the pass has proportional scores."""
    state = getattr(_module(seen), LAYER).state
    if state.token_ratio == 1.0:
        return scale
    if state.reading is not None and state.reading.keys not in (None, keys):
        return scale  # text alone: as many tokens as in training
    return score_factor(keys, state.token_ratio) * (query.shape[-1] ** -0.5 if scale is None else scale)


def skips_scores(attn: Any) -> bool:
    """Whether a guider of diffusers wants this call's values in place of attention (`skip_attention_scores`): its hook
    then answers `F.scaled_dot_product_attention` with them."""
    if torch.compiler.is_compiling() or not hasattr(attn, "_diffusers_hook"):
        return False
    probe = torch.zeros(1, 1, 1, 1)
    return F.scaled_dot_product_attention(probe, probe, probe) is probe


def unsupported(mixer: LayerMixer, grid: Grid | None, key_mask: torch.Tensor | None) -> str | None:
    """What a call asks for that its mixer does not support; None where there is nothing."""
    supports = mixer.mixer.supports
    name = mixer.mixer.config.name
    if key_mask is not None and "mask" not in supports:
        return f"{name} takes no key mask"
    pictures = [] if grid is None else images_of(grid)
    if len(pictures) > 1 and "images" not in supports:
        return f"{name} takes one image at a time"
    if any(frames > 1 for frames, _, _ in pictures) and "frames" not in supports:
        return f"{name} takes no videos"
    return None


def _count_last_key(layer: ConvertedLayer, softmax: Softmax) -> Softmax:
    """The native product, with the sequence's last key counting as the pass says."""
    counts = layer.state.last_key_count
    if counts is None:
        return softmax

    def counted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is not None:
            raise RuntimeError(f"{layer.name}: a masked attention cannot count its last key: feed all tokens.")
        bias = F.pad(_log_counts(counts)[:, None, None, :].to(q.dtype), (k.shape[1] - 1, 0))
        return softmax(q, k, v, bias.expand(-1, -1, q.shape[1], -1))

    return counted


def _log_counts(counts: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1]."""
    return counts.float().log().reshape(-1, 1)


def _joint(
    layer: ConvertedLayer,
    mixer: LayerMixer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    scale: float | None,
    softmax: Softmax,
    hidden_states: torch.Tensor | None,
) -> torch.Tensor:
    """Image queries: the mixer over the image's keys, softmax over the others. Other queries: softmax over all."""
    split = split_of(layer, query.shape[1], key.shape[1])
    image_query, other_query = split.queries(query)
    image_key, other_key = split.keys(key)
    image_value, other_value = split.keys(value)
    image_mask, other_mask = (None, None) if padding is None else split.keys(padding)
    if hidden_states is not None and hidden_states.shape[1] == query.shape[1]:
        hidden_states = split.queries(hidden_states)[0]
    counts, bias = layer.state.last_key_count, None
    if counts is not None:
        bias = F.pad(_log_counts(counts), (other_key.shape[1] - 1, 0))
    others = OtherTokens(other_key, other_value, other_mask, bias)
    picture = mix(
        layer, mixer, image_query, image_key, image_value, layer.grid, image_mask, scale, hidden_states, others
    )
    if statically_known_true(other_query.shape[1] == 0):  # Mochi's number of text tokens is unknown to a graph
        return picture
    torch._check(other_query.shape[1] > 0)
    rows = mask
    if mask is not None and mask.shape[-2] > 1:
        rows = split.queries(mask.expand(query.shape[0], *mask.shape[1:]), dim=-2)[1]
    return split.together(picture, softmax(other_query, key, value, rows))


class Split:
    """Which tokens of a sequence are the image's, and which are not; ragged ones through an index.

    Args:
        image: number of image tokens; they stand before all others or, with `last`, after them.
        starts: [B], each sample's first image token, where samples differ in it; then `last` does not matter.
    """

    def __init__(self, picture: int, last: bool, starts: torch.Tensor | None = None) -> None:
        self.picture = picture
        self.last = last
        self.starts = starts

    def queries(self, x: torch.Tensor, dim: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """The image's part of x and the rest, along `dim`."""
        if self.starts is not None:
            x = _gather(x, self._order(x.shape[dim], self.starts), dim)
        others = x.shape[dim] - self.picture
        if self.last and self.starts is None:
            return x.narrow(dim, others, self.picture), x.narrow(dim, 0, others)
        return x.narrow(dim, 0, self.picture), x.narrow(dim, self.picture, others)

    keys = queries

    def together(self, picture: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """The inverse of `queries` along dimension 1."""
        if self.starts is None:
            return torch.cat([others, picture] if self.last else [picture, others], dim=1)
        whole = torch.cat([picture, others], dim=1)
        return _gather(whole, self._order(whole.shape[1], self.starts).argsort(dim=1), 1)

    def _order(self, tokens: int, starts: torch.Tensor) -> torch.Tensor:
        """[B, N]: the sequence position of each token once the image stands first."""
        index = torch.arange(tokens, device=starts.device)[None]
        other = index - self.picture
        after = other >= starts[:, None]
        return torch.where(index < self.picture, index + starts[:, None], other + after * self.picture)


def _gather(x: torch.Tensor, order: torch.Tensor, dim: int) -> torch.Tensor:
    dim = dim % x.dim()
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    return x.gather(dim, order.view(shape).expand(*x.shape))


def split_of(layer: ConvertedLayer, queries: int, keys: int) -> Split:
    """How a joint layer's sequence divides. Raises RuntimeError when its image tokens are unknown or do not fit."""
    reading = layer.state.reading
    if reading is None or reading.grid is None:
        raise RuntimeError(f"{layer.name}: which tokens are the image's is unknown: call the whole model.")
    picture = count_tokens(reading.grid)
    if picture > min(queries, keys):
        layer.grid_of(min(queries, keys))  # raises, with the sizes
    return Split(picture, layer.place == "last", reading.starts)


def _key_padding(layer: ConvertedLayer, mask: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor | None:
    """bool [B, M], True where a key counts for the image's queries; None without a mask or for an arbitrary one."""
    if mask is None:
        return None
    batch, keys = key.shape[:2]
    reading = layer.state.reading
    if reading is not None and reading.key_mask is not None:
        return reading.key_mask.to(torch.bool).expand(batch, keys)
    if mask.dim() != 4 or mask.shape[-2] != 1:
        return None
    row = mask[:, 0, 0]  # key padding is the same for every head
    return (row if row.dtype == torch.bool else row > _PADDED).expand(batch, keys)


def _module(seen: Any) -> Any:
    return seen.attn if isinstance(seen, SeenAttention) else seen
