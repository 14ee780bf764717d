"""Crops of large pictures: the same numbers as from pictures cut beforehand, and never mixed with whole ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flatten_eval.features import CropRequest, Crops, cropped, load_extractor
from flatten_eval.features import featurise as featurise_module
from flatten_eval.features.featurise import featurise
from flatten_eval.features.resize import resize
from flatten_eval.images import open_images
from flatten_eval.metrics.statistics import load_statistics
from flatten_eval.processes import Processes

from .pieces import draw
from .test_eval_fid import cells, independent_frechet

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
Make = Callable[..., Path]
Run = Callable[..., dict[str, Any]]
Fail = Callable[..., tuple[int, str]]


def opened(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def saved(folder: Path, crops: dict[str, list[np.ndarray[Any, Any]]]) -> Path:
    folder.mkdir()
    for name, pieces in crops.items():
        for index, piece in enumerate(pieces):
            Image.fromarray(piece).save(folder / f"{Path(name).stem}-{index:02d}.png")
    return folder


def test_random_places_are_inside_and_those_of_the_name_and_seed() -> None:
    crops = Crops(9, 400)
    places = crops.places("below/0001.png", 12, 30)
    assert len(places) == 400 == crops.number(12, 30)
    tops, lefts = ({place[side] for place in places} for side in (0, 1))
    assert tops == set(range(4)) and lefts == set(range(22))  # every place, to the last row and column
    assert places == crops.places("below/0001.jpg", 12, 30)
    for other in (crops.places("below/0002.png", 12, 30), Crops(9, 400, seed=1).places("below/0001.png", 12, 30)):
        assert other != places
    pixels = draw(0, 12, 30)
    for (top, left), piece in zip(places, crops.cut("below/0001.png", pixels), strict=True):
        assert np.array_equal(piece, pixels[top : top + 9, left : left + 9])


def test_the_grid_holds_all_whole_crops_centred() -> None:
    crops = Crops(8, None)
    assert crops.places("a.png", 18, 25) == [(1, 0), (1, 8), (1, 16), (9, 0), (9, 8), (9, 16)]
    assert crops.number(18, 25) == 6 and crops.number(8, 8) == 1
    pixels = draw(0, 16, 24)
    pieces = crops.cut("a.png", pixels)
    assert np.array_equal(np.concatenate([np.concatenate(pieces[:3], 1), np.concatenate(pieces[3:], 1)]), pixels)


@pytest.mark.parametrize("mode", ["clean", "legacy", "legacy-pytorch"])
def test_a_crop_of_the_input_size_is_not_resized(mode: Any) -> None:
    piece = Crops(299, 1).cut("a", draw(0, 400, 311))[0]
    assert np.array_equal(resize(piece, 299, 299, mode).numpy(), piece.transpose(2, 0, 1).astype(np.float32))


def test_distance_of_a_grid_against_numpy(make_images: Make, features: Path, run_json: Run) -> None:
    real, fake = make_images("real", 24, 26, 34, seed=1), make_images("fake", 24, 26, 34, seed=2, shift=20)
    found = run_json("fid", real, fake, "--extractor", f"{features}:cells", "--crops", "grid", "--crop_size", 12)
    rows = [
        np.stack([
            cells(picture[top : top + 12, left : left + 12])
            for picture in opened(folder).values()
            for top in (1, 13)
            for left in (5, 17)
        ])
        for folder in (real, fake)
    ]  # fmt: skip
    assert found["crop_frechet_distance"] == pytest.approx(independent_frechet(*rows), rel=1e-6)
    assert (found["count"], found["crop_count"], found["real"]["crop_count"]) == (24, 96, 96)
    assert found["extractor"]["crops"] == "grid-12"
    whole = run_json("fid", real, fake, "--extractor", f"{features}:cells")
    assert not {key for key in whole if key.startswith("crop")} | {
        key for key in found if key in ("fid", "frechet_distance")
    }
    assert "crops" not in whole["extractor"]


def test_every_number_is_that_of_pictures_cut_beforehand(
    make_images: Make, features: Path, tmp_path: Path, run_json: Run
) -> None:
    folders = [make_images("real", 12, 30, 40, seed=1), make_images("fake", 12, 36, 30, seed=2, shift=25)]
    crops = Crops(16, 5, seed=3)
    beforehand = [
        saved(
            tmp_path / f"cut-{folder.name}", {name: crops.cut(name, pixels) for name, pixels in opened(folder).items()}
        )
        for folder in folders
    ]
    options = ("--extractor", f"{features}:cells", "--metrics", "kid", "prdc", "fid-infinity", "--seed", 3)
    expected = run_json("fid", *beforehand, *options)
    for batch_size in (1, 7, 32):
        cut = ("--crops", 5, "--crop-size", 16, "--batch-size", batch_size)
        found = run_json("fid", *folders, "--baseline", folders[0], *options, *cut)
        for key in ("frechet_distance", "kid", "kid_std", "precision", "coverage", "frechet_infinity"):
            assert found[f"crop_{key}"] == pytest.approx(expected[key], rel=1e-9) and key not in found
        assert found["baseline"]["crop_frechet_distance"] == pytest.approx(0, abs=1e-9)


def test_clip_score_of_crops_by_hand(make_images: Make, tiny_clip: Path, tmp_path: Path, run_json: Run) -> None:
    """A grid over pictures of two sizes: each crop is held against the caption of its own picture."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = make_images("a", 3, 30, 50)
    Image.fromarray(draw(9, 49, 48)).save(folder / "0001.png")
    captions = {name: f"picture {index}" for index, name in enumerate(opened(folder))}
    rows = [{"file_name": name, "text": text} for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = run_json(
        "fid", folder, folder, "--extractor", "pixels", "--crops", "grid", "--crop-size", 24, "--metrics", "clip-score",
        "cmmd", "--clip-model", tiny_clip,
    )  # fmt: skip
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPTokenizer.from_pretrained(tiny_clip)
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    scores = []
    places = {"0000.png": [(3, 1), (3, 25)], "0001.png": [(0, 0), (0, 24), (24, 0), (24, 24)]}
    places["0002.png"] = places["0000.png"]
    with torch.inference_mode():
        for name, picture in opened(folder).items():
            text = model.text_projection(
                model.text_model(**tokenizer([captions[name]], return_tensors="pt")).pooler_output
            )[0]
            for top, left in places[name]:
                pixels = (picture[top : top + 24, left : left + 24] / 255 - mean) / deviation
                batch = torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float()
                image = model.visual_projection(model.vision_model(pixel_values=batch).pooler_output)[0]
                cosine = float(image @ text) / float(image.norm() * text.norm())
                scores.append(100 * max(cosine, 0))
    assert len(scores) == 8 == found["crop_count"]
    assert found["crop_clip_score"] == pytest.approx(np.mean(scores), rel=1e-4, abs=1e-4)
    assert found["clip"]["crops"] == "grid-24" and found["crop_cmmd"] == pytest.approx(0, abs=1e-9)
    clip = run_json("fid", folder, folder, "--extractor", "clip", "--model", tiny_clip, "--crops", "grid",
                    "--metrics", "clip-score")  # fmt: skip
    assert clip["extractor"]["crops"] == "grid-24"  # its own input size
    assert clip["crop_clip_score"] == pytest.approx(found["crop_clip_score"], rel=1e-6)


def test_other_crops_are_refused(
    make_images: Make, features: Path, tmp_path: Path, run_json: Run, run_error: Fail
) -> None:
    images, own = make_images("a", 12), ("--extractor", f"{features}:cells")
    cut = (*own, "--crops", 3, "--crop-size", 12)
    of_crops, of_whole = tmp_path / "crops.npz", tmp_path / "whole.npz"
    made = run_json("statistics", images, of_crops, *cut)
    assert (made["count"], made["crop_count"]) == (12, 36) and made["extractor"]["crops"] == "random-3-12-seed-0"
    run_json("statistics", images, of_whole, *own)
    assert load_statistics(of_crops).pictures == 12
    with np.load(of_crops) as first, np.load(of_whole) as second:
        assert (int(first["format"]), int(second["format"])) == (2, 1) and "pictures" not in second
    found = run_json("fid", of_crops, images, *cut)
    assert found["crop_frechet_distance"] == pytest.approx(0, abs=1e-9) and found["real"]["count"] == 12
    for source, options, message in (
        (of_crops, own, "crops is random-3-12-seed-0 in one and none, whole pictures, in the other"),
        (of_whole, cut, "crops is none, whole pictures, in one and random-3-12-seed-0 in the other"),
        (of_crops, (*cut, "--crops", 4), "random-4-12-seed-0"),
        (of_crops, (*cut, "--crops", "grid"), "grid-12"),
        (of_crops, (*cut, "--crop-size", 11), "random-3-11-seed-0"),
        (of_crops, (*cut, "--seed", 1), "random-3-12-seed-1"),
    ):
        code, line = run_error("fid", source, images, *options)
        assert code == 3 and "not comparable" in line and message in line, line
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(27), sigma=np.eye(27))
    code, line = run_error("fid", tmp_path / "foreign.npz", images, *cut)
    assert code == 3 and "does not say that it was made of crops" in line


def test_crops_that_cannot_be_are_one_line(
    make_images: Make, tiny_dinov2: Path, tmp_path: Path, run_error: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    images, large = make_images("a", 4), make_images("large", 4, 300, 240)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((images, images, "--extractor", "pixels", "--crops", 2), "the pixels extractor has no input size"),
        ((images, images, "--extractor", "pixels", "--crop-size", 9), "--crop-size needs --crops"),
        ((images, images, "--extractor", "pixels", "--crops", 2, "--crop-size", 21), "smaller than crops of 21x21"),
        ((large, images, "--extractor", "dinov2", "--model", tiny_dinov2, "--crops", "grid"), "a: pictures of 28x20"),
    ]  # fmt: skip
    for arguments, message in cases:
        code, line = run_error("fid", *arguments)
        assert code == 2 and message in line, line
    code, line = run_error(
        "statistics", images, tmp_path / "s.npz", "--extractor", "pixels", "--crops", 2, "--crop-size", 99
    )
    assert code == 2 and "smaller than crops" in line and not (tmp_path / "s.npz").exists()
    for wrong in ("0", "all", "-3", "1.5"):
        with pytest.raises(SystemExit) as stop:
            run_error("fid", images, images, "--extractor", "pixels", "--crops", wrong)
        assert stop.value.code == 2 and "argument --crops" in capsys.readouterr().err


