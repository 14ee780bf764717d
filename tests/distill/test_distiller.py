from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.accelerator import Accelerator

from flatten_diffusion import linearize
from flatten_diffusion.adapter import Adapter
from flatten_diffusion.distill import (
    CalibrationSettings,
    Diffusion,
    Distiller,
    DistillSettings,
    LatentCache,
    StageSettings,
)
from flatten_diffusion.distill.checkpoint import list_checkpoints
from flatten_diffusion.mixers import FocusedCalibration

from .tiny import drawn_cache, tiny_pipeline

SETTINGS = DistillSettings(
    train_batch_size=4,
    rank=2,
    calibration=CalibrationSettings(mixers=(FocusedCalibration(powers=(1.0, 3.0), scale_exponents=(0.0,)),)),
    calibration_batches=2,
    evaluation_batches=2,
    transfer=StageSettings(6, 1e-2),
    finetune=StageSettings(6, 1e-2, lr_warmup_steps=2),
)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    drawn_cache(tiny_pipeline(), folder)
    return folder


def distiller(cache_folder: Path, output: Path | None, settings: DistillSettings = SETTINGS, **more: Any) -> Distiller:
    pipeline = tiny_pipeline()
    cache: LatentCache = drawn_cache(pipeline, cache_folder)
    train, held_out = cache.split(8)
    adapter = linearize(pipeline.unet)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    return Distiller(
        Accelerator(cpu=True),
        adapter,
        Diffusion(pipeline.scheduler),
        train,
        held_out,
        settings,
        output_dir=output,
        **{"checkpointing_steps": 2, **more},
    )


def parameters(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}


def test_each_stage_brings_the_student_nearer(cache_folder: Path) -> None:
    settings = replace(SETTINGS, transfer=StageSettings(30, 1e-2), finetune=StageSettings(30, 3e-3))
    run = distiller(cache_folder, None, settings)
    original = {name: parameter.clone() for name, parameter in run.adapter.model.named_parameters()}
    progress = run.run()
    distance = {stage: gap.distance for stage, gap in progress.gaps.items()}
    assert distance["finetune"] < distance["calibrate"] < distance["raw"]
    assert distance["transfer"] < distance["raw"] and distance["finetune"] < distance["transfer"]
    assert progress.skipped == 0
    for name, parameter in run.adapter.model.named_parameters():
        assert "flatten_mixer" in name or torch.equal(parameter, original[name]), name


@pytest.mark.parametrize("stage", ["calibrate", "transfer", "finetune"])
def test_each_stage_runs_alone(cache_folder: Path, stage: str) -> None:
    settings = replace(SETTINGS, stages=(stage,), finetune=StageSettings(25, 3e-3), transfer=StageSettings(25, 1e-2))
    progress = distiller(cache_folder, None, settings).run()
    assert progress.finished == [stage]
    assert progress.gaps[stage].distance < progress.gaps["raw"].distance


class Killed(BaseException):
    """Not caught by anything on its way out."""


@pytest.mark.parametrize("step", [1, 3, 6, 7, 11])
def test_resuming_is_bit_exact(cache_folder: Path, tmp_path: Path, step: int) -> None:
    whole = distiller(cache_folder, tmp_path / "whole")
    reached = whole.run()

    def kill(running: Distiller, losses: dict[str, float]) -> None:
        if running.progress.total_steps == step:
            raise Killed

    with pytest.raises(Killed):
        distiller(cache_folder, tmp_path / "cut", on_step=kill).run()
    with (tmp_path / "cut" / "history.jsonl").open("a") as file:
        file.write('{"stage": "tran')  # what a kill may leave
    torch.randn(3)
    resumed = distiller(cache_folder, tmp_path / "cut")
    progress = resumed.run(resume=True)
    assert parameters(whole.adapter).keys() == parameters(resumed.adapter).keys()
    for name, parameter in parameters(whole.adapter).items():
        assert torch.equal(parameter, parameters(resumed.adapter)[name]), name
    assert whole.adapter.config == resumed.adapter.config
    assert progress.gaps == reached.gaps
    histories = [(tmp_path / run / "history.jsonl").read_text() for run in ("whole", "cut")]
    assert histories[0] == histories[1] and len(histories[0].splitlines()) == 12


