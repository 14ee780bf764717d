"""Images and child processes for the tests of this room."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]


def draw(seed: int, height: int, width: int, shift: float = 0.0) -> np.ndarray[Any, Any]:
    """A smooth image with fine noise: resizing it without care changes it."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(6 * (rows * random.normal() + columns * random.normal()) + random.uniform(0, 6)) for _ in range(3)]
    picture = 128 + shift + 70 * np.stack(waves, -1) + random.normal(0, 12, (height, width, 3))
    return np.rint(picture.clip(0, 255)).astype(np.uint8)


def command_line(*arguments: object, processes: int = 1) -> list[str]:
    own = [sys.executable, "-m"]
    if processes > 1:
        own += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return [*own, "flatten_eval", *map(str, arguments)]


def child_environment() -> dict[str, str]:
    # The same number of threads as here: it decides how sums are grouped, and with it the last bits of an image.
    threads = str(torch.get_num_threads())
    return os.environ | {
        "OMP_NUM_THREADS": threads,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'eval'}",
        "TQDM_DISABLE": "1",
    }
