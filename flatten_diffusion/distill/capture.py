"""What the teacher's attention layers are given and answer, handed over layer by layer while the teacher runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..adapter import Adapter
from ..mixers import JoinInputs, LayerMixer, Mixer, MixerInputs, ProjectionDelta, Weights
from ..mixers.parts.least_squares import in_full_precision
from ..models import LAYER, MIXER, ConvertedLayer, Projection, find_projection, split_of


class _Teacher:
    """A `Recorder`: the native products of a layer's call."""

    def __init__(self) -> None:
        self.products: list[torch.Tensor] = []

    def native(self, output: torch.Tensor) -> None:
        self.products.append(output)

    def mixed(self, inputs: JoinInputs) -> None:
        pass


class _Student:
    """A `Recorder`: what a layer's `LayerMixer` is given."""

    def __init__(self) -> None:
        self.joins: list[JoinInputs] = []

    def native(self, output: torch.Tensor) -> None:
        pass

    def mixed(self, inputs: JoinInputs) -> None:
        self.joins.append(inputs)


class LayerCapture:
    """One call of one converted attention layer during the teacher's forward pass; see `mixers.LayerCall`.

    Attributes:
        name, attn: the layer.
        args, kwargs: what its `forward` was given.
        output: the teacher's output, in the shape of the layer's input; joint layers with one stream for the image
            and one for the text: both, one behind the other along the tokens.
        rows: [B, R, C], what the teacher's attention gives the output projection (`mixed` where the layer has none);
            rows of the text are among them where image and text share the projection.
        mixed: [B, N, C], the teacher's attention product at the image's queries.
        weights: what the samples count.
    """

    def __init__(
        self,
        name: str,
        attn: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
        rows: torch.Tensor,
        mixed: torch.Tensor,
        weights: Weights,
    ) -> None:
        self.name, self.attn, self.args, self.kwargs = name, attn, args, kwargs
        self.output, self.rows, self.mixed, self.weights = output, rows, mixed, weights
        self._state: ConvertedLayer = getattr(attn, LAYER)
        self._snapshot = self._state.snapshot()._replace(disabled=0)

    @property
    def hidden_states(self) -> torch.Tensor:
        """The layer's input: [B, N, C] or [B, C, height, width]."""
        hidden: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    @property
    def carried(self) -> LayerMixer:
        """What the layer carries."""
        carried: LayerMixer = getattr(self.attn, MIXER)
        return carried

    @property
    def mixer(self) -> Mixer:
        """The layer's mechanism."""
        return self.carried.mixer

    def student(self) -> torch.Tensor:
        """What the converted layer answers to the same input; differentiable where gradients are enabled."""
        current = self._state.snapshot()
        self._state.replay(self._snapshot)
        try:
            # Not through __call__: the hooks that watch the teacher must not see this call.
            return _one_tensor(self.attn.forward(*self.args, **self.kwargs))
        finally:
            self._state.replay(current)

    @cached_property
    def _student_run(self) -> tuple[list[JoinInputs], torch.Tensor | None]:
        """What the layer's mixer is given in `student()`, and what its output projection is."""
        recorder, watching, rows = _Student(), self._state.state.recorder, []
        projection, handle = find_projection(self.attn, "out"), None
        if projection is not None:
            columns = slice(*projection.columns or (None,))
            hook: Any = lambda _, args: rows.append(args[0][..., columns])  # noqa: E731
            handle = projection.module(self.attn).register_forward_pre_hook(hook)
        self._state.record(recorder)
        try:
            with torch.no_grad():
                self.student()
        finally:
            self._state.record(watching)
            if handle is not None:
                handle.remove()
        return recorder.joins, rows[0] if rows else None

    @property
    def is_mixed(self) -> bool:
        """Whether the converted layer answers this call by its mixer; else it stays softmax (few tokens, a mask)."""
        return bool(self._student_run[0])

    @property
    def joins(self) -> list[JoinInputs]:
        """What is joined in `student()`, sample by sample where the layer runs so (Mochi)."""
        return self._student_run[0]

    @cached_property
    def inputs(self) -> MixerInputs:
        """What the mixer is given in `student()`, whose call must be mixed."""
        with torch.no_grad():
            parts = [self.carried.parts(join) for join in self.joins]
        contexts = [join.context for join in self.joins]
        context = contexts[0]._replace(
            key_mask=_together([context.key_mask for context in contexts]),
            hidden_states=_together([context.hidden_states for context in contexts]),
        )
        rest, share = (_together(part) for part in zip(*parts, strict=True))
        query, key, value = (torch.cat(x) for x in zip(*((j.query, j.key, j.value) for j in self.joins), strict=True))
        return MixerInputs(query, key, value, context, rest, share)

    @property
    def product(self) -> torch.Tensor:
        """[B, N, H, D], float32: the teacher's attention product at the image's queries."""
        return self.mixed.float().reshape(self.inputs.query.shape)

    def target(self) -> torch.Tensor:
        """[B, N, H, D]: the product that behind the output's delta gives the teacher's output."""
        delta = self.carried.deltas["out"] if "out" in self.carried.deltas else None
        projection = find_projection(self.attn, "out")
        if not isinstance(delta, ProjectionDelta) or projection is None or not bool(delta.matrix().any()):
            return self.product
        student = self.inputs.join(self.inputs.mix(self.mixer)).flatten(2).float()
        target = _lead_back(self.mixed.float(), student, projection.weight(self.attn).float(), delta)
        return target.reshape(self.inputs.query.shape)

    def student_rows(self) -> torch.Tensor:
        """`rows` of the student, whose call must be mixed."""
        _, rows = self._student_run
        return self.inputs.join(self.inputs.mix(self.mixer)).flatten(2) if rows is None else rows

    @in_full_precision
    def project(self, mixed: torch.Tensor) -> torch.Tensor:
        """The base output projection without its bias, in float32; nothing where the layer has none of its own."""
        projection = find_projection(self.attn, "out")
        return mixed.float() if projection is None else F.linear(mixed.float(), projection.weight(self.attn).float())


