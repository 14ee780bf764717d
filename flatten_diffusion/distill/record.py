"""What the teacher's attention layers are given and answer, handed over layer by layer while the teacher runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter
from ..mixers import Mixer
from ..models import LAYER, MIXER, ConvertedLayer


@dataclass(frozen=True)
class LayerCall:
    """One call of one converted attention layer during the teacher's forward pass.

    Attributes:
        name, attn: the layer.
        args, kwargs: what its `forward` was given.
        output: the teacher's output, in the shape of the layer's input.
        mixed: [B, N, C], the teacher's attention product, before the output projection.
    """

    name: str
    attn: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    mixed: torch.Tensor

    @property
    def hidden_states(self) -> torch.Tensor:
        """The layer's input: [B, N, C] or [B, C, height, width]."""
        hidden: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    @property
    def mixer(self) -> Mixer:
        """The layer's mixer."""
        mixer: Mixer = getattr(self.attn, MIXER)
        return mixer

    def student(self) -> torch.Tensor:
        """What the converted layer answers to the same input; differentiable where gradients are enabled."""
        layer: ConvertedLayer = getattr(self.attn, LAYER)
        enabled, layer.enabled = layer.enabled, True
        try:
            # Not through __call__: the hooks that watch the teacher must not see this call.
            output: torch.Tensor = self.attn.forward(*self.args, **self.kwargs)
        finally:
            layer.enabled = enabled
        return output

    def mixer_inputs(self) -> MixerInputs | None:
        """What the mixer is given in `student()`; None where this call stays softmax (too few tokens)."""
        caught: list[MixerInputs] = []

        def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
            caught.append(MixerInputs(*args[:4]))

        handle = self.mixer.register_forward_pre_hook(catch)
        try:
            with torch.no_grad():
                self.student()
        finally:
            handle.remove()
        return caught[0] if caught else None


@dataclass(frozen=True)
class MixerInputs:
    """query, key, value: [B, N, H, D]; grid: (height, width) or None."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grid: tuple[int, int] | None = None

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int] | None]:
        """The mixer's arguments."""
        return self.query, self.key, self.value, self.grid


@contextmanager
def watch_teacher(adapter: Adapter, consume: Callable[[LayerCall], None]) -> Iterator[nn.Module]:
    """The teacher (the model with the adapter disabled), calling `consume` at each converted layer as it passes.

    Nothing is kept: a call's tensors live as long as `consume` holds them.
    """
    handles: list[Any] = []
    mixed: dict[str, torch.Tensor] = {}

    def keep_mixed(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            mixed.setdefault(name, args[0])

        return hook

    def hand_over(name: str) -> Callable[..., None]:
        def hook(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            consume(LayerCall(name, attn, args, kwargs, output, mixed.pop(name)))
            mixed.pop(name, None)  # the student's, if it ran

        return hook

    layers: list[ConvertedLayer] = []
    try:
        for name, attn in adapter.attention_modules():
            layer: ConvertedLayer = getattr(attn, LAYER)
            layer.observed = True
            layers.append(layer)
            handles.append(attn.to_out[0].register_forward_pre_hook(keep_mixed(name)))
            handles.append(attn.register_forward_hook(hand_over(name), with_kwargs=True))
        with adapter.disabled() as model:
            yield model
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.observed = False


class FeatureTap:
    """Keeps the outputs of the converted layers of the forward passes inside `with tap:`; for feature losses.

    Recomputation under gradient checkpointing happens outside and is not seen.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.outputs: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> FeatureTap:
        self.outputs = {}
        for name, attn in self.adapter.attention_modules():
            self._handles.append(attn.register_forward_hook(self._keep(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(attn: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self.outputs[name] = output

        return hook
