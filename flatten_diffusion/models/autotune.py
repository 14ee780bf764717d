"""`min_tokens="auto"`: the number of tokens below which a layer stays softmax, as measured on its device."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..mixers import (
    Context,
    LayerMixer,
    LayerShape,
    MixerConfig,
    OtherTokens,
    create_mixer,
    mixer_config,
)
from ..ops import call_dtype
from .layer import ConvertedLayer
from .timing import UNMEASURED_TOKENS, Runs, Timings, find_crossover, known_timings

AUTO = "auto"

_TEXT_TOKENS = 256
"""Beside the image's in joint attention: most text encoders give 77 to 512."""


class Kind(NamedTuple):
    """Everything about a layer that changes its speed: the mixer's settings, the layer's shape, whether other tokens
    are joined, and the side of its windows."""

    mixer: MixerConfig
    shape: LayerShape
    text: bool = False
    window: int = 0

    @classmethod
    def of(cls, mixer: LayerMixer) -> Kind:
        """That of a layer."""
        window = 0 if mixer.window is None else mixer.window.size
        return cls(mixer.mixer.config, mixer.mixer.layer, mixer.text is not None, window)

    def __str__(self) -> str:
        settings = self.mixer.timed().to_dict()
        name = settings.pop("name")
        parts = [name, f"{self.shape.heads} heads of {self.shape.head_dim}"]
        parts += [f"{setting} {json.dumps(value)}" for setting, value in settings.items()]
        parts += [f"windows of {self.window}"] if self.window else []
        parts += [f"{_TEXT_TOKENS} text tokens"] if self.text else []
        return ", ".join(parts)


_found: dict[tuple[torch.device, torch.dtype, Kind], int] = {}


def softmax_below(x: torch.Tensor, kind: Kind) -> int:
    """Calls like `x` (its device, and its dtype or autocast's) with fewer tokens than this are faster as softmax.

    Timed at the first call of a kind, see `timing`; a dictionary lookup afterwards, a constant inside torch.compile.
    """
    return softmax_below_on(x.device, call_dtype(x), kind)


def softmax_below_on(device: torch.device, dtype: torch.dtype, kind: Kind) -> int:
    """The same for a device and a dtype."""
    if torch.compiler.is_compiling():
        settings = tuple(kind.mixer.to_dict().items())  # a graph takes constants only
        return _constant(device.type, device.index, dtype, settings, *kind.shape, kind.text, kind.window)
    key = (device, dtype, kind)
    return _found[key] if key in _found else _find(*key)


def _find(device: torch.device, dtype: torch.dtype, kind: Kind) -> int:
    found = find_crossover(str(kind), device, dtype, _runs(kind, device, dtype))
    if found.ratios:
        _found[device, dtype, kind] = found.tokens
    return found.tokens


def known_ratio(device: torch.device, dtype: torch.dtype, kind: Kind, tokens: int) -> float | None:
    """Time of this layer's product over softmax's at a size, where it was ever timed on this device."""
    found: Timings | None = known_timings(str(kind), device, dtype)
    return None if found is None else found.ratio_at(tokens)


class AutotuneHook:
    """Forward pre-hook of a model: keeps `min_tokens` of its "auto" layers to where and in what dtype it runs.

    Making one measures them for the place of their mixers, unless `stays_here` denies it: then the first pass does.

    Args:
        layers: each layer, its mixer, and the device and dtype it is on.
    """

    def __init__(self, layers: Sequence[tuple[ConvertedLayer, LayerMixer, tuple[torch.device, torch.dtype]]]) -> None:
        self.layers = [(layer, mixer) for layer, mixer, _ in layers]
        self.measured_on: tuple[torch.device, torch.dtype] | None = None
        for layer, mixer, here in layers:
            if stays_here(here[0]):
                self.measured_on, layer.min_tokens = here, softmax_below_on(*here, Kind.of(mixer))
            else:
                layer.min_tokens = UNMEASURED_TOKENS

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = _first_activation((*args, *kwargs.values()))
        if tensor is None:
            return
        here = (tensor.device, call_dtype(tensor))
        if here == self.measured_on:
            return
        if any(layer.group is not None for layer, _ in self.layers):  # never softmax over a share of the tokens
            return
        for layer, mixer in self.layers:
            layer.min_tokens = softmax_below_on(*here, Kind.of(mixer))
        self.measured_on = here


def stays_here(device: torch.device) -> bool:
    """Whether a model on `device` is likely to run there: one on the CPU beside a GPU was only just loaded."""
    return device.type != "meta" and not (device.type == "cpu" and torch.cuda.is_available())


@torch.compiler.assume_constant_result
def _constant(
    device_type: str,
    index: int | None,
    dtype: torch.dtype,
    settings: tuple[tuple[str, Any], ...],
    heads: int,
    head_dim: int,
    channels: int,
    text: bool,
    window: int,
) -> int:
    """Runs while torch.compile traces; the graph only sees the number."""
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    kind = Kind(mixer_config(dict(settings)), LayerShape(heads, head_dim, channels), text, window)
    key = (device, dtype, kind)
    return _found[key] if key in _found else _find(*key)


def _first_activation(arguments: Iterable[Any]) -> torch.Tensor | None:
    """The first image or sequence among a model's inputs; timesteps and pooled vectors have fewer dimensions."""
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            argument = argument[0] if len(argument) > 0 else None
        if isinstance(argument, torch.Tensor) and argument.is_floating_point() and argument.dim() >= 3:
            return argument
    return None


def _runs(kind: Kind, device: torch.device, dtype: torch.dtype) -> Any:
    """side -> one call of each over random tokens of a square grid; no random state but its own is touched."""

    def runs_at(side: int) -> Runs:
        picture, text = side * side, _TEXT_TOKENS if kind.text else 0
        mixer = create_mixer(kind.mixer.timed(), kind.shape)
        module = LayerMixer(mixer, kind.shape, window=kind.window, text=kind.text).to(device=device, dtype=dtype)
        generator = torch.Generator(device).manual_seed(0)
        sizes = (1, picture + text, kind.shape.heads, kind.shape.head_dim)
        query, key, value = (torch.randn(sizes, generator=generator, device=device, dtype=dtype) for _ in range(3))
        context = Context((side, side))
        if "hidden_states" in module.needs:
            hidden = torch.randn(1, picture, kind.shape.channels, generator=generator, device=device, dtype=dtype)
            context = context._replace(hidden_states=hidden)

        def softmax(first: int = 0) -> torch.Tensor:
            queries = query[:, first:].transpose(1, 2)
            return F.scaled_dot_product_attention(queries, key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)

        def linear() -> torch.Tensor:
            others = OtherTokens(key[:, picture:], value[:, picture:]) if text else None
            mixed: torch.Tensor = module(*(x[:, :picture] for x in (query, key, value)), context, others)
            return torch.cat([mixed, softmax(picture)], dim=1) if text else mixed

        return linear, softmax

    return runs_at
