"""Interleaved timing of several callables, and peak memory; out of memory is a result."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
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
        median, low, high: seconds; `low` and `high` are the 10 % and 90 % quantiles.
        rounds: how many were timed.
        peak_bytes: peak of the device's memory during a call (on the CPU, of the process); None where unknown.
        failure: why there are no numbers, such as "out of memory".
    """

    median: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    peak_bytes: int | None = None
    failure: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dict(vars(self))


def measure(
    candidates: Mapping[str, Candidate], device: torch.device, *, rounds: int, warmup: int, seconds: float, label: str
) -> dict[str, Measurement]:
    """Times every callable once per round, in turn, so that drift of the machine hits all alike.

    Args:
        rounds: rounds at most.
        warmup: untimed calls of each before the first round.
        seconds: no further round starts once the timed ones have taken this long; one is always run.
    """
    failures: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    for name, candidate in candidates.items():
        try:
            with candidate.around():
                for _ in range(warmup):
                    candidate.call()
                peaks[name] = peak_memory(candidate.call, device)
        except Exception as error:
            failures[name] = describe_failure(error)
            _release(device)
    samples: dict[str, list[float]] = {name: [] for name in candidates if name not in failures}
    started = time.perf_counter()
    for number in tqdm(range(rounds), desc=label, unit="round", leave=False, disable=None):
        if number and time.perf_counter() - started > seconds:
            break
        for name in rotated(list(samples), number):
            try:
                with candidates[name].around():
                    samples[name].append(seconds_of(candidates[name].call, device))
            except Exception as error:
                failures[name] = describe_failure(error)
                del samples[name]
                _release(device)
    results: dict[str, Measurement] = {}
    for name in candidates:
        if name in failures:
            results[name] = Measurement(failure=failures[name])
        else:
            results[name] = _summary(samples[name], peaks[name])
    return results


def rotated(names: list[str], number: int) -> list[str]:
    """The order of round `number`: no callable always follows the same one."""
    shift = number % max(1, len(names))
    return names[shift:] + names[:shift]


def _summary(samples: list[float], peak: int | None) -> Measurement:
    if len(samples) == 1:
        return Measurement(samples[0], samples[0], samples[0], 1, peak)
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Measurement(statistics.median(samples), deciles[0], deciles[-1], len(samples), peak)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """One call, timed by the device itself on CUDA."""
    if device.type == "cuda":
        start: Any = torch.cuda.Event(enable_timing=True)
        end: Any = torch.cuda.Event(enable_timing=True)
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
        # 5 clears the high-water mark of resident memory (proc_pid_clear_refs(5)).
        Path("/proc/self/clear_refs").write_text("5")
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
    text = str(error)
    lowered = text.lower()
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        phrase in lowered for phrase in ("out of memory", "not enough memory", "can't allocate memory")
    ):
        return "out of memory"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
