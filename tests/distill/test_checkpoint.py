from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging

from flatten_diffusion.distill.checkpoint import list_checkpoints, load_checkpoint, load_latest, save_checkpoint
from flatten_diffusion.files import atomic_path


def save(folder: Path, step: int, limit: int | None = None) -> Path:
    return save_checkpoint(folder, step, {"x": torch.full((3,), float(step)), "n": torch.tensor(2)}, {"s": step}, limit)


def test_round_trip_and_rotation(tmp_path: Path) -> None:
    for step in (2, 10, 9, 11):
        save(tmp_path, step, limit=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    latest = load_latest(tmp_path)
    assert latest is not None and latest.state == {"s": 11}
    assert torch.equal(latest.tensors["x"], torch.full((3,), 11.0)) and latest.tensors["n"].item() == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "state", "empty", "remove"])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / "state.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(data[:-5])
    elif damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "state":  # what is no tensor is in the checksum too
        file.write_bytes(bytes(data).replace(b'\\"s\\": 2', b'\\"s\\": 3'))
        assert file.read_bytes() != data
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    logging.enable_propagation()
    try:
        latest = load_latest(tmp_path)
    finally:
        logging.disable_propagation()
    assert latest is not None and latest.state == {"s": 1}
    assert "checkpoint-2" in caplog.text and "Falling back" in caplog.text
    with pytest.raises(OSError, match="damaged"):
        load_checkpoint(tmp_path / "checkpoint-2")


def test_left_overs_of_a_killed_save_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_latest(tmp_path) is None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: gone.pid)
        killed = atomic_path(tmp_path / "checkpoint-5", folder=True)  # kept, so that nothing cleans up after it
        killed.__enter__()
    (tmp_path / "checkpoint-final").mkdir()
    assert len(list(tmp_path.glob(".checkpoint-5*"))) == 1 and load_latest(tmp_path) is None
    save(tmp_path, 1)
    assert not list(tmp_path.glob(".*"))


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 4)
    save_checkpoint(tmp_path, 4, {"x": torch.zeros(1)}, {"again": True}, 2)
    latest = load_latest(tmp_path)
    assert latest is not None and latest.state == {"again": True}
