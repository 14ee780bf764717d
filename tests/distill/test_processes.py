"""Two CPU processes against one: the same losses, and the same adapter up to the order of a sum."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .test_script import ROOT, SCRIPT, command
from .tiny import CAPTIONS, tiny_pipeline


def launch(folder: Path, output: str, processes: int, batch: int) -> Path:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    flags = command(folder, output, "--train_batch_size", str(batch), "--num_eval_samples", "4")[1:]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *flags], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / output


@pytest.mark.compatibility("DDP", "works", "`examples/distill.py` under torchrun gives the curve of one process")
def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS * 3))
    one, two = launch(tmp_path, "one", 1, 4), launch(tmp_path, "two", 2, 2)
    curves = [
        [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()] for folder in (one, two)
    ]
    assert len(curves[0]) == len(curves[1]) == 16
    for alone, together in zip(*curves, strict=True):
        assert together.pop("stage") == alone.pop("stage")
        assert together == pytest.approx(alone, rel=1e-3)
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], rtol=1e-2, atol=1e-3), name