def test_unfinished_passes_of_other_crops_do_not_collide(make_images: Make, features: Path, tmp_path: Path) -> None:
    images = open_images(make_images("a", 5))
    whole = load_extractor(f"{features}:cells", device=CPU)
    requests = [
        CropRequest(3, 12),
        CropRequest(4, 12),
        CropRequest(3, 13),
        CropRequest(3, 12, 1),
        CropRequest(None, 12),
    ]
    paths = {
        featurise_module._checkpoint_path(tmp_path, images, extractor, ALONE, 4, False)
        for extractor in (whole, *(cropped(whole, request) for request in requests))
    }
    assert len(paths) == 6 and whole.crops is None and whole.identity.crops == ""


@pytest.mark.parametrize("count", [3, None])
def test_an_interrupted_pass_over_crops_continues(
    make_images: Make, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int | None
) -> None:
    images = open_images(make_images("a", 7))
    extractor = cropped(load_extractor(f"{features}:cells", device=CPU), CropRequest(count, 9))
    plain = featurise(images, extractor, ALONE, batch_size=6, keep_features=True)
    monkeypatch.setattr(featurise_module, "SAVE_SECONDS", -1.0)
    extract, calls = extractor.extract, []

    def stopping(batch: torch.Tensor) -> torch.Tensor:
        if len(calls) == 2:
            calls.append(0)
            raise KeyboardInterrupt
        calls.append(len(batch))
        return extract(batch)

    monkeypatch.setattr(extractor, "extract", stopping)
    how: dict[str, Any] = {"batch_size": 6, "keep_features": True, "resume_folder": tmp_path / "unfinished"}
    with pytest.raises(KeyboardInterrupt):
        featurise(images, extractor, ALONE, **how)
    resumed = featurise(images, extractor, ALONE, **how)
    assert sum(calls) == 7 * extractor.crops.number(20, 28) and max(calls) <= 6
    assert resumed.features is not None and torch.equal(resumed.features, plain.features)
    assert torch.equal(resumed.moments.covariance(), plain.moments.covariance())
