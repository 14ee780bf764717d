"""examples/distill.py as a user runs it: its own process, its flags, kill -9."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flatten_diffusion import load_adapter
from flatten_diffusion.distill import Gap, Progress
from flatten_diffusion.distill.checkpoint import list_checkpoints
from flatten_diffusion.files import read_json

from .tiny import CAPTIONS, tiny_pipeline

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "distill.py"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    tiny_pipeline().save_pretrained(folder / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS * 3))
    return folder


def command(workplace: Path, output: str, *flags: str) -> list[str]:
    return [
        *[str(SCRIPT), "--pretrained_model_name_or_path", str(workplace / "pipeline")],
        *["--prompts", str(workplace / "prompts.txt"), "--cache_dir", str(workplace / "cache"), "--draw_steps", "1"],
        *["--resolution", "32", "--output_dir", str(workplace / output), "--train_batch_size", "4", "--rank", "2"],
        *["--calibration_batches", "1", "--transfer_steps", "8", "--max_train_steps", "8", "--lr_warmup_steps", "0"],
        *["--checkpointing_steps", "3", "--report_to", "none", *flags],
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(arguments: list[str]) -> str:
    process = start(arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def history(folder: Path) -> list[str]:
    return (folder / "history.jsonl").read_text().splitlines()


def test_killed_at_any_moment_and_resumed_is_bit_exact(workplace: Path) -> None:
    output = finish(command(workplace, "whole", "--validation_prompts", "a red circle", "--validation_steps", "99"))
    assert "gap closed" in output
    whole, cut = workplace / "whole", workplace / "cut"
    for moment in (4, 13):  # in transfer, in finetune
        process = start(command(workplace, "cut", "--resume_from_checkpoint", "latest"))
        deadline = time.monotonic() + 200
        while not (cut / "history.jsonl").is_file() or len(history(cut)) < moment:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert list_checkpoints(cut) and not (cut / "adapter_model.safetensors").exists()
    finish(command(workplace, "cut", "--resume_from_checkpoint", "latest"))
    assert history(whole) == history(cut) and len(history(cut)) == 16
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, cut)]
    assert [row["stage"] for row in summaries[0]["stages"]] == ["raw", "calibrate", "transfer", "finetune"]
    for summary in summaries:
        for row in summary["stages"]:
            del row["seconds"]
    assert summaries[0] == summaries[1]

    assert (whole / "validation" / "final.png").is_file()
    assert "gap closed" in (whole / "README.md").read_text()
    pipeline = tiny_pipeline()
    adapter = load_adapter(pipeline, whole)
    assert adapter.config.deltas == ("q", "k", "v", "out") and adapter.config.delta_rank == 2

    process = start(command(workplace, "whole"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "holds checkpoints: pass --resume_from_checkpoint" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompts nowhere.txt", "nowhere.txt is no file"),
        ("--train_data_dir /nowhere", "pass one of"),
        ("--stages calibrate,anneal", "Unknown stage anneal"),
        ("--projections q,kk", "projections are q, kk"),
        ("--lr_scheduler cosin", "lr_scheduler 'cosin' cannot be used"),
        ("--window 1", "window is 1"),
        ("--kernel_size 4", "kernel_size is 4"),
        ("--kernel_size 1001", "'1001' is no whole number from 0 to 63"),
        ("--rank -1", "--rank: '-1' is no whole number"),
        ("--caption_dropout 3", "--caption_dropout: '3' is no number from 0.0 to 1.0"),
        ("--learning_rate nan", "--learning_rate: 'nan' is no number"),
        ("--max_train_steps -5", "--max_train_steps: '-5'"),
        ("--max_grad_norm 0", "--max_grad_norm: '0'"),
        ("--ema_decay 2", "--ema_decay: '2'"),
        ("--seed 1180591620717411303424", "--seed: '1180591620717411303424'"),
        ("--resolution 100000", "--resolution: '100000' is no whole number from 1 to 16384"),
        ("--resolution 3x", "--resolution: '3x' is no whole number"),
        ("--buckets 512x512,9", "Size '9' is not HEIGHTxWIDTH"),
        ("--buckets 99999x8", "99999x8 pixels"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers: '-1'"),
        ("--num_validation_images 0", "--num_validation_images: '0'"),
        ("--validation_inference_steps 0", "--validation_inference_steps: '0'"),
        ("--num_eval_samples 100", "100 held-out of 18 examples leave none to train on"),
        ("--max_train_samples 1", "1 held-out of 1 examples"),
        ("--report_to nonsense", "--report_to nonsense is not installed"),
        (
            "--teacher_loss_weight 0 --target_loss_weight 0 --feature_loss_weight 0",
            "have weight 0",
        ),
        ("--push_to_hub --hub_model_id a/b/c", "--hub_model_id: "),
        ("--cache_dir SCRIPT", "is a file"),
        ("--pretrained_model_name_or_path /nowhere", "error: "),
        ("--pretrained_model_name_or_path INPAINT", "StableDiffusionInpaintPipeline cannot be distilled"),
        ("--pretrained_model_name_or_path VIDEO --validation_prompts a", "WanPipeline draws no still images"),
    ],
)
def test_wrong_flags_are_one_line_before_anything_is_loaded(
    workplace: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script()
    monkeypatch.setattr(module, "load_pipeline", lambda *_: pytest.fail("loaded"))
    places = {"SCRIPT": str(SCRIPT)}
    for place, name in (("INPAINT", "StableDiffusionInpaintPipeline"), ("VIDEO", "WanPipeline")):
        places[place] = str(workplace / place)
        (workplace / place).mkdir(exist_ok=True)
        (workplace / place / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(SystemExit) as stopped:
        module.main(command(workplace, "bad", *(places.get(flag, flag) for flag in flags.split()))[1:])
    assert stopped.value.code not in (0, None)
    said = (capsys.readouterr().err + f"{stopped.value.code}\n").removesuffix("2\n")
    assert message in said and len(said.splitlines()) == 1
    assert not (workplace / "bad").exists()


def test_a_hub_out_of_reach_is_found_before_the_work(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(SystemExit):
        script().main(command(workplace, "bad", "--push_to_hub")[1:])
    assert "--push_to_hub: the Hub cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"), [("--resolution 36", "multiples of 8"), ("--include no", "none of the 8")]
)
def test_what_does_not_fit_the_model_is_said_before_the_cache_is_built(
    workplace: Path, flags: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        script().main(command(workplace, "bad", "--cache_dir", str(workplace / "unused"), *flags.split())[1:])
    assert not (workplace / "unused").exists()


SHORT = ("--stages", "calibrate,finetune", "--max_train_steps", "4", "--checkpointing_steps", "2")


def test_a_diverged_run_leaves_the_last_good_adapter_and_fails(workplace: Path) -> None:
    module = script()

    def poison(self: Any, distiller: Any, losses: dict[str, float]) -> None:
        if distiller.progress.step == 4:
            next(distiller.adapter.parameters()).data.fill_(float("nan"))

    module.Validation.__call__ = poison
    with pytest.raises(SystemExit, match=r"is not finite: lower .* holds the adapter as of finetune step 2"):
        module.main(command(workplace, "diverged", *SHORT, "--no-use_ema")[1:])
    tensors = load_file(workplace / "diverged" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    summary = read_json(workplace / "diverged" / "summary.json")
    assert "not finite" in summary["diverged"] and [row["stage"] for row in summary["stages"]] == ["raw", "calibrate"]


def test_the_adapter_is_there_before_anything_else_may_fail(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module, "make_image_grid", fail)
    flags = (*SHORT, "--validation_prompts", "a red circle", "--validation_steps", "99")
    with pytest.raises(SystemExit, match="no space left"):
        module.main(command(workplace, "unseen", *flags)[1:])
    load_adapter(tiny_pipeline(), workplace / "unseen")
    assert "gap closed" in (workplace / "unseen" / "README.md").read_text()
    assert read_json(workplace / "unseen" / "summary.json")["skipped_steps"] == 0


def test_what_is_not_finite_is_null_in_the_summary() -> None:
    module, nan = script(), float("nan")
    progress = Progress(gaps={"raw": Gap(1.0, nan, float("inf")), "calibrate": Gap(1.0, 2.0, 0.5)})
    summary = module.summarise(progress)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert module.table(summary).splitlines()[-2] == "| raw | - | - | - | 0 |"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distill_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
