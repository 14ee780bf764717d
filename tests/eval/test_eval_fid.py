"""The fid and statistics commands: parity through resizing, refusals, resuming, several processes."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flatten_eval.cli import main
from flatten_eval.features import featurise as featurise_module
from flatten_eval.features import load_extractor
from flatten_eval.features.featurise import featurise
from flatten_eval.images import open_images
from flatten_eval.processes import Processes

from .test_eval_resize import bicubic_matrix

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
Make = Callable[..., Path]
Run = Callable[..., dict[str, Any]]
Fail = Callable[..., tuple[int, str]]


def independent_frechet(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def cells(image: np.ndarray) -> np.ndarray:
    """The 3x3 average pool of conftest.FEATURES in numpy: cell i covers floor(i n / 3) to ceil((i + 1) n / 3)."""
    height, width, _ = image.shape
    bounds = [(i * n // 3, -(-(i + 1) * n // 3)) for n in (height, width) for i in range(3)]
    rows, columns = bounds[:3], bounds[3:]
    means = [[image[r0:r1, c0:c1].mean((0, 1)) for c0, c1 in columns] for r0, r1 in rows]
    return np.transpose(np.array(means), (2, 0, 1)).ravel() / 255


@pytest.mark.parametrize(("height", "width", "target"), [(256, 256, 64), (512, 512, 64), (200, 330, 64), (40, 24, 64)])
def test_parity_with_torchmetrics_and_float64_through_resizing(
    make_images: Make, features: Path, run_json: Run, height: int, width: int, target: int
) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed (extra test)")
    count = 40 if height < 500 else 12
    folders = [make_images("real", count, height, width, 1), make_images("fake", count, height, width, 2, shift=9)]
    extractor = f"{features}:cells"
    found = run_json("fid", *folders, "--extractor", extractor, "--resize", "clean", "--resize-to", target)
    rows, columns = bicubic_matrix(height, target), bicubic_matrix(width, target)
    resized: list[list[np.ndarray]] = []
    for folder in folders:
        pictures = [np.asarray(Image.open(path), np.float64) for path in sorted(folder.glob("*.png"))]
        # Pillow's float32 rounds differently from float64 only within 1e-5 of a half.
        floats = [rows @ picture.transpose(2, 0, 1) @ columns.T for picture in pictures]
        resized.append([np.rint(np.clip(picture, 0, 255)).astype(np.uint8).transpose(1, 2, 0) for picture in floats])
    expected = independent_frechet(*(np.stack([cells(picture) for picture in side]) for side in resized))
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-6)

    class Cells(torch.nn.Module):
        num_features = 27

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(images.double() / 255, 3).flatten(1)

    theirs = fid.FrechetInceptionDistance(feature=Cells(), input_img_size=(3, target, target))
    theirs.set_dtype(torch.float64)
    for side, real in zip(resized, (True, False), strict=True):
        theirs.update(torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2), real=real)
    assert found["frechet_distance"] == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert found["extractor"]["resize"] == "clean-64-uint8" and "fid" not in found


def test_every_number_of_a_run(make_images: Make, features: Path, run_json: Run) -> None:
    real, near, far = make_images("r", 60, seed=1), make_images("n", 60, seed=2), make_images("f", 50, seed=3, shift=40)
    found = run_json(
        "fid", real, near, "--baseline", far, "--extractor", f"{features}:cells",
        "--metrics", "kid", "prdc", "fid-infinity",
    )  # fmt: skip
    baseline = found["baseline"]
    assert (found["count"], baseline["count"], found["real"]["count"]) == (60, 50, 60)
    assert found["frechet_distance"] < baseline["frechet_distance"] / 3
    assert found["kid"] < baseline["kid"] and found["kid_std"] > 0 and found["frechet_infinity"] != 0
    assert found["precision"] > baseline["precision"] and found["coverage"] > baseline["coverage"]
    assert any("image counts differ (50, 60)" in warning for warning in found["warnings"])
    assert found["environment"]["versions"]["torch"] == torch.__version__
    reversed_run = run_json("fid", near, real, "--extractor", f"{features}:cells")
    assert reversed_run["frechet_distance"] == pytest.approx(found["frechet_distance"], rel=1e-9)


def test_distances_rank_damage_as_expected(make_images: Make, tmp_path: Path, run_json: Run) -> None:
    real = make_images("real", 48, 32, 32, seed=1)
    distances = []
    for strength in (0, 15, 40, 90):
        folder = tmp_path / f"noise{strength}"
        folder.mkdir()
        for index, path in enumerate(sorted(real.glob("*.png"))):
            picture = np.asarray(Image.open(path), np.float64)
            noise = np.random.default_rng(index).normal(-strength / 3, strength, picture.shape)
            Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8)).save(folder / path.name)
        distances.append(run_json("fid", real, folder, "--extractor", "pixels")["frechet_distance"])
    assert distances == sorted(distances) and distances[0] < 1e-9 < distances[1]


def test_zip_folder_and_statistics_agree(make_images: Make, features: Path, tmp_path: Path, run_json: Run) -> None:
    real, fake = make_images("real", 30, seed=1), make_images("fake", 30, seed=2)
    archive = tmp_path / "real.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(real.glob("*.png")):
            file.write(path, f"inside/{path.name}")
        file.writestr("__MACOSX/._0000.png", b"not an image")
    options = ("--extractor", f"{features}:cells")
    saved = tmp_path / "real.npz"
    assert run_json("statistics", real, saved, *options)["count"] == 30
    found = [run_json("fid", source, fake, *options)["frechet_distance"] for source in (real, archive, saved)]
    assert found[0] == found[1] == pytest.approx(found[2], rel=1e-12)


def test_statistics_of_another_extractor_or_resize_are_refused(
    make_images: Make, features: Path, tmp_path: Path, run_json: Run, run_error: Fail
) -> None:
    images, saved = make_images("real", 30), tmp_path / "s.npz"
    run_json("statistics", images, saved, "--extractor", f"{features}:cells")
    code, line = run_error("fid", saved, images, "--extractor", "pixels")
    assert code == 3 and "name is own_features:cells in one and pixels" in line
    code, line = run_error("fid", saved, images, "--extractor", f"{features}:cells", "--resize-to", 16)
    assert code == 3 and "resize is none in one and clean-16-uint8" in line
    features.write_text(features.read_text() + "\n# edited\n")
    code, line = run_error("fid", saved, images, "--extractor", f"{features}:cells")
    assert code == 3 and "weights_sha256" in line
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(5), sigma=np.eye(5))
    code, line = run_error("fid", tmp_path / "foreign.npz", images, "--extractor", f"{features}:cells")
    assert code == 3 and "5 and 27 dimensions" in line


def test_foreign_statistics_and_few_images_are_warned_about(
    make_images: Make, features: Path, tmp_path: Path, run_json: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_images("few", 10)
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(27), sigma=np.eye(27))
    found = run_json("fid", tmp_path / "foreign.npz", images, "--extractor", f"{features}:cells")
    assert any("does not say which extractor" in warning for warning in found["warnings"])
    assert any("10 images for 27 features" in warning for warning in found["warnings"])
    assert "warning: " in capsys.readouterr().out


@pytest.mark.parametrize("function", ["poisoned", "integers", "failing", "absent"])
def test_bad_extractors_are_one_line(make_images: Make, features: Path, run_error: Fail, function: str) -> None:
    images = make_images("a", 4)
    code, line = run_error("fid", images, images, "--extractor", f"{features}:{function}")
    expected = {
        "poisoned": "NaN or infinite", "integers": "needs float", "failing": "RuntimeError: no such layer",
        "absent": "has no function absent",
    }  # fmt: skip
    assert code == 2 and expected[function] in line


def test_wrong_inputs_are_one_line(make_images: Make, features: Path, tmp_path: Path, run_error: Fail) -> None:
    images = make_images("a", 6)
    own = ("--extractor", f"{features}:cells")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    broken = shutil.copytree(images, tmp_path / "broken")
    (broken / "0001.png").write_text("not an image")
    truncated = shutil.copytree(images, tmp_path / "truncated")
    for name in ("0002.png", "0004.png"):
        data = (truncated / name).read_bytes()
        (truncated / name).write_bytes(data[: len(data) // 2])
    mixed = shutil.copytree(images, tmp_path / "mixed")
    Image.new("RGB", (9, 8)).save(mixed / "other.png")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "absent", images, *own), "does not exist"),
        ((tmp_path / "absent.npz", images, *own), "does not exist"),
        ((tmp_path / "empty", images, *own), "no images"),
        ((tmp_path / "file.txt", images, *own), "neither a folder, a zip file"),
        ((broken, images, *own), "1 of 6 images cannot be read: 0001.png"),
        ((images, truncated, *own), "2 of 6 images cannot be read: 0002.png, 0004.png"),
        ((images, mixed, *own), "mixed image sizes (9x8, 28x20); give --resize-to"),
        ((images, images, "--extractor", "nonsense"), "unknown extractor"),
        ((images, images, "--extractor", tmp_path / "file.txt"), "not a TorchScript file"),
        ((images, images, "--extractor", "no_such_module:f"), "cannot be imported"),
        ((images, images, "--extractor", "inception"), "--offline is set"),
        ((images, images, "--extractor", "inception", "--weights", tmp_path / "w.pth"), "no such weights file"),
        ((images, images, "--extractor", "dinov2", "--model", tmp_path / "empty"), "cannot be loaded as a dinov2"),
        ((images, images, "--extractor", "clip", "--model", "nobody/nothing"), "--offline is set"),
        ((images, images, *own, "--model", "x"), "--model belongs to"),
        ((images, images, *own, "--weights", "x"), "--weights belongs to"),
        ((images, images, *own, "--max-images", 7), "6 images, 7 asked for"),
        ((images, images, *own, "--metrics", "clip-score", "--captions", "no"), "no such captions file"),
    ]
    for arguments, message in cases:
        code, line = run_error("fid", *arguments)
        assert code == 2 and message in line, (arguments, line)


def test_statistics_give_no_kid(
    make_images: Make, features: Path, tmp_path: Path, run_json: Run, run_error: Fail
) -> None:
    images, saved = make_images("a", 30), tmp_path / "s.npz"
    run_json("statistics", images, saved, "--extractor", f"{features}:cells")
    code, line = run_error("fid", saved, images, "--extractor", f"{features}:cells", "--metrics", "kid")
    assert code == 2 and "saved statistics cannot give kid" in line
    code, line = run_error("statistics", images, tmp_path / "s.txt", "--extractor", f"{features}:cells")
    assert code == 2 and "written as .npz" in line


def test_no_disk_space_is_known_before_the_run(
    make_images: Make, features: Path, tmp_path: Path, run_error: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(100, 99, 1))
    target = tmp_path / "deep" / "s.npz"
    code, line = run_error("statistics", make_images("a", 3), target, "--extractor", f"{features}:cells")
    assert code == 2 and "not enough disk space" in line and not target.parent.exists()


def test_a_device_that_is_not_there_is_one_line(make_images: Make, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    images = str(make_images("a", 3))
    assert main(["fid", images, images, "--extractor", "pixels", "--device", "cuda:7"]) == 2
    assert "--device cuda:7: not available" in capsys.readouterr().err


def test_torchscript_extractor(make_images: Make, features: Path, tmp_path: Path, run_json: Run) -> None:
    class Cells(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(images.double() / 255, 3).flatten(1).float()

    torch.jit.script(Cells()).save(str(tmp_path / "cells.pt"))
    a, b = make_images("a", 30, seed=1), make_images("b", 30, seed=2)
    found = [
        run_json("fid", a, b, "--extractor", name)["frechet_distance"]
        for name in (tmp_path / "cells.pt", f"{features}:cells")
    ]
    assert found[0] == found[1]


def test_dinov2_and_clip(make_images: Make, tiny_dinov2: Path, tiny_clip: Path, run_json: Run) -> None:
    a, b = make_images("a", 20, seed=1), make_images("b", 20, seed=2, shift=30)
    for folder in (a, b):
        rows = [{"file_name": path.name, "text": f"image {path.stem}"} for path in sorted(folder.glob("*.png"))]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = run_json(
        "fid", a, b, "--extractor", "dinov2", "--model", tiny_dinov2, "--metrics", "cmmd", "clip-score",
        "--clip-model", tiny_clip,
    )  # fmt: skip
    assert found["extractor"]["resize"] == "clean-224" and len(found["extractor"]["weights_sha256"]) == 64
    assert found["cmmd"] > 0 and 0 <= found["clip_score"] <= 100 and found["frechet_distance"] > 0
    clip = run_json("fid", a, b, "--extractor", "clip", "--model", tiny_clip, "--metrics", "cmmd")
    assert clip["cmmd"] == pytest.approx(found["cmmd"], rel=1e-6)
    rows = load_extractor("clip", device=CPU, model=str(tiny_clip)).extract(torch.rand(2, 3, 24, 24) * 255)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))


def test_clip_score_needs_captions(make_images: Make, tiny_clip: Path, run_error: Fail) -> None:
    images = make_images("a", 6)
    code, line = run_error("fid", images, images, "--extractor", "pixels", "--metrics", "clip-score",
                           "--clip-model", tiny_clip)  # fmt: skip
    assert code == 2 and "6 of 6 images have no caption" in line


@pytest.mark.parametrize("keep", [False, True])
def test_an_interrupted_pass_continues_where_it_stopped(
    make_images: Make, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    images = open_images(make_images("a", 23))
    extractor = load_extractor(f"{features}:cells", device=CPU)
    plain = featurise(images, extractor, ALONE, batch_size=4, keep_features=keep)
    monkeypatch.setattr(featurise_module, "SAVE_SECONDS", -1.0)
    calls: list[int] = []

    class Stopping:
        identity, needs_one_size, crops = extractor.identity, extractor.needs_one_size, None
        prepare = staticmethod(extractor.prepare)
        limit = 3

        def extract(self, batch: torch.Tensor) -> torch.Tensor:
            if len(calls) == self.limit:
                raise KeyboardInterrupt
            calls.append(len(batch))
            return extractor.extract(batch)

    stopping = Stopping()
    arguments: dict[str, Any] = {"batch_size": 4, "keep_features": keep, "resume_folder": tmp_path / "unfinished"}
    with pytest.raises(KeyboardInterrupt):
        featurise(images, stopping, ALONE, **arguments)
    stopping.limit = 99
    resumed = featurise(images, stopping, ALONE, **arguments)
    assert calls == [4, 4, 4, 4, 4, 3]
    assert torch.equal(resumed.moments.covariance(), plain.moments.covariance())
    if keep:
        assert resumed.features is not None and torch.equal(resumed.features, plain.features)
    assert list((tmp_path / "unfinished").iterdir()) == []


def test_a_damaged_or_foreign_checkpoint_is_never_used(
    make_images: Make, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_images("a", 9)
    extractor = load_extractor(f"{features}:cells", device=CPU)
    path = featurise_module._checkpoint_path(tmp_path, open_images(folder), extractor, ALONE, 4, False)
    assert path is not None
    path.write_bytes(b"half")
    plain = featurise(open_images(folder), extractor, ALONE, batch_size=4)
    assert torch.equal(
        featurise(open_images(folder), extractor, ALONE, batch_size=4, resume_folder=tmp_path).moments.covariance(),
        plain.moments.covariance(),
    )
    Image.new("RGB", (28, 20)).save(folder / "0003.png")
    changed = featurise_module._checkpoint_path(tmp_path, open_images(folder), extractor, ALONE, 4, False)
    assert changed != path


def test_two_processes_give_the_same_numbers_bit_for_bit(
    make_images: Make, features: Path, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    a, b = make_images("a", 41, seed=1), make_images("b", 50, seed=2)
    results = []
    for processes in (1, 2):
        target = tmp_path / f"{processes}.json"
        done = launch(
            "fid", a, b, "--extractor", f"{features}:cells", "--metrics", "kid", "--batch-size", 8, "--device", "cpu",
            "--json", target, processes=processes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("real:") == 1
        results.append(json.loads(target.read_text()))
    for key in ("frechet_distance", "kid", "kid_std", "count"):
        assert results[0][key] == results[1][key]


def test_json_can_be_printed_and_images_keep_orientation_and_alpha(
    make_images: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flatten_eval.images import ImageReader

    images = str(make_images("a", 5))
    assert main(["fid", images, images, "--extractor", "pixels", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frechet_distance"] == pytest.approx(0, abs=1e-12)
    folder = tmp_path / "odd"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), (10, 20, 30)).save(folder / "a.jpg", exif=exif)
    Image.new("RGBA", (8, 4), (0, 0, 0, 0)).save(folder / "b.png")
    Image.fromarray(np.full((4, 8), 65535, np.uint16)).save(folder / "c.png")
    Image.fromarray(np.full((4, 8), 257 * 100, np.uint16)).save(folder / "d.png")
    with ImageReader(open_images(folder)) as reader:
        assert reader.size("a.jpg") == (4, 8) and reader.pixels("a.jpg").shape == (8, 4, 3)
        assert reader.pixels("b.png").min() == 255 and reader.pixels("c.png").min() == 255
        assert reader.pixels("d.png").min() == reader.pixels("d.png").max() == 100


def test_no_argument_mistakes_reach_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["fid"], ["nothing"], ["fid", "a", "b", "--batch-size", "0"], ["fid", "a", "b", "--resize", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
    capsys.readouterr()
