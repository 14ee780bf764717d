from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flatten_diffusion.distill import (
    CacheSettings,
    Diffusion,
    LatentCache,
    NoisyBatch,
    NoisyBatches,
    build_cache,
    prompts_as_examples,
)
from flatten_diffusion.distill.batches import BatchPlan
from flatten_diffusion.distill.denoiser_call import sampling_shift

from .tiny import drawn_cache, tiny_flux, tiny_pipeline


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    return drawn_cache(tiny_pipeline(), tmp_path_factory.mktemp("cache"), count=13, buckets=((32, 32), (16, 48)))


def batches(cache: LatentCache, batch_size: int, steps: range, **options: float) -> list[NoisyBatch]:
    diffusion = Diffusion(tiny_pipeline().scheduler)
    return list(NoisyBatches(cache, diffusion, batch_size, steps, seed=5, stage="test", **options))  # type: ignore[arg-type]


def test_an_epoch_shows_every_example_in_batches_of_one_size() -> None:
    sizes = [(32, 32)] * 7 + [(16, 48)] * 2 + [(48, 16)]
    plan = BatchPlan(sizes, 3, seed=0)
    assert plan.steps_per_epoch == 3 + 1 + 1
    for epoch in range(3):
        steps = [plan[epoch * 5 + step] for step in range(5)]
        assert all(len(step) == 3 and len({sizes[index] for index in step}) == 1 for step in steps)
        assert set(Counter(index for step in steps for index in step)) == set(range(10))
    assert [plan[step] for step in range(5)] != [plan[step] for step in range(5, 10)]
    assert plan[2] == BatchPlan(sizes, 3, seed=0)[2]


def test_two_processes_see_the_halves_of_one(cache: LatentCache) -> None:
    whole = batches(cache, 4, range(6), caption_dropout=0.5)
    halves = [
        batches(cache, 2, range(6), caption_dropout=0.5, process_index=index, num_processes=2) for index in range(2)
    ]
    for one, first, second in zip(whole, *halves, strict=True):
        for name in ("noisy", "timesteps", "target"):
            assert torch.equal(getattr(one, name), torch.cat([getattr(first, name), getattr(second, name)]))
        for name, tensor in one.conditioning.items():
            assert torch.equal(tensor, torch.cat([first.conditioning[name], second.conditioning[name]]))


def test_any_step_can_be_the_first(cache: LatentCache) -> None:
    whole, late = batches(cache, 4, range(9)), batches(cache, 4, range(5, 9))
    torch.randn(7)  # the global random numbers play no part
    for one, other in zip(whole[5:], late, strict=True):
        assert torch.equal(one.noisy, other.noisy) and torch.equal(one.timesteps, other.timesteps)


def test_captions_are_dropped_at_the_rate(cache: LatentCache) -> None:
    dropped = total = 0
    for batch in batches(cache, 8, range(50), caption_dropout=0.25):
        empty = (batch.conditioning["encoder_hidden_states"] == batch.null["encoder_hidden_states"]).flatten(1).all(1)
        captioned = batch.captioned["encoder_hidden_states"]
        assert not (captioned == batch.null["encoder_hidden_states"]).flatten(1).all(1).any()
        assert torch.equal(batch.conditioning["encoder_hidden_states"][~empty], captioned[~empty])
        dropped, total = dropped + int(empty.sum()), total + len(empty)
    assert dropped / total == pytest.approx(0.25, abs=0.06)
    assert all(
        torch.equal(batch.conditioning["encoder_hidden_states"], batch.captioned["encoder_hidden_states"])
        for batch in batches(cache, 4, range(3))
    )


def test_worker_processes_give_the_same(cache: LatentCache) -> None:
    alone, workers = batches(cache, 3, range(4)), batches(cache, 3, range(4), num_workers=1)
    assert all(torch.equal(one.noisy, other.noisy) for one, other in zip(alone, workers, strict=True))


def test_timesteps_are_shifted_by_the_size_as_the_pipeline_shifts_them(tmp_path: Path) -> None:
    pipeline, sizes = tiny_flux(), ((32, 32), (96, 96))
    options = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 60.0, "max_image_seq_len": 4096}
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**options)
    settings = CacheSettings(sizes, draw_steps=1)
    cache = build_cache(pipeline, pipeline.transformer, prompts_as_examples(["a"] * 4), tmp_path, settings)
    shifts = [sampling_shift(pipeline, pipeline.transformer, size) for size in sizes]
    assert list(cache.shifts.values()) == shifts and shifts[0] != shifts[1]
    seen = set()
    for batch in NoisyBatches(cache, Diffusion(pipeline.scheduler), 2, range(8), seed=0, stage="test"):
        shift = cache.shifts[(batch.noisy.shape[-2] * 4, batch.noisy.shape[-1] * 4)]
        median = 1000 * shift / (1 + shift)
        assert batch.timesteps.min() <= median <= batch.timesteps.max()  # stratified: one below, one above
        seen.add(shift)
    assert seen == set(shifts)
