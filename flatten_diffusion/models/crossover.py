"""`min_tokens="auto"`: the number of tokens below which a layer stays softmax, as measured on its device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..mixers import Mixer, MixerSpec, create_mixer
from ..ops import call_dtype
from ..ops.crossover import UNMEASURED_TOKENS, Crossover, Runs, find_crossover, known_crossover
from .layer import ConvertedLayer

AUTO = "auto"

_TEXT_TOKENS = 256
"""Beside the picture's in joint attention: most text encoders give 77 to 512."""

_found: dict[tuple[Any, ...], int] = {}


def softmax_below(x: torch.Tensor, mixer: str, spec: MixerSpec) -> int:
    """Calls like `x` (its device, and its dtype or autocast's) with fewer tokens than this are faster as softmax.

    Timed at the first call of a kind, see `flatten_diffusion.ops.crossover`; a dictionary lookup afterwards, and a
    constant inside torch.compile.
    """
    return softmax_below_on(x.device, call_dtype(x), mixer, spec)


def softmax_below_on(device: torch.device, dtype: torch.dtype, mixer: str, spec: MixerSpec) -> int:
    """The same for a device and a dtype."""
    kind = (mixer, spec.heads, spec.head_dim, spec.focusing_factor, spec.kernel_size, spec.joint, spec.window)
    if torch.compiler.is_compiling():
        return _constant(device.type, device.index, dtype, *kind)
    key = (device, dtype, *kind)
    return _found[key] if key in _found else _find(key, device, dtype, mixer, spec)


def _find(key: tuple[Any, ...], device: torch.device, dtype: torch.dtype, mixer: str, spec: MixerSpec) -> int:
    found = find_crossover(_name(mixer, spec), device, dtype, _runs(mixer, spec, device, dtype))
    if found.ratios:
        _found[key] = found.tokens
    return found.tokens


def known_ratio(device: torch.device, dtype: torch.dtype, mixer: str, spec: MixerSpec, tokens: int) -> float | None:
    """Time of this layer's linear product over softmax's at a size, where it was ever timed on this device."""
    found: Crossover | None = known_crossover(_name(mixer, spec), device, dtype)
    return None if found is None else found.ratio_at(tokens)


class CrossoverHook:
    """Forward pre-hook of a model: keeps `min_tokens` of its "auto" layers to where and in what dtype it runs.

    Making one measures them for the device and dtype of their mixers, unless `stays_here` denies it: then the first
    pass does.

    Args:
        mixer: the name of the mixers.
        layers: each layer and its mixer.
    """

    def __init__(self, mixer: str, layers: Sequence[tuple[ConvertedLayer, Mixer]]) -> None:
        self.mixer = mixer
        self.layers = list(layers)
        self.measured_on: tuple[torch.device, torch.dtype] | None = None
        for layer, module in self.layers:
            here = place_of(module)
            if stays_here(here[0]):
                self.measured_on, layer.min_tokens = here, softmax_below_on(*here, mixer, module.spec)
            else:
                layer.min_tokens = UNMEASURED_TOKENS

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = _first_activation((*args, *kwargs.values()))
        if tensor is None:
            return
        here = (tensor.device, call_dtype(tensor))
        if here == self.measured_on:
            return
        if any(layer.split for layer, _ in self.layers):  # never softmax over a share of the tokens
            return
        for layer, mixer in self.layers:
            layer.min_tokens = softmax_below_on(*here, self.mixer, mixer.spec)
        self.measured_on = here


def stays_here(device: torch.device) -> bool:
    """Whether a model on `device` is likely to run there: one on the CPU beside a GPU was only just loaded."""
    return device.type != "meta" and not (device.type == "cpu" and torch.cuda.is_available())


def place_of(mixer: Mixer) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a mixer's parameters."""
    parameter = next(mixer.parameters())
    return parameter.device, parameter.dtype


def remove_crossover_hook(model: nn.Module) -> None:
    """Take the hook off `model`, where there is one."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, CrossoverHook):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


@torch.compiler.assume_constant_result
def _constant(
    device_type: str,
    index: int | None,
    dtype: torch.dtype,
    mixer: str,
    heads: int,
    head_dim: int,
    focusing_factor: float,
    kernel_size: int,
    joint: str | None,
    window: int,
) -> int:
    """Runs while torch.compile traces; the graph only sees the number."""
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    spec = MixerSpec(heads, head_dim, focusing_factor, kernel_size, joint, window=window)
    key = (device, dtype, mixer, heads, head_dim, focusing_factor, kernel_size, joint, window)
    return _found[key] if key in _found else _find(key, device, dtype, mixer, spec)


def _first_activation(arguments: Iterable[Any]) -> torch.Tensor | None:
    """The first picture or sequence among a model's inputs; timesteps and pooled vectors have fewer dimensions."""
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            argument = argument[0] if len(argument) > 0 else None
        if isinstance(argument, torch.Tensor) and argument.is_floating_point() and argument.dim() >= 3:
            return argument
    return None


def _name(mixer: str, spec: MixerSpec) -> str:
    text = f"{mixer}, {spec.heads} heads of {spec.head_dim}, kernel {spec.kernel_size}, power {_power(spec):g}"
    text = f"{text}, windows of {spec.window}" if spec.window else text
    return text if spec.joint is None else f"{text}, {spec.joint} with {_TEXT_TOKENS} text tokens"


def _power(spec: MixerSpec) -> float:
    """Whole powers are multiplications and cost about the same; any other needs a logarithm."""
    return 3.0 if spec.focusing_factor in range(1, 9) else 2.5


def _runs(mixer: str, spec: MixerSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """side -> one call of each over random tokens of a square grid; no random state but its own is touched."""

    def runs_at(side: int) -> Runs:
        picture, text = side * side, 0 if spec.joint is None else _TEXT_TOKENS
        shape = MixerSpec(spec.heads, spec.head_dim, _power(spec), spec.kernel_size, spec.joint, window=spec.window)
        module = create_mixer(mixer, shape, device=device, dtype=dtype)
        generator = torch.Generator(device).manual_seed(0)
        sizes = (1, picture + text, spec.heads, spec.head_dim)
        query, key, value = (torch.randn(sizes, generator=generator, device=device, dtype=dtype) for _ in range(3))

        def softmax(first: int = 0) -> torch.Tensor:
            queries = query[:, first:].transpose(1, 2)
            return F.scaled_dot_product_attention(queries, key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)

        def linear() -> torch.Tensor:
            own, own_key, own_value = (x[:, :picture] for x in (query, key, value))
            mixed, log_mass = module.attend(own, own_key, own_value, (side, side))
            if module.joint is None:
                return mixed
            others = key[:, picture:], value[:, picture:]
            mixed = module.joint(mixed, own, own_key, *others, None, None, None, log_mass)
            return torch.cat([mixed, softmax(picture)], dim=1)

        return linear, softmax

    return runs_at