def _together(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Of several samples, where there is one."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


@in_full_precision
def _lead_back(
    teacher: torch.Tensor, student: torch.Tensor, base: torch.Tensor, delta: ProjectionDelta
) -> torch.Tensor:
    """The student's product and what must be added to it: base and delta shall make of it what base makes of the
    teacher's."""
    whole = base.double() + delta.matrix().double()
    missing = F.linear(teacher, base) - F.linear(student, whole.float()) - delta.bias.float()
    # Ridge, as the projection may be nearly singular: only the residual passes it, on top of the student's product.
    square = whole @ whole.T
    eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
    inverse = torch.linalg.solve(square + 1e-3 * square.diagonal().mean() * eye, whole)
    return student + missing @ inverse.float()


@contextmanager
def capture_teacher(
    adapter: Adapter, consume: Callable[[LayerCapture], None], weights: Weights | None = None
) -> Iterator[nn.Module]:
    """The teacher (the model with the adapter disabled), calling `consume` at each converted layer as it passes.

    Nothing is kept: a call's tensors live as long as `consume` holds them. `weights`: of the samples, None for even.
    """
    handles: list[Any] = []
    rows: dict[str, torch.Tensor] = {}
    recorded: list[ConvertedLayer] = []

    def keep_rows(name: str, projection: Projection) -> Callable[..., None]:
        columns = slice(*projection.columns or (None,))

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows.setdefault(name, args[0][..., columns])

        return hook

    def hand_over(name: str, layer: ConvertedLayer, products: list[torch.Tensor]) -> Callable[..., None]:
        def hook(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # Hand-written processors run the native one untouched, with the image alone in their rows.
            found = [_image_rows(layer, product) for product in products]
            products.clear()
            mixed = torch.cat(found).flatten(2) if found else rows[name]
            counts = Weights(mixed.new_ones(len(mixed), dtype=torch.float32).cpu()) if weights is None else weights
            consume(LayerCapture(name, attn, args, kwargs, _one_tensor(output), rows.get(name, mixed), mixed, counts))
            rows.pop(name, None)  # the student's may have come on top

        return hook

    try:
        for name, attn in adapter.attention_modules():
            layer: ConvertedLayer = getattr(attn, LAYER)
            recorder = _Teacher()
            recorded.append(layer)
            layer.record(recorder)
            projection = find_projection(attn, "out")
            if projection is not None:
                handles.append(projection.module(attn).register_forward_pre_hook(keep_rows(name, projection)))
            handles.append(attn.register_forward_hook(hand_over(name, layer, recorder.products), with_kwargs=True))
        with adapter.disabled() as model:
            yield model
    finally:
        for handle in handles:
            handle.remove()
        for layer in recorded:
            layer.record(None)


def _one_tensor(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    # The last block of some models leaves its text unprojected, as nobody reads it.
    return torch.cat([part for part in output if part.shape[-1] == output[0].shape[-1]], dim=-2)


def _image_rows(layer: ConvertedLayer, product: torch.Tensor) -> torch.Tensor:
    """The image's queries of a layer's product [B, N, H, D]."""
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
            # Joint attention answers (image, text); where text comes out, softmax stayed.
            self.outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook
