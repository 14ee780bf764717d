"""Runs the interpreted cases in processes of their own: triton reads TRITON_INTERPRET when a kernel is defined."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton, whose interpreter runs the kernels without a GPU, is not installed")

CASES = ["interpreted_triton.py", "interpreted_windows.py"]


@pytest.mark.parametrize("name", CASES)
def test_kernels_under_the_interpreter(name):
    cases = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cases.parents[2])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