def test_a_finished_run_is_not_run_again_but_takes_more_stages(cache_folder: Path, tmp_path: Path) -> None:
    first = replace(SETTINGS, stages=("calibrate", "transfer"))
    distiller(cache_folder, tmp_path / "out", first).run()
    again = distiller(cache_folder, tmp_path / "out", first, on_step=lambda *_: pytest.fail("a step ran"))
    again.run(resume=True)
    more = distiller(cache_folder, tmp_path / "out")
    assert more.run(resume=True).finished == ["calibrate", "transfer", "finetune"]
    straight = distiller(cache_folder, None)
    straight.run()
    for name, parameter in parameters(straight.adapter).items():
        assert torch.equal(parameter, parameters(more.adapter)[name]), name


def test_a_damaged_newest_checkpoint_changes_nothing_but_time(cache_folder: Path, tmp_path: Path) -> None:
    whole = distiller(cache_folder, tmp_path / "out")
    whole.run()
    newest, before = list_checkpoints(tmp_path / "out")[-1], list_checkpoints(tmp_path / "out")[-2]
    for path in (newest, before):
        file = path / "state.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    resumed = distiller(cache_folder, tmp_path / "out")
    resumed.run(resume=True)
    for name, parameter in parameters(whole.adapter).items():
        assert torch.equal(parameter, parameters(resumed.adapter)[name]), name


def test_checkpoints_are_rotated(cache_folder: Path, tmp_path: Path) -> None:
    distiller(cache_folder, tmp_path, checkpoints_total_limit=2).run()
    assert len(list_checkpoints(tmp_path)) == 2


def test_other_settings_are_not_resumed(cache_folder: Path, tmp_path: Path) -> None:
    distiller(cache_folder, tmp_path, replace(SETTINGS, stages=("calibrate",))).run()
    with pytest.raises(ValueError, match="another caption_dropout, seed"):
        distiller(cache_folder, tmp_path, replace(SETTINGS, seed=1, caption_dropout=0.0)).run(resume=True)
    run = distiller(cache_folder, tmp_path)
    run.adapter.reconfigure(replace(run.adapter.config, min_tokens=16))
    with pytest.raises(ValueError, match="another min_tokens"):
        run.run(resume=True)


@pytest.mark.parametrize("stage", ["transfer", "finetune"])
def test_a_loss_that_is_not_finite_is_skipped(cache_folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = distiller(cache_folder, None, replace(SETTINGS, stages=(stage,)))
    compute = getattr(run, f"_{stage}_losses")
    seen: list[dict[str, torch.Tensor]] = []

    def poisoned(batch: Any) -> dict[str, torch.Tensor]:
        seen.append(parameters(run.adapter))
        if len(seen) == 3:
            batch = replace(batch, noisy=torch.full_like(batch.noisy, float("nan")))
        losses: dict[str, torch.Tensor] = compute(batch)
        return losses

    monkeypatch.setattr(run, f"_{stage}_losses", poisoned)
    progress = run.run()
    assert progress.skipped == 1
    assert all(torch.equal(seen[2][name], parameter) for name, parameter in seen[3].items())
    assert any(not torch.equal(seen[3][name], parameter) for name, parameter in seen[4].items())
    assert all(parameter.isfinite().all() for parameter in run.adapter.parameters())


def test_several_in_a_row_stop_with_a_diagnosis(cache_folder: Path) -> None:
    run = distiller(cache_folder, None, replace(SETTINGS, stages=("finetune",), patience=3))

    def poison(running: Distiller, losses: dict[str, float]) -> None:
        next(running.adapter.parameters()).data.fill_(float("nan"))

    run.on_step = poison
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*log_scale is not finite; lower the learning rate"):
        run.run()


def test_history_is_json(cache_folder: Path, tmp_path: Path) -> None:
    distiller(cache_folder, tmp_path, replace(SETTINGS, stages=("finetune",))).run()
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"stage", "step", "total", "loss", "teacher", "target", "features"} == set(rows[0])


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="Unknown stage anneal"):
        DistillSettings(stages=("anneal",))
    with pytest.raises(ValueError, match="train_batch_size is 0"):
        DistillSettings(train_batch_size=0)
    with pytest.raises(ValueError, match="caption_dropout is 2"):
        DistillSettings(caption_dropout=2)
    assert DistillSettings(stages=("finetune", "calibrate")).stages == ("calibrate", "finetune")
