"""Interleaved timing of several callables, and peak memory; out of memory is a result."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Candidate:
    """Something to time: `call`, inside the context that `around` opens; opening it is not timed."""

    call: Callable[[], object]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Measurement:
    """Seconds of one callable over its rounds, and the memory one call adds at its peak.

    Attributes:
        samples: seconds of each round; in JSON the median, the 10 % and the 90 % quantile (`low`, `high`) of them.
        peak_bytes: peak of the device's memory during a call (on the CPU, of the process); None where unknown.
        failure: why there are no numbers, such as "out of memory".
    """

    samples: tuple[float, ...] = ()
    peak_bytes: int | None = None
    failure: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        few = len(self.samples) < 2
        deciles = self.samples if few else statistics.quantiles(self.samples, n=10, method="inclusive")
        low, high = (deciles[0], deciles[-1]) if deciles else (None, None)
        numbers = {"median": self.median, "low": low, "high": high, "rounds": len(self.samples)}
        return numbers | {"peak_bytes": self.peak_bytes, "failure": self.failure}


def measure(
    candidates: Mapping[str, Candidate],
    device: torch.device,
    *,
    rounds: int,
    warmup: int,
    label: str,
    seconds: float = float("inf"),
    memory: bool = True,
) -> dict[str, Measurement]:
    """Times every callable once per round, in turn, so that drift of the machine hits all alike.

    Args:
        rounds: rounds at most.
        warmup: untimed calls of each before the first round.
        seconds: no further round starts once the timed ones have taken this long; one is always run.
        memory: whether one more untimed call of each looks for the peak.
    """
    failures: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    samples: dict[str, list[float]] = {name: [] for name in candidates}

    def attempt(name: str, run: Callable[[Callable[[], object]], None]) -> None:
        try:
            with candidates[name].around():
                run(candidates[name].call)
        except Exception as error:  # of a backend that does not take this shape, or memory running out
            failures[name] = describe_failure(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()

    for name in candidates:

        def warm(call: Callable[[], object], name: str = name) -> None:
            for _ in range(warmup):
                call()
            peaks[name] = peak_memory(call, device) if memory else None

        attempt(name, warm)
    started = time.perf_counter()
    for number in tqdm(range(rounds), desc=label, unit="round", leave=False, disable=None):
        if number and time.perf_counter() - started > seconds:
            break
        for name in rotated([name for name in candidates if name not in failures], number):
            attempt(name, lambda call, name=name: samples[name].append(seconds_of(call, device)))  # type: ignore[misc]
    return {
        name: Measurement(failure=failures[name])
        if name in failures
        else Measurement(tuple(samples[name]), peaks[name])
        for name in candidates
    }


def ratio(measured: Mapping[str, Measurement], numerator: str, denominator: str) -> float | None:
    """Of two medians; None where one is missing."""
    above, below = (measured.get(name, Measurement()).median for name in (numerator, denominator))
    return above / below if above and below else None


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: no callable always follows the same one."""
    shift = number % max(1, len(names))
    return [*names[shift:], *names[:shift]]


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """One call, timed by the device itself on CUDA."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000
    began = time.perf_counter()
    run()
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - began


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Runs once; peak bytes: allocated on CUDA, resident in this process on the CPU (Linux), else None."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    reset = device.type == "cpu" and reset_peak_resident()
    run()
    return resident("VmHWM") if reset else None


def reset_peak_resident() -> bool:
    """Forgets the high-water mark of this process's resident memory; False where the system cannot (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # clears the high-water mark (proc_pid_clear_refs(5))
    except OSError:
        return False
    return True


def resident(field: Literal["VmRSS", "VmHWM"]) -> int | None:
    """Bytes of resident memory of this process, now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def describe_failure(error: Exception) -> str:
    """`out of memory`, or the error's first line."""
    memory = ("out of memory", "not enough memory", "can't allocate memory")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in str(error).lower() for part in memory):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
