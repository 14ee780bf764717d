from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from flatten_eval.errors import InputError
from flatten_eval.features import ExtractorIdentity
from flatten_eval.metrics.statistics import FORMAT, Moments, Statistics, load_statistics, save_statistics

IDENTITY = ExtractorIdentity("own", "ab" * 32, "clean-299", "v")


def moments_of(*blocks: torch.Tensor) -> Moments:
    moments = Moments(blocks[0].shape[1])
    for block in blocks:
        moments.update(block)
    return moments


def test_mean_and_covariance_match_numpy() -> None:
    rows = torch.randn(257, 13, dtype=torch.float64) * 5 + 100
    moments = moments_of(*rows.split(32))
    np.testing.assert_allclose(moments.mean(), rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance(), np.cov(rows.numpy(), rowvar=False), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_merging_is_exact_whatever_the_split(world: int) -> None:
    torch.manual_seed(world)
    blocks = list((torch.randn(997, 24) * torch.logspace(-6, 6, 24)).split(16))
    whole = moments_of(*blocks)
    merged = Moments(24)
    for rank in reversed(range(world)):
        merged.merge(moments_of(*blocks[rank::world]))
    assert merged.count == whole.count == 997
    assert torch.equal(merged.mean(), whole.mean())
    assert torch.equal(merged.covariance(), whole.covariance())


def test_sums_keep_what_plain_float64_loses() -> None:
    blocks = [torch.tensor([[1e16]]), *[torch.tensor([[1.0]])] * 10, torch.tensor([[-1e16]])]
    blocks = [block.double() for block in blocks]
    assert float(moments_of(*blocks).mean()) == 10.0 / 12


@pytest.mark.parametrize("size", [1, 7, 32])
def test_a_large_mean_cancels_nothing(size: int) -> None:
    """At a mean of 1e6 and deviations of 1, sums of products lose 0.6 % of the covariance."""
    torch.manual_seed(0)
    rows = torch.randn(300, 6, dtype=torch.float64)
    far = (rows + 1e6) - 1e6  # as precise as such rows can be
    moments = moments_of(*(far + 1e6).split(size))
    np.testing.assert_allclose(moments.covariance(), np.cov(far.numpy(), rowvar=False), rtol=1e-9, atol=1e-10)


def test_a_single_image_has_no_covariance() -> None:
    with pytest.raises(InputError, match="at least 2"):
        moments_of(torch.ones(1, 3)).covariance()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_features_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="NaN or infinite"):
        moments_of(torch.tensor([[1.0, bad]]))


def test_saved_statistics_come_back_whole_and_read_as_pytorch_fid_does(tmp_path: Path) -> None:
    moments = moments_of(torch.randn(9, 4))
    path = tmp_path / "deep" / "s.npz"
    save_statistics(path, Statistics(moments.mean(), moments.covariance(), 9, IDENTITY, "x"))
    loaded = load_statistics(path)
    assert loaded.count == 9 and loaded.identity == IDENTITY
    assert torch.equal(loaded.mean, moments.mean()) and torch.equal(loaded.covariance, moments.covariance())
    with np.load(path) as archive:
        assert archive["mu"].shape == (4,) and archive["sigma"].shape == (4, 4)
    assert [file.name for file in path.parent.iterdir()] == ["s.npz"]


def test_foreign_statistics_say_so(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32))
    loaded = load_statistics(tmp_path / "f.npz")
    assert loaded.identity is None and loaded.count is None and loaded.mean.dtype == torch.float64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "needs arrays mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "do not fit"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "not finite"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "format": np.array(FORMAT + 1)}, "newer version"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(1)}, "not readable"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "no covariance"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.4, 1.0]])}, "no covariance"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [2.0, 1.0]])}, "no covariance"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "do not fit"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "extractor": np.array('{"name": 5}')}, "which extractor"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "extractor": np.array("[" * 100_000)}, "nested too deep"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "count": np.zeros(3)}, "not readable"),
        ({"mu": np.array(["x"]), "sigma": np.eye(1)}, "not readable"),
    ],
)
def test_bad_statistics_are_one_line(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_statistics(tmp_path / "bad.npz")


def test_truncated_statistics_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    save_statistics(path, Statistics(torch.zeros(30), torch.eye(30).double(), 9, IDENTITY, "x"))
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    with pytest.raises(InputError, match="not readable"):
        load_statistics(path)
    for index in range(0, len(whole), 97):  # a byte anywhere: read, or one line
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 0x5A]) + whole[index + 1 :])
        with contextlib.suppress(InputError):
            load_statistics(path)


def test_a_covariance_of_few_images_in_float32_is_one(tmp_path: Path) -> None:
    rows = torch.randn(20, 60)
    sigma = np.cov(rows.numpy(), rowvar=False).astype(np.float32)
    np.savez(tmp_path / "few.npz", mu=rows.mean(0).numpy(), sigma=sigma)
    assert load_statistics(tmp_path / "few.npz").covariance.shape == (60, 60)
