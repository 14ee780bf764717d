"""What bounds the memory of a large picture: tiles of the VAE, chunks of feed-forward layers, guidance in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import nn


@contextmanager
def tiled_vae(vae: nn.Module, tile: int | None = None) -> Iterator[None]:
    """Inside, the VAE encodes and decodes what is beyond its tile size in overlapping tiles that are blended.

    Args:
        vae: with `enable_tiling`.
        tile: side in pixels, for an `AutoencoderKL`; None for its own.
    """
    names = [name for name in vars(vae) if name == "use_tiling" or name.startswith("tile_")]
    before = {name: getattr(vae, name) for name in names}
    try:
        vae.enable_tiling()  # type: ignore[operator]
        if tile is not None:
            latent, pixels = before["tile_latent_min_size"], before["tile_sample_min_size"]
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile * latent // pixels  # type: ignore[assignment]
        yield
    finally:
        for name in [name for name in vars(vae) if name == "use_tiling" or name.startswith("tile_")]:
            if name in before:
                setattr(vae, name, before[name])
            else:
                delattr(vae, name)


@contextmanager
def chunked_feed_forward(model: nn.Module, tokens: int) -> Iterator[None]:
    """Inside, diffusers' feed-forward layers of `model` see at most `tokens` tokens at a time; exact up to rounding.

    diffusers' own `enable_forward_chunking` wants a divisor of every layer's number of tokens, text included; this
    takes any number. Not for a model that is compiled or used by another thread meanwhile.

    Raises:
        ValueError: the model has no such layer. Nothing is changed then.
    """
    layers = [module for module in model.modules() if isinstance(module, FeedForward)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no FeedForward layers to chunk: pass feed_forward_chunk=0.")
    with ExitStack() as stack:
        for layer in layers:
            # An instance's own forward may be there already: offloading hooks put it there.
            stack.callback(_put_back, layer, layer.__dict__.get("forward"))
            layer.__dict__["forward"] = _in_chunks(layer.forward, tokens)
        yield


def _put_back(layer: nn.Module, forward: Any) -> None:
    if forward is None:
        del layer.__dict__["forward"]
    else:
        layer.__dict__["forward"] = forward


def _in_chunks(forward: Callable[..., torch.Tensor], tokens: int) -> Callable[..., torch.Tensor]:
    def chunked(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if hidden_states.shape[-2] <= tokens:
            return forward(hidden_states, *args, **kwargs)
        parts = [forward(part, *args, **kwargs) for part in hidden_states.split(tokens, dim=-2)]
        return torch.cat(parts, dim=-2)

    return chunked


class OneByOne:
    """Stands for a denoiser in a pipeline and calls it with one sample of each batch after the other.

    Guidance's conditional and unconditional samples then never are in memory together. Arguments with as many rows as
    the first (the noisy samples), in dicts too, are divided; everything else is handed on whole. Every other attribute
    is the denoiser's own.

    Args:
        model: the denoiser.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not yet there: a copy is being made
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the denoiser's own call."""
        samples = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        batch = len(samples) if isinstance(samples, (torch.Tensor, list)) else 1
        if batch == 1:
            return self.model(*args, **kwargs)
        outputs = [self.model(*_cut(args, index, batch), **_cut(kwargs, index, batch)) for index in range(batch)]
        return _joined(outputs)


def _cut(value: Any, index: int, batch: int) -> Any:
    """The part of an argument that belongs to sample `index`."""
    if isinstance(value, torch.Tensor):
        return value[index : index + 1] if value.dim() > 0 and len(value) == batch else value
    if isinstance(value, dict):
        return {name: _cut(part, index, batch) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_cut(part, index, batch) for part in value)
    if isinstance(value, list):  # one element per sample (Z-Image)
        return value[index : index + 1] if len(value) == batch else value
    return value


def _joined(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs)
    if isinstance(first, dict):  # diffusers' outputs too
        return type(first)(**{name: _joined([output[name] for output in outputs]) for name in first})
    if isinstance(first, tuple):
        return tuple(_joined(list(parts)) for parts in zip(*outputs, strict=True))
    if isinstance(first, list):
        return [part for output in outputs for part in output]
    return first
