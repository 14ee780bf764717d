"""Which examples make up which step, and every random number of that step, from (seed, step) alone.

Nothing is carried from one step to the next, so a run resumed at any step, or split over any number of processes,
sees exactly what an uninterrupted single process would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch.utils.data import DataLoader

from .buckets import Size
from .cache import LatentCache
from .conditioning import Conditioning
from .denoiser_call import is_shared
from .diffusion import Diffusion


@dataclass(frozen=True)
class NoisyBatch:
    """One process's share of a step.

    Attributes:
        noisy: [B, C, h, w].
        timesteps: [B].
        target: [B, C, h, w], what the model is trained to predict.
        conditioning: rows per sample, some of them the empty prompt's; and what is common to all (see `denoiser_call`).
        captioned: the same without any left empty.
        null: the empty prompt's, as many rows.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    conditioning: Conditioning
    captioned: Conditioning
    null: Conditioning

    def __len__(self) -> int:
        return len(self.noisy)


def generator_of(seed: int, stage: str, step: int) -> torch.Generator:
    """The random numbers of one step of one stage."""
    digest = hashlib.sha256(f"{seed} {stage} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


class BatchPlan:
    """The examples of every step: each epoch shows all of them, shuffled, in batches of one image size.

    The last batch of a size is filled up from the beginning of that size's order, so that none is left out.

    Args:
        sizes: of each example.
        batch_size: of all processes together.
    """

    def __init__(self, sizes: Sequence[Size], batch_size: int, seed: int, stage: str = "") -> None:
        self.batch_size, self.seed, self.stage = batch_size, seed, stage
        self._groups: dict[Size, list[int]] = {}
        for index, size in enumerate(sizes):
            self._groups.setdefault(size, []).append(index)
        self.steps_per_epoch = sum(-(-len(group) // batch_size) for group in self._groups.values())
        self._epoch, self._batches = -1, [[0]]

    def __getitem__(self, step: int) -> list[int]:
        """Indices of the examples of `step`, all processes' together."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[position]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = generator_of(self.seed, f"{self.stage} order", epoch)
        batches = []
        for group in self._groups.values():
            order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                batches.append([*batch, *(order[i % len(order)] for i in range(self.batch_size - len(batch)))])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


@dataclass
class NoisyBatches:
    """Iterates over the `NoisyBatch` of each step in `steps`.

    Args:
        cache: the examples.
        diffusion: the teacher's forward process.
        batch_size: examples per process and step.
        steps: which ones.
        stage: keeps the random numbers of stages apart.
        caption_dropout: probability that a sample is given the empty prompt, as when the teacher was trained.
    """

    cache: LatentCache
    diffusion: Diffusion
    batch_size: int
    steps: range
    _: KW_ONLY
    seed: int
    stage: str
    caption_dropout: float = 0.0
    device: torch.device | str = "cpu"
    process_index: int = 0
    num_processes: int = 1
    num_workers: int = 0

    def __post_init__(self) -> None:
        self.total = self.batch_size * self.num_processes
        self.share = slice(self.process_index * self.batch_size, (self.process_index + 1) * self.batch_size)
        self._plan = BatchPlan(self.cache.sizes, self.total, self.seed, self.stage)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[NoisyBatch]:
        loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(
            self.cache,
            batch_sampler=(self._plan[step][self.share] for step in self.steps),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # its own: it must not draw from the global random numbers
        )
        for step, rows in zip(self.steps, loader, strict=True):
            yield self._noisy(step, rows)

    def _noisy(self, step: int, rows: dict[str, torch.Tensor]) -> NoisyBatch:
        generator = generator_of(self.seed, self.stage, step)
        clean = rows["latents"].float()
        # Drawn for all processes together, so that their number changes nothing.
        noise = torch.randn(self.total, *clean.shape[1:], generator=generator)[self.share]
        size = self.cache.sizes[self._plan[step][0]]
        timesteps = self.diffusion.draw_timesteps(self.total, generator, self.cache.shifts.get(size))[self.share]
        dropped = (torch.rand(self.total, generator=generator) < self.caption_dropout)[self.share]
        empty = self.cache.null.get(size, {})
        shared = {name: tensor for name, tensor in empty.items() if is_shared(name)}
        captioned = {name: tensor for name, tensor in rows.items() if name != "latents"}
        # Where a model has no empty prompt, each sample keeps its own.
        null = {
            name: empty[name].to(own.dtype).expand(len(clean), *own.shape[1:]) if name in empty else own
            for name, own in captioned.items()
        }
        conditioning = {
            name: torch.where(dropped.reshape(-1, *[1] * (tensor.dim() - 1)), null[name], tensor)
            for name, tensor in captioned.items()
        }
        return NoisyBatch(
            noisy=self.diffusion.add_noise(clean, noise, timesteps).to(self.device),
            timesteps=timesteps.to(self.device),
            target=self.diffusion.target(clean, noise, timesteps).to(self.device),
            conditioning=_to({**conditioning, **shared}, self.device),
            captioned=_to({**captioned, **shared}, self.device),
            null=_to({**null, **shared}, self.device),
        )


def _to(conditioning: Conditioning, device: torch.device | str) -> Conditioning:
    return {name: tensor.to(device) for name, tensor in conditioning.items()}
