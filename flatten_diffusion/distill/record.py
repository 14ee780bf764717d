"""What the teacher's attention layers are given and answer, handed over layer by layer while the teacher runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter
from ..mixers import Grid, Mixer
from ..models import LAYER, MIXER, ConvertedLayer, find_projection
from ..models.product import split_of


@dataclass(frozen=True)
class LayerCall:
    """One call of one converted attention layer during the teacher's forward pass.

    Attributes:
        name, attn: the layer.
        args, kwargs: what its `forward` was given.
        output: the teacher's output, in the shape of the layer's input; joint layers with one stream for the picture
            and one for the text: both, one behind the other along the tokens.
        rows: [B, R, C], what the teacher's attention gives the output projection (`mixed` where the layer has none);
            rows of the text are among them where picture and text share the projection.
        mixed: [B, N, C], the teacher's attention product at the picture's queries.
    """

    name: str
    attn: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    rows: torch.Tensor
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
            return _one_tensor(self.attn.forward(*self.args, **self.kwargs))
        finally:
            layer.enabled = enabled

    def mixer_inputs(self) -> MixerInputs | None:
        """What the mixer is given in `student()`; None where this call stays softmax (too few tokens, a mask)."""
        caught: list[tuple[Any, ...]] = []
        joined: list[tuple[torch.Tensor, torch.Tensor]] = []
        handles = [self.mixer.register_forward_pre_hook(lambda _, args: caught.append(args))]
        window, joint = self.mixer.window, self.mixer.joint
        if window is not None:
            handles.append(window.register_forward_pre_hook(lambda _, args: joined.append(window.parts(*args[1:])[:2])))
        if joint is not None:
            handles.append(
                joint.register_forward_pre_hook(
                    lambda _, args: joined.append(_nest(joint.parts(*args[1:]), joined.pop() if window else None))
                )
            )
        self._run_student(handles)
        if not caught:
            return None
        # Mochi's attention runs sample by sample.
        query, key, value = (torch.cat(parts) for parts in zip(*(args[:3] for args in caught), strict=True))
        mask = None if len(caught[0]) < 5 or caught[0][4] is None else torch.cat([args[4] for args in caught])
        rest, share = (torch.cat(parts) for parts in zip(*joined, strict=True)) if joined else (None, None)
        return MixerInputs(query, key, value, caught[0][3], mask, rest, share)

    def joint_inputs(self) -> list[JointInputs]:
        """What the mixer's `window` and `joint` are given in `student()`, sample by sample where the layer runs so
        (Mochi); empty where there is neither, or this call stays softmax."""
        window, joint = self.mixer.window, self.mixer.joint
        if window is None and joint is None:
            return []
        pictures: list[tuple[Any, ...]] = []
        scales: list[float | None] = []
        others: list[tuple[Any, ...]] = []
        handles = [self.mixer.register_forward_pre_hook(lambda _, args: pictures.append(args))]
        if window is not None:
            handles.append(window.register_forward_pre_hook(lambda _, args: scales.append(args[6])))
        if joint is not None:

            def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
                others.append((args[3], args[4], args[6]))
                if window is None:
                    scales.append(args[7])

            handles.append(joint.register_forward_pre_hook(keep))
        self._run_student(handles)
        others = others or [(None, None, None)] * len(pictures)
        inputs = []
        for picture, scale, (text_key, text_value, text_mask) in zip(pictures, scales, others, strict=True):
            query, key, value, grid, mask = picture
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            inputs.append(JointInputs(query, key, value, text_key, text_value, text_mask, mask, grid, scale))
        return inputs

    def student_rows(self) -> torch.Tensor | None:
        """`rows` of the student; None where this call stays softmax."""
        projection = find_projection(self.attn, "out")
        if projection is None:
            inputs = self.mixer_inputs()
            return None if inputs is None else inputs.join(self.mixer(*inputs.arguments())).flatten(2)
        caught: list[torch.Tensor] = []
        mixed: list[Any] = []
        columns = slice(*projection.columns or (None,))
        module = projection.module(self.attn)
        handles = [
            module.register_forward_pre_hook(lambda _, args: caught.append(args[0][..., columns])),
            self.mixer.register_forward_pre_hook(lambda _, args: mixed.append(None)),
        ]
        self._run_student(handles)
        return caught[0] if mixed else None

    def _run_student(self, handles: list[Any]) -> None:
        try:
            with torch.no_grad():
                self.student()
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class MixerInputs:
    """What a mixer is given, and what becomes of its answer in a joint layer.

    Attributes:
        query, key, value: [B, N, H, D]; grid: of the tokens, or None; key_mask: bool [B, N] or None.
        rest, share: [B, N, H, D] and [B, N, H, 1]: beside windows, and in a joint layer, the product is
            rest + share * (the mixer's); None where it is the mixer's own.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grid: Grid | None = None
    key_mask: torch.Tensor | None = None
    rest: torch.Tensor | None = None
    share: torch.Tensor | None = None

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Grid | None, torch.Tensor | None]:
        """The mixer's arguments."""
        return self.query, self.key, self.value, self.grid, self.key_mask

    def join(self, mixed: torch.Tensor) -> torch.Tensor:
        """The layer's product from the mixer's, both [B, N, H, D]."""
        return mixed if self.rest is None or self.share is None else self.rest + self.share * mixed


