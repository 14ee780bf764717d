"""What a converted attention module carries, and which native processor an attention module stands for."""

from __future__ import annotations

import threading
from typing import Any, Literal, NamedTuple, Protocol

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)

from ..mixers import Grid, JoinInputs, count_tokens, describe_grid

LAYER = "flatten_layer"
"""Attribute of a converted attention module: its `ConvertedLayer`."""
MIXER = "flatten_mixer"
"""Submodule of a converted attention module: its `LayerMixer`; parameters follow `.to`, hooks and state_dict."""

Place = Literal["alone", "first", "last"]
"""Where a layer's image tokens stand in its sequence: alone, before all others (text, registers), or after them."""

_PLAIN = AttnProcessor2_0()
_FUSED = FusedAttnProcessor2_0()
_ADDED = AttnAddedKVProcessor2_0()
_UNSCALED = AttnProcessor()


class TokenLayout:
    """What a forward pass says about a layer's tokens; read once per pass from the model's real input.

    Attributes:
        grid: of the image tokens in row-major order, see `flatten_diffusion.mixers.Grid`.
        starts: [B], the sequence position of each sample's first image token, where samples differ in it.
        key_mask: bool [B, M] over the whole sequence, True where a key counts for the image's queries; for models
            that hand their attention an N x N mask made of it.
        softmax: why every call of this pass stays softmax; None otherwise.
        keys: number of keys of the calls that hold the image; calls with another number are those of other tokens
            alone (a causal prompt, say) and stay softmax. None where every call holds it.
    """

    def __init__(
        self,
        grid: Grid | None,
        starts: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
        softmax: str | None = None,
        keys: int | None = None,
    ) -> None:
        self.grid = grid
        self.starts = starts
        self.key_mask = key_mask
        self.softmax = softmax
        self.keys = keys


class Recorder(Protocol):
    """Sees what passes through a layer's product."""

    def native(self, output: torch.Tensor) -> None:
        """The native product [B, N, H, D] of a disabled layer."""

    def mixed(self, inputs: JoinInputs) -> None:
        """What the layer's `LayerMixer` is given."""


class PassState:
    """What the running forward pass of one thread knows of a layer.

    Attributes:
        reading: None outside a pass of the whole model.
        disabled: how many `disabled()` blocks surround the pass.
        recorder: of a capture.
        last_key_count: [B], how many equal tokens the last key of the sequence stands for; None where it is one.
        token_ratio: how many times the tokens of training the image has, for proportional scores; 1 leaves them.
    """

    def __init__(self) -> None:
        self.reading: TokenLayout | None = None
        self.disabled = 0
        self.recorder: Recorder | None = None
        self.last_key_count: torch.Tensor | None = None
        self.token_ratio = 1.0

    @property
    def idle(self) -> bool:
        """Whether it holds nothing."""
        nothing = self.reading is None and self.recorder is None and self.last_key_count is None
        return nothing and not self.disabled and self.token_ratio == 1.0


class Snapshot(NamedTuple):
    """A layer's pass state at one moment, to run a block again as it ran."""

    reading: TokenLayout | None
    disabled: int
    last_key_count: torch.Tensor | None
    token_ratio: float


class ConvertedLayer:
    """The state of one converted attention module, apart from its parameters.

    What a forward pass knows is kept per thread: two threads, or two pipelines that share the model, do not mix.
    Compiled graphs read one more copy, which every pass writes too; torch.compile guards its attributes and recompiles
    when they change, so compiled models want one thread at a time. Copies and pickles start outside any pass.

    Attributes:
        name: path of the attention module in its model.
        native: the processor object that the conversion replaced.
        min_tokens: calls with fewer image tokens stay softmax.
        auto: `min_tokens` is a measured crossover, kept to the device and dtype of each pass by an `AutotuneHook`.
        group: the processes over which each call's tokens are split, see `Context.group`.
        place: where the image's tokens stand in the layer's sequence.
        merged: the projection deltas are inside the base weights at the moment.
        last_grid, last_softmax: of the last pass, for reports: the grid, and why a call stayed softmax.
    """

    def __init__(self, name: str, native: Any, min_tokens: int, place: Place = "alone") -> None:
        self.name = name
        self.native = native
        self.min_tokens = min_tokens
        self.auto = False
        self.group: Any = None
        self.place = place
        self.merged = False
        self.last_grid: Grid | None = None
        self.last_softmax: str | None = None
        self._threads: dict[int, PassState] = {}
        self._compiled = PassState()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_threads": {}, "_compiled": PassState()}

    @property
    def state(self) -> PassState:
        """Of this thread's pass, for reading."""
        if torch.compiler.is_compiling():
            return self._compiled
        return self._threads.get(threading.get_ident(), _OUTSIDE)

    def begin(self, reading: TokenLayout) -> None:
        """A pass of this thread begins."""
        for state in self._own():
            state.reading = reading
        self.last_grid, self.last_softmax = reading.grid, reading.softmax

    def end(self) -> None:
        """The pass ends."""
        for state in self._own():
            state.reading = None
        self._forget_idle()

    def switch(self, disabled: int) -> None:
        """Set the number of `disabled()` blocks around this thread's passes."""
        for state in self._own():
            state.disabled = disabled
        self._forget_idle()

    def record(self, recorder: Recorder | None) -> None:
        """Let `recorder` see this thread's passes; None ends it."""
        for state in self._own():
            state.recorder = recorder
        self._forget_idle()

    def count_last_key(self, counts: torch.Tensor | None) -> None:
        """Let the sequence's last key count `counts` [B] times in this thread's passes; None ends it."""
        for state in self._own():
            state.last_key_count = counts
        self._forget_idle()

    def scale_scores(self, token_ratio: float) -> None:
        """Scale the scores of this thread's passes as `score_factor` says of `token_ratio`; 1 ends it."""
        for state in self._own():
            state.token_ratio = token_ratio
        self._forget_idle()

    def snapshot(self) -> Snapshot:
        """The state of this thread's pass."""
        state = self.state
        return Snapshot(state.reading, state.disabled, state.last_key_count, state.token_ratio)

    def replay(self, snapshot: Snapshot) -> None:
        """Put this thread where it was at the snapshot."""
        for state in self._own():
            state.reading, state.disabled, state.last_key_count, state.token_ratio = snapshot
        self._forget_idle()

    def _own(self) -> tuple[PassState, ...]:
        if torch.compiler.is_compiling():
            return (self._compiled,)
        return self._threads.setdefault(threading.get_ident(), PassState()), self._compiled

    def _forget_idle(self) -> None:
        if not torch.compiler.is_compiling() and self.state.idle:
            self._threads.pop(threading.get_ident(), None)

    @property
    def enabled(self) -> bool:
        """Whether no `disabled()` surrounds this thread's pass."""
        return self.state.disabled == 0

    @property
    def grid(self) -> Grid | None:
        """Of the image tokens of the running forward pass; None outside one."""
        reading = self.state.reading
        return None if reading is None else reading.grid

    def grid_of(self, tokens: int) -> Grid:
        """The grid of a call with `tokens` image tokens. Raises RuntimeError when it is unknown or does not fit."""
        grid = self.grid
        if grid is None:
            raise RuntimeError(
                f"{self.name}: the token grid is unknown: call the whole model (not its forward, nor a part of it), or "
                "convert with a mixer that needs no grid (kernel_size=0)."
            )
        if count_tokens(grid) != tokens and self.group is None:
            raise RuntimeError(
                f"{self.name}: {tokens} tokens do not fill the {describe_grid(grid)} grid of this forward pass: "
                "undo what changes the token sequence, or convert with a mixer that needs no grid (kernel_size=0)."
            )
        return grid

    def intercepts(self, hidden_states: torch.Tensor) -> bool:
        """Whether a wrapped layer's product is ours in this call, or the native processor runs untouched.

        Raises RuntimeError where it would have to, with the adapter merged into its weights.
        """
        state = self.state
        if state.last_key_count is not None or state.token_ratio != 1.0:
            return True
        if state.disabled and state.recorder is not None:
            return True
        return self.stays_softmax(hidden_states.shape[1]) is None

    def stays_softmax(self, tokens: int) -> str | None:
        """Why a call stays softmax, as far as its size and the pass tell; None otherwise.

        `tokens`: of the call, where the pass does not tell the image's. Raises as `intercepts`.
        """
        state = self.state
        if state.disabled:
            return "the adapter is disabled"
        if state.reading is not None and state.reading.softmax is not None:
            if self.merged:
                raise RuntimeError(
                    f"{self.name} stays softmax in this pass ({state.reading.softmax}), which needs the base weights: "
                    "call unmerge() first."
                )
            return state.reading.softmax
        tokens = tokens if self.grid is None else count_tokens(self.grid)
        return f"fewer than {self.min_tokens} tokens" if tokens < self.min_tokens else None


_OUTSIDE = PassState()


def native_processor(attn: Attention, fused: bool = True) -> Any:
    """The softmax processor that diffusers itself would run on `attn`; without `fused`, as if not fused."""
    if attn.added_kv_proj_dim is not None:
        return _ADDED
    if fused and getattr(attn, "fused_projections", False):
        return _FUSED
    return _PLAIN if attn.scale_qk else _UNSCALED
