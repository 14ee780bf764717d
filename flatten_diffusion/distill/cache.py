"""Latents and prompt embeddings on disk: safetensors shards, written whole, reused only by the very same settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import safe_open
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..files import parse_json, read_header, read_tensors, sha256_of_tensors, write_tensors
from ..images import to_rgb
from ..mixers import Mixer
from .bounds import check_numbers, number
from .buckets import Size, check_sizes, nearest_bucket, parse_sizes, to_pixels
from .conditioning import Conditioning, encode_null, encode_prompts, encode_shared, family_of
from .denoiser_call import sampling_shift
from .identity import component_digest, pipeline_settings
from .latents import check_pipeline, draw_latents, encode_images
from .sources import Example

logger = logging.get_logger(__name__)

_VERSION = 3
_LATENTS, _INDEX, _SHIFT, _NULL = "latents", "index", "shift", "null.safetensors"


@dataclass(frozen=True)
class CacheSettings:
    """What a cache depends on besides the examples and the pipeline.

    Attributes:
        buckets: (height, width) in pixels; each image goes to the nearest aspect ratio, drawn ones take turns.
        draw_steps, guidance_scale, seed: how the teacher draws latents for prompts without images.
        shard_size: examples per file.
        batch_size: images encoded or drawn at once.
    """

    buckets: tuple[Size, ...]
    draw_steps: int = number(20, 1, 1000)
    guidance_scale: float = number(3.0, 0.0, 1000.0)
    seed: int = number(0, 0, 2**32 - 1)
    shard_size: int = number(256, 1, 2**20)
    batch_size: int = number(8, 1, 2**16)

    def __post_init__(self) -> None:
        check_numbers(self)
        check_sizes(self.buckets or ((0, 0),), 1)


class LatentCache(Dataset[dict[str, torch.Tensor]]):
    """Cached examples. Item i holds "latents" [C, h, w] and the rows of its conditioning.

    Attributes:
        sizes: (height, width) in pixels of each example.
        null: per size, the conditioning of the empty prompt (one row), and what all prompts have in common.
        shifts: per size, where the pipeline shifts its timesteps by the size, by how much.
        broken: "name: reason" of every image that was skipped.
        identity: a digest of all that it holds.

    Raises:
        ValueError: no usable example.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes: list[Size] = []
        self.broken: list[str] = []
        self.null: dict[Size, Conditioning] = {}
        self._rows: list[tuple[Path, str, int]] = []
        self._open: dict[Path, Any] = {}
        digests = [self._add(path) for path in sorted(folder.glob("shard-*.safetensors"))]
        if not self._rows:
            shown = "; ".join(self.broken[:3])
            raise ValueError(f"None of the {len(self.broken)} images can be read ({shown}): check the data.")
        tensors, _ = read_tensors(folder / _NULL)
        for key, tensor in tensors.items():
            bucket, _, name = key.partition("/")
            self.null.setdefault(parse_sizes(bucket)[0], {})[name] = tensor
        shifted = [size for size, null in self.null.items() if _SHIFT in null]
        self.shifts: dict[Size, float] = {size: self.null[size].pop(_SHIFT).item() for size in shifted}
        self.identity = sha256_of_tensors(tensors, " ".join(digests))

    def _add(self, path: Path) -> str:
        """Take up a shard; its checksum."""
        with safe_open(path, framework="pt") as file:
            broken, checksum = read_header(file)
            rows = []
            for key in (key for key in file.keys() if key.endswith(f"/{_INDEX}")):  # noqa: SIM118 (not a dict)
                rows += [(index, key.partition("/")[0], row) for row, index in enumerate(file.get_tensor(key).tolist())]
        self.broken += parse_json(broken, str(path))
        for _, bucket, row in sorted(rows):
            self._rows.append((path, bucket, row))
            self.sizes.append(parse_sizes(bucket)[0])
        return checksum

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        path, bucket, row = self._rows[index]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        file = self._open[path]
        names = [key.partition("/")[2] for key in file.keys() if key.startswith(f"{bucket}/")]  # noqa: SIM118
        item = {name: file.get_slice(f"{bucket}/{name}")[row] for name in names if name != _INDEX}
        return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in item.items()}

    def split(self, held_out: int) -> tuple[LatentCache, LatentCache]:
        """(examples to train on, `held_out` others spread evenly over the whole); the same files behind both.

        Raises:
            ValueError: `held_out` leaves nothing to train on.
        """
        if not 0 < held_out < len(self):
            raise ValueError(f"{held_out} held-out examples of {len(self)}: keep at least one on each side.")
        chosen = {index * len(self) // held_out for index in range(held_out)}
        return (self._subset([i for i in range(len(self)) if i not in chosen]), self._subset(sorted(chosen)))

    def _subset(self, indices: Sequence[int]) -> LatentCache:
        part = copy(self)
        part.sizes = [self.sizes[i] for i in indices]
        part._rows, part._open = [self._rows[i] for i in indices], {}  # noqa: SLF001 (its own)
        return part

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files do not travel to worker processes


def build_cache(
    pipeline: Any,
    model: nn.Module,
    examples: Sequence[Example],
    cache_dir: str | Path,
    settings: CacheSettings,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> LatentCache:
    """The cache of `examples`, built where it is not there yet.

    It lives in a folder named by a fingerprint of everything it depends on (autoencoder, tokenizers, text encoders,
    buckets, the examples and their files' sizes and times; for drawn latents the whole pipeline), so one made under
    other circumstances is never used. A killed build goes on from its last whole shard, and a shard that does not match
    its checksum is made again; each process checks and writes every `num_processes`-th one and meets the others at
    `wait`.

    Raises:
        ValueError: no examples, or none of them usable; a pipeline that needs more than a prompt; latents to be drawn
            by a model that is converted already.
    """
    check_pipeline(type(pipeline))
    if not examples:
        raise ValueError("There are no examples: pass images or prompts.")
    if family_of(model).recorded and any(example.open is not None for example in examples):
        raise ValueError(f"{type(model).__name__} is distilled from what it draws itself: pass prompts, not images.")
    if any(example.open is None for example in examples) and any(isinstance(part, Mixer) for part in model.modules()):
        raise ValueError("The model is converted already and would draw as the student: build the cache first.")
    folder = Path(cache_dir) / f"latents-{fingerprint(pipeline, model, examples, settings)}"
    if process_index == 0:
        others = [path for path in folder.parent.glob("latents-*") if path != folder]
        if others and not folder.exists():
            logger.info(f"{folder.parent}: {len(others)} caches of other data, models or settings are not used.")
        folder.mkdir(parents=True, exist_ok=True)
        _write_null(pipeline, model, folder, settings)
    wait()
    numbered, length = list(enumerate(examples)), settings.shard_size
    shards = {
        folder / f"shard-{start // length:05d}.safetensors": numbered[start : start + length]
        for start in range(process_index * length, len(examples), num_processes * length)
    }
    missing = [path for path in shards if not _is_whole(path)]
    for path in tqdm(missing, desc="caching latents", unit="shard", disable=process_index != 0 or not missing):
        _write_shard(pipeline, model, shards[path], path, settings)
    wait()
    cache = LatentCache(folder)
    if cache.broken and process_index == 0:
        logger.warning(f"{len(cache.broken)} of {len(examples)} images skipped: {'; '.join(cache.broken[:10])}")
    return cache


def fingerprint(pipeline: Any, model: nn.Module, examples: Sequence[Example], settings: CacheSettings) -> str:
    """16 hexadecimal digits over everything that the cached tensors depend on."""
    parts = {"version": _VERSION, "settings": asdict(settings), "pipeline": pipeline_settings(pipeline)}
    drawn = any(example.open is None for example in examples)
    for name, component in sorted(pipeline.components.items()):
        encodes = name.startswith(("vae", "text_encoder", "tokenizer", "processor", "scheduler"))
        if component is not None and name != "safety_checker" and (drawn or encodes):
            parts[name] = component_digest(component)
    rows = [[example.name, example.caption, example.stamp] for example in examples]
    return sha256_of_tensors({}, json.dumps([parts, rows], sort_keys=True, default=str))[:16]


def _write_null(pipeline: Any, model: nn.Module, folder: Path, settings: CacheSettings) -> None:
    path = folder / _NULL
    if _is_whole(path):
        return
    tensors = {}
    for size in settings.buckets:
        null = {name: _compact(tensor) for name, tensor in encode_null(pipeline, model, size).items()}
        null.update(encode_shared(pipeline, model, size))  # positions and the like do not bear rounding
        shift = sampling_shift(pipeline, model, size)
        if shift is not None:
            null[_SHIFT] = torch.tensor(shift, dtype=torch.float64)
        tensors.update({f"{size[0]}x{size[1]}/{name}": tensor for name, tensor in null.items()})
    write_tensors(path, tensors)


def _write_shard(
    pipeline: Any, model: nn.Module, part: list[tuple[int, Example]], path: Path, settings: CacheSettings
) -> None:
    broken: list[str] = []
    grouped: dict[Size, list[tuple[int, Example, torch.Tensor | None]]] = {}
    for index, example in part:
        try:
            size, pixels = _size_and_pixels(example, index, settings.buckets)
        except Exception as error:  # Pillow raises many kinds: OSError, SyntaxError, struct.error, its own
            broken.append(f"{example.name}: {str(error)[:200]}")
            continue
        grouped.setdefault(size, []).append((index, example, pixels))
    columns: dict[str, list[torch.Tensor]] = {}
    for size, members in grouped.items():
        for start in range(0, len(members), settings.batch_size):
            batch = members[start : start + settings.batch_size]
            captions, indices = [example.caption for _, example, _ in batch], [index for index, _, _ in batch]
            pictures = [pixels for _, _, pixels in batch if pixels is not None]
            if pictures:
                latents = encode_images(pipeline, torch.stack(pictures))
            else:
                how = (size, settings.draw_steps, settings.guidance_scale)
                latents = draw_latents(pipeline, model, captions, [settings.seed + index for index in indices], *how)
            finite = latents.flatten(1).isfinite().all(1)
            broken += [f"{batch[row][1].name}: its latents are not finite" for row in (~finite).nonzero().flatten()]
            tensors = {_LATENTS: latents, _INDEX: torch.tensor(indices)}
            tensors.update(encode_prompts(pipeline, model, captions, size))
            for name, tensor in tensors.items():
                columns.setdefault(f"{size[0]}x{size[1]}/{name}", []).append(tensor[finite])
    write_tensors(path, {name: _compact(torch.cat(rows)) for name, rows in columns.items()}, json.dumps(broken))


def _size_and_pixels(example: Example, index: int, buckets: Sequence[Size]) -> tuple[Size, torch.Tensor | None]:
    """The bucket that an example goes to, and its image, None where the teacher draws it."""
    if example.open is None:
        return buckets[index % len(buckets)], None
    with example.open() as image:
        picture = to_rgb(image)
    size = nearest_bucket((picture.height, picture.width), buckets)
    return size, to_pixels(picture, size)


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """float16 where that holds the values, else float32; other dtypes as they are."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return half if half.isfinite().all() else tensor.float()


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        read_tensors(path)
    except OSError as error:
        logger.warning(f"{error}: it is made again.")
        return False
    return True
