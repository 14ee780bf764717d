"""From how many tokens on linear attention is the faster one on this machine: timed once, kept on disk.

Softmax attention costs the square of the tokens and linear attention a constant number of passes, so somewhere the
two meet; where depends on the device, the dtype, the head size and the versions of everything below. It is measured by
running both in turn at growing sizes, which takes a second or two, and remembered in a JSON file in the cache folder:
$FLATTEN_DIFFUSION_CACHE, else $XDG_CACHE_HOME/flatten_diffusion, else ~/.cache/flatten_diffusion.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import logging
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..files import read_json, write_json

logger = logging.getLogger(__name__)

Runs = tuple[Callable[[], object], Callable[[], object]]
"""One call of linear attention and one of softmax attention, on the same tokens."""

FILE_NAME = "crossover.json"
SIDES = (4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128)
"""Of the square grids timed: the tokens double from one to the next."""
UNMEASURED_TOKENS = 1024
"""Stands in where nothing can be timed: generous, on the processors tried the two met at 120 to 360 tokens."""

_FORMAT = 1
_MARGIN = 0.95
"""Linear attention counts as faster from this share of softmax's time on: room for noise and for what surrounds it."""
_CLEAR = 0.5
"""Two sizes in a row below this share end the search: from there on the ratio only falls."""
_BISECTIONS = 3
_SECONDS = 3.0
"""Of timing per crossover: no larger size is begun after it."""
_SECONDS_PER_SIZE = 0.2
_ROUNDS = (5, 31)
_BURST = 10
"""Calls timed at once on an accelerator, where one alone would time the launch."""


@dataclass(frozen=True)
class Timings:
    """What was timed for one kind of layer on one device.

    Attributes:
        tokens: linear attention is not slower from this count on, as far as was timed; 0 for every size. Where even
            the largest size timed was slower, it is estimated from there (the ratio falls as 1 / tokens).
        ratios: tokens -> time of linear attention over time of softmax attention.
        complete: False where time ran out before linear attention was clearly faster (a busy machine): good for this
            process, not worth keeping.
    """

    tokens: int
    ratios: Mapping[int, float]
    complete: bool = True

    def ratio_at(self, tokens: int) -> float | None:
        """Linear's time over softmax's at a size, between the sizes timed (log-log); None outside them."""
        known = sorted(self.ratios.items())
        if not known or not known[0][0] <= tokens <= known[-1][0]:
            return None
        for (low, first), (high, last) in itertools.pairwise(known):
            if low <= tokens <= high:
                share = math.log(tokens / low) / math.log(high / low)
                return math.exp(math.log(first) * (1 - share) + math.log(last) * share)
        return known[0][1]


_known: dict[str, Timings] = {}
_lock = threading.Lock()


def find_crossover(kind: str, device: torch.device, dtype: torch.dtype, runs_at: Callable[[int], Runs]) -> Timings:
    """The crossover of one kind of layer: from memory, from the cache file, or timed now and written there.

    Args:
        kind: names everything about the layer that changes its speed: heads, head size, kernel.
        runs_at: side of a square grid -> one call of each over side * side tokens, on `device` in `dtype`.

    Returns:
        The crossover; `UNMEASURED_TOKENS` without ratios where timing is impossible (fake tensors, a CUDA graph being
        captured, a device that fails), which is not remembered.
    """
    known = known_timings(kind, device, dtype)
    if known is not None:
        return known
    with _lock:
        known = known_timings(kind, device, dtype)
        if known is not None:
            return known
        if not _can_time(device):
            return Timings(UNMEASURED_TOKENS, {})
        logger.info(f"Timing linear against softmax attention once: {kind}, {dtype}, {device_name(device)}.")
        try:
            found = search(lambda side: _time_ratio(runs_at, side, device), _SECONDS)
        except Exception as error:  # whatever a device or a driver raises: a choice by guess beats none
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning(f"{kind} cannot be timed on {device} ({reason}): softmax below {UNMEASURED_TOKENS} tokens.")
            return Timings(UNMEASURED_TOKENS, {})
        key = _key(kind, device, dtype)
        _known[key] = found
        if found.complete:
            _remember(key, found)
        kept = f"kept in {cache_file()}" if found.complete else "not kept, timing took too long"
        logger.info(f"Linear attention from {found.tokens} tokens on: {kind}, {dtype}; {kept}.")
    return found


def known_timings(kind: str, device: torch.device, dtype: torch.dtype) -> Timings | None:
    """The same from memory or the cache file; None where it was never timed. Times nothing."""
    key = _key(kind, device, dtype)
    if key not in _known:
        entry = _read_entries().get(key)
        if entry is None:
            return None
        _known[key] = entry
    return _known[key]


def cache_file() -> Path:
    """Where crossovers are kept."""
    folder = os.environ.get("FLATTEN_DIFFUSION_CACHE")
    if folder:
        return Path(folder).expanduser() / FILE_NAME
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flatten_diffusion" / FILE_NAME


@functools.cache
def device_name(device: torch.device) -> str:
    """The GPU's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    information = Path("/proc/cpuinfo")  # Linux keeps the model's name where `platform` does not look
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def search(ratio_at: Callable[[int], float], seconds: float) -> Timings:
    """Looks for the size from which `ratio_at(side)`, linear's time over softmax's, stays below 1 with a margin."""
    started = time.perf_counter()
    ratios: dict[int, float] = {}

    def faster(side: int) -> bool:
        ratios[side * side] = ratio = ratio_at(side)
        return ratio <= _MARGIN

    slower_side, faster_side, clear = 0, None, 0
    for side in SIDES:
        if ratios and time.perf_counter() - started > seconds:
            break
        if not faster(side):
            slower_side, faster_side = side, None
        elif faster_side is None:
            faster_side = side
        clear = clear + 1 if ratios[side * side] < _CLEAR else 0
        if clear == 2:
            break
    complete = clear == 2 or len(ratios) == len(SIDES)
    if faster_side is None:
        largest = slower_side * slower_side
        return Timings(max(largest + 1, math.ceil(largest * ratios[largest])), ratios, complete)
    for _ in range(_BISECTIONS if slower_side else 0):
        middle = (slower_side + faster_side) // 2
        if middle in (slower_side, faster_side):
            break
        if faster(middle):
            faster_side = middle
        else:
            slower_side = middle
    return Timings(faster_side * faster_side if slower_side else 0, ratios, complete)


def _time_ratio(runs_at: Callable[[int], Runs], side: int, device: torch.device) -> float:
    """Median time of linear over that of softmax, each run once per round, in turn."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        runs = runs_at(side)
        for run in runs * 2:
            run()
        started = time.perf_counter()
        times: tuple[list[float], list[float]] = ([], [])
        fewest, most = _ROUNDS
        while len(times[0]) < fewest or (len(times[0]) < most and time.perf_counter() - started < _SECONDS_PER_SIZE):
            for run, measured in zip(runs, times, strict=True):
                measured.append(_seconds(run, device))
    linear, softmax = (statistics.median(measured) for measured in times)
    return linear / softmax


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    backend: Any = getattr(torch, device.type)
    backend.synchronize(device)
    started = time.perf_counter()
    for _ in range(_BURST):
        run()
    backend.synchronize(device)
    return (time.perf_counter() - started) / _BURST


def _can_time(device: torch.device) -> bool:
    if device.type == "meta" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return False
    return type(torch.empty(0)) is torch.Tensor  # else fake tensors, which compute nothing


def _key(kind: str, device: torch.device, dtype: torch.dtype) -> str:
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    versions = f"torch {torch.__version__}, flatten_diffusion {__version__}"
    return f"{kind}, {str(dtype).removeprefix('torch.')} | {device_name(device)}{threads} | {versions}"


def _read_entries() -> dict[str, Timings]:
    """Everything in the file that can be read; a damaged file or entry is as good as none."""
    try:
        content = read_json(cache_file())
        if content["format"] != _FORMAT:
            return {}
        raw = dict(content["crossovers"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    entries = {}
    for key, entry in raw.items():
        try:
            ratios = {int(tokens): float(ratio) for tokens, ratio in entry["ratios"].items()}
            entries[key] = Timings(int(entry["tokens"]), ratios)
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    return entries


def _remember(key: str, found: Timings) -> None:
    """Adds one entry to the file, whole or not at all. A folder that cannot be written only costs timing again."""
    path = cache_file()
    entries = _read_entries() | {key: found}
    content = {
        "format": _FORMAT,
        "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "crossovers": {
            name: {"tokens": entry.tokens, "ratios": {str(n): round(r, 4) for n, r in sorted(entry.ratios.items())}}
            for name, entry in entries.items()
        },
    }
    try:
        write_json(path, content)
    except OSError as error:
        logger.warning(f"{path} cannot be written ({error}): set FLATTEN_DIFFUSION_CACHE to keep what was timed.")
