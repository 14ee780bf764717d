from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.accelerator import Accelerator
from diffusers import DDIMScheduler

from flatten_diffusion import linearize, restore
from flatten_diffusion.adapter import Adapter
from flatten_diffusion.distill import (
    CacheSettings,
    CalibrationSettings,
    Diffusion,
    Distiller,
    DistillSettings,
    Gap,
    LatentCache,
    LossWeights,
    Progress,
    StageSettings,
    build_cache,
    prompts_as_examples,
)
from flatten_diffusion.distill.checkpoint import list_checkpoints
from flatten_diffusion.mixers import FocusedCalibration

from .tiny import CAPTIONS, drawn_cache, tiny_pipeline

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
    settings = replace(SETTINGS, transfer=StageSettings(30, 1e-2), finetune=StageSettings(90, 2e-3))
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


@pytest.fixture(scope="module")
def whole(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Distiller:
    run = distiller(cache_folder, tmp_path_factory.mktemp("whole"))
    run.run()
    return run


@pytest.mark.parametrize("step", [1, 3, 6, 7, 11])
def test_resuming_is_bit_exact(cache_folder: Path, tmp_path: Path, whole: Distiller, step: int) -> None:
    reached, output = whole.progress, whole.output_dir
    assert output is not None

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
    histories = [(folder / "history.jsonl").read_text() for folder in (output, tmp_path / "cut")]
    assert histories[0] == histories[1] and len(histories[0].splitlines()) == 12


def test_a_finished_run_only_takes_more_stages(cache_folder: Path, tmp_path: Path, whole: Distiller) -> None:
    first = replace(SETTINGS, stages=("calibrate", "transfer"))
    distiller(cache_folder, tmp_path / "out", first).run()
    again = distiller(cache_folder, tmp_path / "out", first, on_step=lambda *_: pytest.fail("a step ran"))
    again.run(resume=True)
    more = distiller(cache_folder, tmp_path / "out")
    assert more.run(resume=True).finished == ["calibrate", "transfer", "finetune"]
    for name, parameter in parameters(whole.adapter).items():
        assert torch.equal(parameter, parameters(more.adapter)[name]), name


def test_a_damaged_newest_checkpoint_costs_only_time(cache_folder: Path, tmp_path: Path, whole: Distiller) -> None:
    assert whole.output_dir is not None
    shutil.copytree(whole.output_dir, tmp_path / "out")
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
    with pytest.raises(ValueError, match="another conversion"):
        run.run(resume=True)


def test_another_teacher_other_prompts_or_another_scheduler_are_not_resumed(cache_folder: Path, tmp_path: Path) -> None:
    distiller(cache_folder, tmp_path, replace(SETTINGS, stages=("calibrate",))).run()

    run = distiller(cache_folder, tmp_path)
    model: Any = run.adapter.model
    restore(model)
    model.conv_out.weight.data[0].mul_(1.01)  # the same shapes
    with pytest.raises(ValueError, match="with another teacher"):
        again(run, adapter=linearize(model)).run(resume=True)

    pipeline = tiny_pipeline()
    for captions, options in ((("another",), {}), (CAPTIONS, {"draw_steps": 2}), (CAPTIONS, {"guidance_scale": 5.0})):
        examples = prompts_as_examples([captions[index % len(captions)] for index in range(24)])
        settings = CacheSettings(((32, 32),), **{"draw_steps": 1, "shard_size": 8, **options})
        parts = build_cache(pipeline, pipeline.unet, examples, cache_folder, settings).split(8)
        run = distiller(cache_folder, tmp_path)
        with pytest.raises(ValueError, match=r"with another examples \(content"):
            again(run, train=parts[0], held_out=parts[1]).run(resume=True)

    run = distiller(cache_folder, tmp_path)
    other = Diffusion(DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="with another scheduler"):
        again(run, diffusion=other).run(resume=True)


def again(run: Distiller, **changes: Any) -> Distiller:
    """A distiller like `run` but for some of its arguments."""
    names = ("accelerator", "adapter", "diffusion", "train", "held_out", "settings", "output_dir")
    return Distiller(**{**{name: getattr(run, name) for name in names}, **changes})


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
    settings = replace(SETTINGS, stages=("finetune",), patience=3)
    run = distiller(cache_folder, None, settings, checkpointing_steps=99)

    def poison(running: Distiller, losses: dict[str, float]) -> None:
        next(running.adapter.parameters()).data.fill_(float("nan"))

    run.on_step = poison
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*log_scale is not finite; lower the learning rate"):
        run.run()


def test_the_passes_of_a_step_are_averaged(cache_folder: Path) -> None:
    gradients = []
    for count in (1, 2):
        settings = replace(SETTINGS, gradient_accumulation_steps=count, max_grad_norm=1e6)
        run = distiller(cache_folder, None, settings)
        run._prepare("finetune", settings.finetune)
        batch = next(iter(run._batches(run.train, range(1), "finetune")))
        run._optimizer_step(run._finetune_losses, [batch] * count)
        gradients.append([parameter.grad for parameter in run.adapter.parameters()])
    assert all(torch.allclose(one, two, rtol=1e-5) for one, two in zip(*gradients, strict=True))  # type: ignore[arg-type]


def test_gradients_that_overflow_at_every_scale_stop_it(cache_folder: Path) -> None:
    settings = replace(SETTINGS, stages=("finetune",), patience=2, finetune=StageSettings(12, 1e-3))
    run = distiller(cache_folder, None, settings)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2e-6)

    def poison(running: Distiller, losses: dict[str, float]) -> None:
        if running.progress.step == 1:
            next(running.adapter.parameters()).register_hook(lambda gradient: gradient * float("inf"))

    run.on_step = poison
    with pytest.raises(FloatingPointError, match="2 steps in a row.*a gradient is not"):
        run.run()
    assert run.progress.skipped == 2


