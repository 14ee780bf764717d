"""The token grid: read from what the model is really given, kept per attention module, exact under checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..mixers import Grid
from .autotune import AutotuneHook
from .layer import ConvertedLayer, Snapshot, TokenLayout

Read = Callable[..., "Grid | TokenLayout"]


class GridHook:
    """Forward pre-hook of the module that sees an image's size: writes it to the attention layers below.

    Args:
        read: (module, *arguments) -> the grid of the tokens, or a `TokenLayout`.
        arguments: (name, place in `forward`) of the arguments that `read` wants.
        layers: the converted layers that hold that image.
    """

    def __init__(self, read: Read, arguments: Sequence[tuple[str, int]], layers: Sequence[ConvertedLayer]) -> None:
        self.read = read
        self.arguments = tuple(arguments)
        self.layers = list(layers)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(layer.enabled or layer.state.recorder is not None for layer in self.layers):
            values = [args[at] if len(args) > at else kwargs.get(name) for name, at in self.arguments]
            read = self.read(module, *values)
            reading = read if isinstance(read, TokenLayout) else TokenLayout(read)
            for layer in self.layers:
                layer.begin(reading)
        # A compiled graph has the grid inside and recomputes without Python: only eager checkpoints need replaying.
        if not torch.compiler.is_compiling() and getattr(module, "gradient_checkpointing", False):
            checkpoint: Any = module._gradient_checkpointing_func
            if not isinstance(checkpoint, GridCheckpoint):
                checkpoint = GridCheckpoint(checkpoint, self.layers)
                module._gradient_checkpointing_func = checkpoint
            # A module that sees several sequences has a hook for each, and one checkpointing function for all.
            checkpoint.layers += [layer for layer in self.layers if layer not in checkpoint.layers]


class EndHook:
    """Forward hook of the same module: what the pass knew is gone after it, also when it fails.

    Args:
        layers: those of the `GridHook`.
    """

    def __init__(self, layers: Sequence[ConvertedLayer]) -> None:
        self.layers = list(layers)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for layer in self.layers:
            layer.end()


class GridCheckpoint:
    """A module's checkpointing function, made to recompute under the grids its forward pass ran with.

    Without it, two sizes (or `disabled()`) between a forward pass and its backward would be mixed up.
    """

    def __init__(self, function: Callable[..., Any], layers: Sequence[ConvertedLayer]) -> None:
        self.function = function
        self.layers = list(layers)

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.function(block, *args, **kwargs)
        return self.function(_Replay(block, self.layers), *args, **kwargs)


class _Replay:
    """Calls a block with the layers' state as it was when this object was made."""

    def __init__(self, block: Callable[..., Any], layers: Sequence[ConvertedLayer]) -> None:
        self.block = block
        self.layers = layers
        self.states = [layer.snapshot() for layer in layers]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = [layer.snapshot() for layer in self.layers]
        self._set(self.states)
        try:
            return self.block(*args, **kwargs)
        finally:
            self._set(current)

    def _set(self, states: Sequence[Snapshot]) -> None:
        for layer, state in zip(self.layers, states, strict=True):
            layer.replay(state)


class GuardHook:
    """Forward pre-hook of the model: a converted layer whose processor was replaced must not fall back silently, and
    torch.jit.trace, which would keep the image's size of this one call, is told so before it starts."""

    def __init__(self, layers: Sequence[tuple[nn.Module, ConvertedLayer]], expected: tuple[type, ...]) -> None:
        self.layers = list(layers)
        self.expected = expected

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.jit.is_tracing() and any(layer.enabled for _, layer in self.layers):
            raise RuntimeError(
                f"A converted {type(module).__name__} cannot be traced by torch.jit: use torch.export.export, or trace "
                "the original inside adapter.disabled()."
            )
        for attn, layer in self.layers:
            if layer.enabled and not isinstance(attn.processor, self.expected):
                raise RuntimeError(
                    f"{layer.name}: its processor was replaced by {type(attn.processor).__name__} after linearize: "
                    "undo that, or call restore() and convert again (with this layer in `exclude`, where the other "
                    "processor shall stay)."
                )


def remove_hooks(model: nn.Module) -> None:
    """Take every hook of the conversion, and every wrapped checkpointing function, off `model`."""
    for module in model.modules():
        for hooks, options in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        ):
            for key, hook in list(hooks.items()):
                if isinstance(hook, (GridHook, GuardHook, EndHook, AutotuneHook)):
                    for option in options:  # first: a restore that is interrupted here finds the hook again
                        option.pop(key, None)
                    del hooks[key]
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, GridCheckpoint):
            module._gradient_checkpointing_func = checkpoint.function  # type: ignore[assignment]
