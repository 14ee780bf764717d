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

import pytest
import torch
from safetensors.torch import load_file

from flatten_diffusion import load_adapter
from flatten_diffusion.distill.checkpoint import list_checkpoints

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
        (["--prompts", "nowhere.txt"], "nowhere.txt is no file"),
        (["--train_data_dir", "/nowhere"], "pass one of"),
        (["--stages", "calibrate,anneal"], "Unknown stage anneal"),
        (["--rank", "-1"], "--rank must be at least 0"),
        (["--caption_dropout", "3"], "caption_dropout is 3.0"),
        (["--window", "1"], "window is 1"),
        (["--kernel_size", "4"], "kernel_size is 4"),
    ],
)
def test_wrong_flags_are_one_line_before_anything_is_loaded(
    workplace: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script().main(command(workplace, "bad", *flags)[1:])
    assert stopped.value.code not in (0, None)
    lines = [*capsys.readouterr().err.strip().splitlines(), str(stopped.value.code)]
    assert any(message in line for line in lines[-2:])
    assert not (workplace / "bad").exists()


def test_a_resolution_that_does_not_fit(workplace: Path) -> None:
    with pytest.raises(SystemExit, match="multiples of 8"):
        script().main(command(workplace, "bad", "--resolution", "36")[1:])


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distill_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
