from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flatten_eval.errors import InputError
from flatten_eval.metrics import paired
from flatten_eval.metrics.paired import load_lpips, measure_pairs, psnr, require_torchmetrics, ssim, summarise

from .pieces import draw


def noisy(picture: np.ndarray, strength: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, strength, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def test_psnr_matches_the_definition() -> None:
    x = draw(0, 37, 53)
    y = noisy(x, 20)
    error = np.mean((x.astype(float) - y.astype(float)) ** 2)
    assert psnr(x, y) == pytest.approx(10 * np.log10(255**2 / error), rel=1e-10)


def test_ssim_matches_the_definition_window_by_window() -> None:
    x = draw(1, 13, 12)
    y = noisy(x, 30)
    axis = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(axis, axis) / np.outer(axis, axis).sum()
    values = []
    for channel in range(3):
        for row in range(3):
            for column in range(2):
                p, q = (z[row : row + 11, column : column + 11, channel].astype(float) for z in (x, y))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                c = (window * (p - mp) * (q - mq)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * mp * mq + c1) * (2 * c + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(x, y) == pytest.approx(np.mean(values), rel=1e-10)


def test_identical_and_too_small() -> None:
    x = draw(0, 20, 20)
    assert psnr(x, x) == math.inf and ssim(x, x) == pytest.approx(1, abs=1e-12)
    with pytest.raises(InputError, match="at least 11x11"):
        ssim(x[:10], x[:10])


def test_pairs_of_folders(make_images: Callable[..., Path], tmp_path: Path) -> None:
    original = make_images("original", 3)
    other = shutil.copytree(original, tmp_path / "other")
    picture = np.asarray(Image.open(other / "0001.png"))
    Image.fromarray(noisy(picture, 40)).save(other / "0001.png")
    pairs = measure_pairs(original, other)
    assert [math.isinf(pair.psnr) for pair in pairs] == [True, False, True]
    found = summarise(pairs, "absent")
    assert found["identical_pairs"] == 2 and found["psnr"] == pairs[1].psnr
    assert found["lpips"] is None and found["lpips_not_available"] == "absent"
    measured = measure_pairs(original, other, lambda a, b: 0.25)
    assert summarise(measured, None)["lpips"] == 0.25
    Image.new("RGB", (28, 21)).save(other / "0002.png")
    with pytest.raises(InputError, match="0002.png: 28x20 in .* but 28x21"):
        measure_pairs(original, other)
    (other / "0002.png").unlink()
    with pytest.raises(InputError, match="1 images have no partner .*0002.png"):
        measure_pairs(original, other)


def test_what_is_missing_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(InputError, match="needs torchmetrics; install the eval extra"):
        require_torchmetrics()


def test_lpips_says_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    measure, reason = load_lpips(torch.device("cpu"), offline=False)
    assert measure is None and reason is not None and "cannot be imported" in reason
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "--offline" in str(load_lpips(torch.device("cpu"), offline=True)[1])


def test_ssim_in_strips_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(2, 75, 33)
    y = noisy(x, 25)
    whole = ssim(x, y)
    for strip in (1, 7, 65):
        monkeypatch.setattr(paired, "_STRIP", strip)
        assert ssim(x, y) == pytest.approx(whole, rel=1e-12)