@dataclass(frozen=True)
class JointInputs:
    """What is linear in a layer, and what joins it there: windows of the picture, other tokens ("text"), or both.

    Attributes:
        query, key, value: [B, N, H, D], of the picture.
        text_key, text_value: [B, T, H, D], and text_mask: bool [B, T], True where a key counts, or None; all None in
            layers over the picture alone.
        key_mask: bool [B, N], of the picture's keys, or None.
        grid: of the picture, where the mixer has one.
        scale: of the softmax.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    text_key: torch.Tensor | None
    text_value: torch.Tensor | None
    text_mask: torch.Tensor | None
    key_mask: torch.Tensor | None
    grid: Grid | None
    scale: float


def _nest(
    outer: tuple[torch.Tensor, torch.Tensor], inner: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rest and share of two joins, one around the other."""
    if inner is None:
        return outer
    return outer[0] + outer[1] * inner[0], outer[1] * inner[1]


def _one_tensor(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    # The last block of some models leaves its text unprojected, as nobody reads it.
    return torch.cat([part for part in output if part.shape[-1] == output[0].shape[-1]], dim=-2)


@contextmanager
def watch_teacher(adapter: Adapter, consume: Callable[[LayerCall], None]) -> Iterator[nn.Module]:
    """The teacher (the model with the adapter disabled), calling `consume` at each converted layer as it passes.

    Nothing is kept: a call's tensors live as long as `consume` holds them.
    """
    handles: list[Any] = []
    rows: dict[str, torch.Tensor] = {}
    products: dict[str, list[torch.Tensor]] = {}

    def keep_rows(name: str, columns: slice) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows.setdefault(name, args[0][..., columns])

        return hook

    def hand_over(name: str, layer: ConvertedLayer) -> Callable[..., None]:
        def hook(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # Hand-written processors have no tap, and the picture alone in their rows.
            found = [_picture_rows(layer, product) for product in products[name]]
            products[name].clear()
            mixed = torch.cat(found).flatten(2) if found else rows[name]
            consume(LayerCall(name, attn, args, kwargs, _one_tensor(output), rows.get(name, mixed), mixed))
            rows.pop(name, None)  # the student's may have come on top

        return hook

    layers: list[ConvertedLayer] = []
    try:
        for name, attn in adapter.attention_modules():
            layer: ConvertedLayer = getattr(attn, LAYER)
            layer.observed = True
            layer.tap = products.setdefault(name, []).append
            layers.append(layer)
            projection = find_projection(attn, "out")
            if projection is not None:
                hook = keep_rows(name, slice(*projection.columns or (None,)))
                handles.append(projection.module(attn).register_forward_pre_hook(hook))
            handles.append(attn.register_forward_hook(hand_over(name, layer), with_kwargs=True))
        with adapter.disabled() as model:
            yield model
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.observed = False
            layer.tap = None


def _picture_rows(layer: ConvertedLayer, product: torch.Tensor) -> torch.Tensor:
    """The picture's queries of a layer's product [B, N, H, D]."""
    if layer.place == "alone" or layer.grid is None:
        return product
    return split_of(layer, product.shape[1], product.shape[1]).queries(product)[0]


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
        def hook(attn: nn.Module, args: tuple[Any, ...], output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            # Joint attention answers (picture, text); where text comes out, softmax stayed.
            self.outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook
