"""One pass of an extractor over a set of images: threaded decoding, sharded by blocks, resumable."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from tqdm.auto import tqdm

from flatten_diffusion.files import parse_json, read_tensors, sweep

from ..errors import InputError
from ..files import write_tensors
from ..images import ImageReader, ImageSet, UnreadableImage, blocks, unreadable_message
from ..metrics.statistics import Moments
from ..processes import Processes
from .base import Extractor

SAVE_SECONDS = 30.0
LOOKAHEAD = 2
Span: TypeAlias = tuple[int, int]
# Network inputs of some images, and the names of those that could not be read.
_Prepared: TypeAlias = tuple[list[torch.Tensor], list[str]]


@dataclass
class _State:
    """What one process has so far: blocks done, sums, feature rows with their block numbers, unreadable names."""

    done: int = 0
    moments: Moments | None = None
    rows: list[torch.Tensor] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


@dataclass
class FeatureSet:
    """Features of a whole set, the same on every process.

    Attributes:
        moments: of all images.
        features: [N, d] in the set's order (of crops, each picture's one after another), or None where only the
            moments were asked for.
    """

    moments: Moments
    features: torch.Tensor | None


def featurise(
    images: ImageSet,
    extractor: Extractor,
    processes: Processes,
    *,
    batch_size: int = 32,
    workers: int = 2,
    keep_features: bool = False,
    resume_folder: Path | None = None,
) -> FeatureSet:
    """Runs the extractor over every image; block b goes to process b mod world, so results do not depend on the split.

    Args:
        batch_size: images per block; of crops, as many of them as one call of the extractor takes.
        workers: decoding threads.
        keep_features: whether the rows themselves are wanted (memory then grows with the number of images).
        resume_folder: where unfinished passes are kept; None keeps nothing.

    Raises:
        InputError: unreadable images (all of them counted and named), or an extractor that fails.
    """
    mine = list(blocks(len(images), _block_size(extractor, batch_size)))[processes.rank :: processes.world]
    checkpoint = None
    if resume_folder is not None:
        checkpoint = _checkpoint_path(resume_folder, images, extractor, processes, batch_size, keep_features)
    state = _load_state(checkpoint) if checkpoint is not None else _State()
    if len(state.rows) != (state.done if keep_features else 0):
        state = _State()
    saved = time.monotonic()
    with tqdm(
        total=_images_in(mine), initial=_images_in(mine[: state.done]), unit="img", desc=images.path.name,
        disable=None if processes.is_main else True,
    ) as bar:  # fmt: skip
        for batch, broken in _batches(images, extractor, mine[state.done :], workers):
            state.broken += broken
            features = _extract(extractor, batch, batch_size) if batch is not None else None
            if features is not None:
                state.moments = state.moments or Moments(features.shape[1])
                state.moments.update(features)
            if keep_features:
                state.rows.append(features if features is not None else torch.zeros(0))
            state.done += 1
            bar.update(_images_in(mine[state.done - 1 : state.done]))
            if checkpoint is not None and time.monotonic() - saved > SAVE_SECONDS:
                _save_state(checkpoint, state)
                saved = time.monotonic()
    result = _merge(images, state, processes, keep_features)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return result


def _block_size(extractor: Extractor, batch_size: int) -> int:
    """Images per block. Of crops, as many as fill a batch, or one where its size decides how many crops it has."""
    if extractor.crops is None:
        return batch_size
    return max(1, batch_size // extractor.crops.count) if extractor.crops.count is not None else 1


def _extract(extractor: Extractor, batch: torch.Tensor, batch_size: int) -> torch.Tensor:
    return torch.cat([extractor.extract(part) for part in batch.split(batch_size)])


def _images_in(spans: Sequence[Span]) -> int:
    return sum(end - start for start, end in spans)


def _merge(images: ImageSet, state: _State, processes: Processes, keep_features: bool) -> FeatureSet:
    broken = sorted(name for names in processes.gather(state.broken) for name in names)
    if broken:
        raise InputError(unreadable_message(images.path, broken, len(images)))
    parts = [part for part in processes.gather(state.moments) if part is not None]
    moments = Moments(parts[0].dim)
    for part in parts:
        moments.merge(part)
    if not keep_features:
        return FeatureSet(moments, None)
    rows = processes.gather(state.rows)
    longest = max(len(own) for own in rows)
    ordered = [own[index] for index in range(longest) for own in rows if index < len(own)]
    return FeatureSet(moments, torch.cat(ordered))


def _batches(
    images: ImageSet, extractor: Extractor, spans: Sequence[Span], workers: int
) -> Iterator[tuple[torch.Tensor | None, list[str]]]:
    """Yields each block's stacked images and the names that could not be read, decoding ahead of the extractor."""
    with ImageReader(images) as reader, ThreadPoolExecutor(workers) as pool:

        def prepare(names: Sequence[str]) -> _Prepared:
            tensors: list[torch.Tensor] = []
            broken: list[str] = []
            for name in names:
                try:
                    pixels = reader.pixels(name)
                    pieces = extractor.crops.cut(name, pixels) if extractor.crops is not None else [pixels]
                    tensors += [extractor.prepare(piece) for piece in pieces]
                except UnreadableImage as error:
                    broken.append(str(error))
            return tensors, broken

        waiting: deque[list[Future[_Prepared]]] = deque()
        ahead = iter(spans)

        def submit() -> None:
            span = next(ahead, None)
            if span is not None:
                names = images.names[slice(*span)]
                # One task per thread and block: a task per image would spend longer on handing over than on decoding.
                shares = blocks(len(names), -(-len(names) // workers))
                waiting.append([pool.submit(prepare, names[start:end]) for start, end in shares])

        try:
            for _ in range(LOOKAHEAD):
                submit()
            while waiting:
                futures = waiting.popleft()
                submit()
                parts = [future.result() for future in futures]
                tensors = [tensor for part, _ in parts for tensor in part]
                yield torch.stack(tensors) if tensors else None, [name for _, names in parts for name in names]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _checkpoint_path(
    folder: Path,
    images: ImageSet,
    extractor: Extractor,
    processes: Processes,
    batch_size: int,
    keep_features: bool,
) -> Path:
    parts = (processes.rank, processes.world, batch_size, keep_features)
    key = [str(images.path.resolve()), images.fingerprint(), extractor.identity.as_dict(), *parts]
    return folder / f"pass-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"


def _save_state(path: Path, state: _State) -> None:
    tensors = {f"row.{index:08d}": row for index, row in enumerate(state.rows)}
    counts: list[int] = []
    if state.moments is not None:
        counts = [count for count, _ in state.moments.blocks]
        means = torch.stack([mean for _, mean in state.moments.blocks])
        tensors |= {"means": means, "scatter": state.moments.scatter}
    description = {"done": state.done, "counts": counts, "broken": state.broken}
    write_tensors(path, tensors, json.dumps(description))


def _load_state(path: Path) -> _State:
    for left in path.parent.glob(".pass-*.tmp"):  # of killed runs over other sets too
        sweep(path.with_name(left.name[1:].split(".safetensors")[0] + ".safetensors"))
    if not path.is_file():
        return _State()
    try:
        tensors, description = read_tensors(path)
        about = parse_json(description, str(path))
        state = _State(about["done"], None, [], about["broken"])
        if "means" in tensors:
            state.moments = Moments(tensors["means"].shape[1])
            state.moments.blocks = list(zip(about["counts"], tensors["means"], strict=True))
            state.moments.scatter = tensors["scatter"]
    except (OSError, ValueError, KeyError, TypeError):
        # Damaged, to the last bit, or of another version: costs time, never correctness.
        return _State()
    state.rows = [tensors[key] for key in sorted(tensors) if key.startswith("row.")]
    return state
