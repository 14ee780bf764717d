"""Conditioning recorded from the pipeline's own call, against the rows written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from flatten_diffusion import linearize
from flatten_diffusion.distill import (
    CacheSettings,
    Diffusion,
    Distiller,
    DistillSettings,
    LossWeights,
    StageSettings,
    build_cache,
    prompts_as_examples,
)
from flatten_diffusion.distill.batches import NoisyBatches
from flatten_diffusion.distill.conditioning import encode_prompts, encode_shared, family_of, predict
from flatten_diffusion.distill.denoiser_call import (
    can_record,
    draw_recorded,
    is_shared,
    record_rows,
    record_shared,
    replay,
)
from flatten_diffusion.distill.equal_tokens import repeat_last
from flatten_diffusion.distill.latents import draw_latents, pixels_per_token_step
from flatten_diffusion.distill.objective import Objective

from ..models.tiny import build
from .tiny import CAPTIONS, tiny_aura_flow, tiny_flux, tiny_pipeline, tiny_sd3

PROMPTS = ["a red circle", "", "two green stars"]


def test_sd3_as_its_row_says() -> None:
    pipeline = tiny_sd3()
    model = pipeline.transformer
    rows = record_rows(pipeline, model, PROMPTS, (32, 48))
    expected = encode_prompts(pipeline, model, PROMPTS, (32, 48))
    expected["encoder_hidden_states"] = repeat_last(
        expected["encoder_hidden_states"], expected.pop("last_token_counts")
    )
    assert rows.keys() == expected.keys()
    assert all(torch.equal(rows[name], tensor) for name, tensor in expected.items())
    noisy, timesteps = torch.randn(3, 4, 8, 12), torch.tensor([300.0, 900.0, 17.5])
    arguments = replay(model, noisy, timesteps, {**rows, **record_shared(pipeline, model, (32, 48))})
    torch.testing.assert_close(arguments["timestep"], timesteps)
    with torch.no_grad():
        assert torch.allclose(model(**arguments)[0], predict(model, model, noisy, timesteps, rows), atol=1e-5)


def test_flux_as_its_row_says() -> None:
    pipeline = tiny_flux()
    model = pipeline.transformer
    rows = record_rows(pipeline, model, PROMPTS, (32, 48))
    shared = record_shared(pipeline, model, (32, 48))
    assert {"shared:img_ids", "shared:txt_ids"} <= shared.keys() and all(map(is_shared, shared))
    assert {"encoder_hidden_states", "pooled_projections", "guidance"} == rows.keys()
    expected = encode_prompts(pipeline, model, PROMPTS, (32, 48))
    assert all(torch.equal(rows[name], tensor) for name, tensor in expected.items())
    tokens, timesteps = torch.randn(3, 24, 16), torch.tensor([300.0, 900.0, 20.0])
    arguments = replay(model, tokens, timesteps, {**rows, **shared})
    torch.testing.assert_close(arguments["timestep"], timesteps / 1000)
    assert arguments["img_ids"].tolist() == [[0, row, column] for row in range(4) for column in range(6)]
    with torch.no_grad():
        assert model(**arguments)[0].shape == tokens.shape


def test_drawn_latents_are_the_pipelines() -> None:
    pipeline = tiny_sd3()
    drawn = draw_recorded(pipeline, pipeline.transformer, PROMPTS, [3, 4, 5], (32, 48), 2, 4.0)
    assert torch.equal(drawn, draw_latents(pipeline, pipeline.transformer, PROMPTS, [3, 4, 5], (32, 48), 2, 4.0))


def test_a_family_without_a_row_is_distilled_from_what_it_draws(tmp_path: Path) -> None:
    pipeline = tiny_aura_flow()
    model = pipeline.transformer.requires_grad_(False)
    assert family_of(model).recorded
    step = pixels_per_token_step(pipeline, model)
    examples = prompts_as_examples(list(CAPTIONS) * 4)
    caching = CacheSettings(((4 * step, 6 * step),), draw_steps=1, batch_size=8)
    cache = build_cache(pipeline, model, examples, tmp_path, caching)
    assert any(is_shared(name) for name in cache.null[(4 * step, 6 * step)])
    weights = LossWeights(teacher=0.0, target=0.0, features=1.0)
    settings = DistillSettings(
        stages=("finetune",),
        train_batch_size=8,
        finetune=StageSettings(12, 1e-3, "constant", 0),
        projections=("out",),
        weights=weights,
        ema_decay=None,
    )
    adapter, diffusion = linearize(model), Diffusion(pipeline.scheduler)
    train, held_out = cache.split(4)
    batch = next(iter(NoisyBatches(held_out, diffusion, 4, range(1), seed=1, stage="test")))
    objective = Objective(adapter, model, diffusion, weights)
    before = objective.loss(batch)[0].item()
    Distiller(Accelerator(cpu=True), adapter, diffusion, train, held_out, settings).run()
    assert objective.loss(batch)[0].item() < 0.9 * before


def test_images_are_refused_before_any_is_read(tmp_path: Path) -> None:
    pipeline = tiny_aura_flow()
    example = prompts_as_examples(["a"])[0]
    pictured = type(example)(example.name, example.caption, lambda: pytest.fail("read"), example.stamp)
    with pytest.raises(ValueError, match="AuraFlowTransformer2DModel is distilled from what it draws"):
        build_cache(pipeline, pipeline.transformer, [pictured], tmp_path, CacheSettings(((32, 32),)))


def test_what_is_no_denoiser() -> None:
    assert not can_record(build("controlnet").model)
    assert not can_record(torch.nn.Linear(1, 1))


def test_rows_of_the_table_share_nothing() -> None:
    pipeline = tiny_pipeline()
    assert encode_shared(pipeline, pipeline.unet, (32, 32)) == {}