@pytest.mark.parametrize("step", [3, 6])
def test_what_is_not_finite_is_no_checkpoint_and_no_result(cache_folder: Path, tmp_path: Path, step: int) -> None:
    run = distiller(cache_folder, tmp_path, replace(SETTINGS, stages=("finetune",), ema_decay=None))

    def poison(running: Distiller, losses: dict[str, float]) -> None:
        if running.progress.step == step:  # too late for the patience, also on the last step
            next(running.adapter.parameters()).data.fill_(float("nan"))

    run.on_step = poison
    with pytest.raises(FloatingPointError, match="log_scale is not finite: lower the learning rate"):
        run.run()
    good = distiller(cache_folder, tmp_path, run.settings)
    assert good.load_checkpoint() is not None and good.progress.step < step
    assert all(parameter.isfinite().all() for parameter in good.adapter.parameters())


def test_losses_that_are_not_finite_stop_it(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = distiller(cache_folder, tmp_path, replace(SETTINGS, stages=("transfer",)))
    gap = Gap(1.0, float("nan"), float("nan"))
    monkeypatch.setattr(run, "evaluate", lambda: gap)
    with pytest.raises(FloatingPointError, match="transfer ended with a held-out loss that is not finite"):
        run.run()
    resumed = distiller(cache_folder, tmp_path, run.settings)  # the raw swap may well not be finite
    assert resumed.load_checkpoint() is not None and resumed.progress.gaps["raw"].teacher == 1
    monkeypatch.setattr(resumed, "evaluate", lambda: Gap(float("inf"), 1.0, 1.0))
    with pytest.raises(FloatingPointError, match="teacher's own loss"):
        resumed.progress = Progress()
        resumed.run()


def test_a_damaged_history_is_mended(cache_folder: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, stages=("finetune",))
    distiller(cache_folder, tmp_path, settings).run()
    history = tmp_path / "history.jsonl"
    lines = history.read_text().splitlines()
    damaged = [lines[0], '{"stage": "finetune"}', "[1]", "\0", lines[2], '{"stage": "fine']
    history.write_text("\n".join(damaged))
    distiller(cache_folder, tmp_path, settings).run(resume=True)
    assert history.read_text().splitlines() == [lines[0], lines[2]]


def test_history_is_json(cache_folder: Path, tmp_path: Path) -> None:
    distiller(cache_folder, tmp_path, replace(SETTINGS, stages=("finetune",))).run()
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"stage", "step", "total", "loss", "teacher", "target", "features"} == set(rows[0])


def test_the_average_decays_as_it_should(cache_folder: Path) -> None:
    run = distiller(cache_folder, None, replace(SETTINGS, stages=("finetune",)))
    averages: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    def watch(running: Distiller, losses: dict[str, float]) -> None:
        seen.append(next(running.adapter.parameters()).detach().clone())
        averages.append(running.ema.shadow_params[0].clone())  # type: ignore[union-attr]

    run.on_step = watch
    run.run()
    for step in range(2, len(seen) + 1):
        decay = min(0.99, (1 + step) / (10 + step))
        expected = decay * averages[step - 2] + (1 - decay) * seen[step - 1]
        assert torch.allclose(averages[step - 1], expected, atol=1e-7)
    assert torch.equal(next(run.adapter.parameters()), averages[-1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stages": ("anneal",)}, "Unknown stage anneal"),
        ({"train_batch_size": 0}, "train_batch_size is 0"),
        ({"seed": 2**70}, "seed is 1180591620717411303424: pass a whole number"),
        ({"caption_dropout": 2}, "caption_dropout is 2"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"adam_weight_decay": float("nan")}, "adam_weight_decay is nan"),
        ({"ema_decay": 2.0}, "ema_decay is 2.0"),
        ({"rank": True}, "rank is True"),
        ({"seed": None}, "seed is None"),
        ({"projections": ("q", "kk")}, "projections are q, kk"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillSettings(**wrong)


def test_settings_in_their_order() -> None:
    assert DistillSettings(stages=("finetune", "calibrate")).stages == ("calibrate", "finetune")
    assert DistillSettings(rank=None, ema_decay=None).rank is None


@pytest.mark.parametrize(
    "wrong", [(-1, 1e-3), (5, float("nan")), (5, 0.0), (5, 1e-3, "cosin"), (5, 1e-3, "piecewise_constant"), (5.5, 1e-3)]
)
def test_bad_stages(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"steps is|learning_rate is|lr_scheduler '"):
        StageSettings(*wrong)


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match="weight 0"):
        LossWeights(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="min_snr_gamma is 0"):
        LossWeights(min_snr_gamma=0)
