"""The teacher command: each distance against a computation by hand, and sets that do not pair up."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flatten_eval.errors import InputError
from flatten_eval.metrics.paired import load_lpips
from flatten_eval.metrics.perceptual import SMALLEST, Lpips, LpipsMeasure

from .pieces import draw
from .test_eval_fid import cells, independent_frechet

CPU = torch.device("cpu")
Make = Callable[..., Path]
Run = Callable[..., dict[str, Any]]
Fail = Callable[..., tuple[int, str]]
IMAGENET = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
CLIP = (np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711]))


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network of DINO's class."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(3)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    folder = tmp_path_factory.mktemp("vit")
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the layers LPIPS uses, called as in torchvision's alexnet."""
    torch.manual_seed(4)
    state = {key: tensor for key, tensor in Lpips().state_dict().items() if key.startswith("features.")}
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(state | {"classifier.1.weight": torch.zeros(2, 2)}, path)
    return path


def two_sets(make_images: Make, height: int = 32, width: int = 40) -> tuple[Path, Path]:
    return make_images("original", 5, height, width, seed=1), make_images("converted", 5, height, width, seed=2)


def opened(folder: Path) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


def scaled(picture: np.ndarray[Any, Any], constants: tuple[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(((picture / 255 - constants[0]) / constants[1]).transpose(2, 0, 1)[None]).float()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    a, b = one.double().numpy().ravel(), other.double().numpy().ravel()
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def test_clip_i_and_dino_are_cosines_of_the_networks_own_features(
    make_images: Make, tiny_clip: Path, tiny_vit: Path, tiny_dinov2: Path, run_json: Run
) -> None:
    """Pictures of the networks' own input size, so that nothing is resized on the way."""
    from transformers import CLIPModel, Dinov2Model, ViTModel

    clip, vit, dino = (
        kind.from_pretrained(folder).eval()
        for kind, folder in ((CLIPModel, tiny_clip), (ViTModel, tiny_vit), (Dinov2Model, tiny_dinov2))
    )
    features: dict[str, tuple[int, Callable[[np.ndarray[Any, Any]], torch.Tensor]]] = {
        "clip": (24, lambda p: clip.visual_projection(clip.vision_model(scaled(p, CLIP)).pooler_output)),
        "vit": (32, lambda p: vit(scaled(p, IMAGENET)).last_hidden_state[0, 0]),
        "dinov2": (224, lambda p: dino(scaled(p, IMAGENET)).last_hidden_state[0, 0]),
    }
    for kind, folder in (("clip", tiny_clip), ("vit", tiny_vit), ("dinov2", tiny_dinov2)):
        size, own = features[kind]
        sets = [make_images(f"{kind}-{name}", 3, size, size, seed=seed) for seed, name in enumerate(("a", "b"))]
        with torch.inference_mode():
            expected = [cosine(own(x), own(y)) for x, y in zip(*map(opened, sets), strict=True)]
        key = "clip_i" if kind == "clip" else "dino"
        option = "--clip-model" if kind == "clip" else "--dino-model"
        found = run_json("teacher", *sets, "--metrics", key.replace("_i", "-i"), option, folder)
        assert found[key] == pytest.approx(np.mean(expected), rel=1e-5)
        assert [pair[key] for pair in found["pair_values"]] == pytest.approx(expected, rel=1e-5)
        identity = found["extractors"][key]
        assert identity["name"] == kind and identity["resize"] == f"clean-{size}"
        assert len(identity["weights_sha256"]) == 64
        assert set(found) & {"psnr", "ssim", "lpips", "frechet_distance"} == set()


def test_similarity_of_crops_is_that_of_the_same_places(make_images: Make, tiny_vit: Path, run_json: Run) -> None:
    from transformers import ViTModel

    from flatten_eval.features import Crops

    sets = two_sets(make_images, 50, 70)
    vit = ViTModel.from_pretrained(tiny_vit).eval()
    expected = []
    with torch.inference_mode():
        for index, (x, y) in enumerate(zip(*map(opened, sets), strict=True)):
            places = Crops(32, 3, seed=5).places(f"{index:04d}.png", 50, 70)
            pieces = [[p[top : top + 32, left : left + 32] for p in (x, y)] for top, left in places]
            rows = [[vit(scaled(piece, IMAGENET)).last_hidden_state[0, 0] for piece in pair] for pair in pieces]
            expected.append(np.mean([cosine(*pair) for pair in rows]))
    found = run_json("teacher", *sets, "--metrics", "dino", "--dino-model", tiny_vit, "--crops", 3, "--seed", 5)
    assert found["crop_dino"] == pytest.approx(np.mean(expected), rel=1e-5) and "dino" not in found
    assert found["extractors"]["dino"]["crops"] == "random-3-32-seed-5"


def test_distance_between_the_sets_and_pixels(make_images: Make, features: Path, run_json: Run) -> None:
    original, converted = two_sets(make_images)
    shutil.copy(original / "0003.png", converted / "0003.png")
    own = ("--extractor", f"{features}:cells")
    found = run_json("teacher", original, converted, *own, "--metrics", "fid", "ssim", "psnr")
    rows = [np.stack([cells(picture) for picture in opened(folder)]) for folder in (original, converted)]
    assert found["frechet_distance"] == pytest.approx(independent_frechet(*rows), rel=1e-5)
    assert found["extractors"]["frechet"]["name"] == "own_features:cells" and "fid" not in found
    errors = [((x.astype(float) - y) ** 2).mean() for x, y in zip(*map(opened, (original, converted)), strict=True)]
    differing = [10 * math.log10(255**2 / error) for error in errors if error]
    assert found["psnr"] == pytest.approx(np.mean(differing), rel=1e-9) and found["identical_pairs"] == 1
    assert found["pair_values"][3] == {"name": "0003.png", "ssim": pytest.approx(1), "psnr": None}
    assert found["ssim"] == pytest.approx(np.mean([pair["ssim"] for pair in found["pair_values"]]))
    crops = run_json("teacher", original, converted, *own, "--metrics", "fid", "--crops", "grid", "--crop-size", 16)
    assert crops["crop_frechet_distance"] > 0 and "frechet_distance" not in crops and crops["pair_values"] == []
    with zipfile.ZipFile(original.parent / "original.zip", "w") as archive:
        for path in original.glob("*.png"):
            archive.write(path, path.name)
    packed = run_json("teacher", original.parent / "original.zip", converted, *own, "--metrics", "fid", "ssim", "psnr")
    assert all(packed[key] == found[key] for key in ("frechet_distance", "ssim", "psnr"))


def torchmetrics_lpips(alexnet: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Their network, with the random AlexNet in place of torchvision's."""
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips", reason="torchmetrics is not installed")
    nn = torch.nn
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(),
    )  # fmt: skip
    state = torch.load(alexnet)
    layers.load_state_dict({key[9:]: tensor for key, tensor in state.items() if key.startswith("features.")})
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained=False: layers)
    network: torch.nn.Module = theirs._LPIPS(net="alex")
    return network


@pytest.mark.parametrize(("height", "width"), [(SMALLEST, SMALLEST), (64, 97)])
def test_lpips_agrees_with_torchmetrics(
    alexnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, height: int, width: int
) -> None:
    theirs = torchmetrics_lpips(alexnet, monkeypatch)
    x, y = draw(1, height, width), draw(2, height, width)
    batches = [torch.from_numpy(p.transpose(2, 0, 1)[None].copy()).float() / 127.5 - 1 for p in (x, y)]
    expected = float(theirs(*batches))
    ours = LpipsMeasure(alexnet, CPU)
    assert expected > 0 and ours(x, y) == pytest.approx(expected, rel=1e-4) and ours(x, x) == 0
    whole = {"scaling_layer.shift": torch.zeros(1), "lins.0.model.1.weight": torch.zeros(1)}
    for key, tensor in theirs.state_dict().items():
        whole[key] = tensor.contiguous()
    save_file({key: tensor.clone() for key, tensor in whole.items()}, tmp_path / "lpips.safetensors")
    assert LpipsMeasure(tmp_path / "lpips.safetensors", CPU)(x, y) == ours(x, y)


def test_lpips_of_the_command(make_images: Make, alexnet: Path, run_json: Run, run_error: Fail) -> None:
    original, converted = two_sets(make_images)
    found = run_json("teacher", original, converted, "--metrics", "lpips", "--lpips-weights", alexnet)
    measure, missing = load_lpips(CPU, True, alexnet)
    assert measure is not None and missing is None
    expected = [measure(x, y) for x, y in zip(*map(opened, (original, converted)), strict=True)]
    assert found["lpips"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert len(found["extractors"]["lpips"]["weights_sha256"]) == 64
    code, line = run_error("teacher", original, converted, "--metrics", "lpips")
    assert code == 2 and "LPIPS is not available" in line and "--lpips-weights PATH" in line
    small = two_sets(lambda name, *rest, **more: make_images(f"small-{name}", *rest, **more), 30, 40)
    code, line = run_error("teacher", *small, "--metrics", "lpips", "--lpips-weights", alexnet)
    assert code == 2 and "at least 31x31, not 40x30" in line


def test_weights_that_are_not_lpips_are_one_line(alexnet: Path, tmp_path: Path) -> None:
    state = torch.load(alexnet)
    torch.save({key: value for key, value in state.items() if key != "features.6.bias"}, tmp_path / "lacks.pth")
    torch.save(state | {"features.3.weight": torch.zeros(3)}, tmp_path / "shape.pth")
    torch.save(state | {"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "one.pth")
    (tmp_path / "half.safetensors").write_bytes(b"half")
    (tmp_path / "half.pth").write_bytes(b"half")
    for name, message in (
        ("absent.pth", "no such weights file"), ("lacks.pth", r"lacks features\.6\.bias"),
        ("shape.pth", r"another shape for features\.3\.weight"), ("one.pth", r"lacks lin\.1\.weight \(4 keys\)"),
        ("half.safetensors", "damaged safetensors"), ("half.pth", "neither TorchScript nor"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            LpipsMeasure(tmp_path / name, CPU)


@pytest.fixture(scope="module")
def drawn(tiny_pipeline: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`generate` of the original and the converted pipeline, and of the original with one thing changed at a time."""
    from flatten_eval.cli import main

    folder = tmp_path_factory.mktemp("drawn")
    (folder / "prompts.txt").write_text("a dog\na cat\n")
    (folder / "others.txt").write_text("a dog\na bird\n")
    runs: dict[str, tuple[object, ...]] = {
        "original": (),
        "converted": ("--adapter", tiny_adapter),
        "prompt": ("--prompts", folder / "others.txt"),
        "seed": ("--seeds", 1),
        "steps": ("--steps", 2),
        "guidance": ("--guidance", 2),
        "negative_prompt": ("--negative-prompt", "b"),
        "size": ("--size", 64),
    }
    for name, options in runs.items():
        arguments = ("generate", tiny_pipeline, "--prompts", folder / "prompts.txt", "--steps", 1, *options)
        assert main([*map(str, arguments), "--output", str(folder / name), "--device", "cpu", "--offline"]) == 0
    return folder


def test_drawn_sets_pair_up(
    drawn: Path, tiny_clip: Path, tiny_vit: Path, run_json: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ("--clip-model", tiny_clip, "--dino-model", tiny_vit, "--extractor", "pixels")
    found = run_json("teacher", drawn / "original", drawn / "converted", *models)
    assert set(found) >= {"frechet_distance", "clip_i", "dino", "ssim", "psnr"} and "lpips" not in found
    assert found["original"]["count"] == 2 and all("2 images for 192 features" in line for line in found["warnings"])
    text = capsys.readouterr().out
    for label in ("Fréchet distance (pixels) between the two sets", "CLIP-I (clip)", "DINO similarity (vit)", "PSNR"):
        assert label in text
    swapped = run_json("teacher", drawn / "converted", drawn / "original", "--metrics", "ssim")
    assert any("drawn with the adapter" in warning for warning in swapped["warnings"])


@pytest.mark.parametrize("changed", ["prompt", "steps", "guidance", "negative_prompt", "size", "seed"])
def test_sets_of_other_prompts_seeds_or_settings_are_refused(drawn: Path, run_error: Fail, changed: str) -> None:
    code, line = run_error("teacher", drawn / "original", drawn / changed, "--metrics", "psnr")
    expected = "images have no partner of the same name" if changed == "seed" else f": {changed} is "
    assert code == 3 and expected in line and "draw both sets from the same prompts and seeds" in line, line


def test_renamed_images_of_other_seeds_are_refused(drawn: Path, tmp_path: Path, run_error: Fail) -> None:
    renamed = shutil.copytree(drawn / "seed", tmp_path / "renamed")
    for path in renamed.glob("*-1.png"):
        path.rename(path.with_name(path.name.replace("-1.png", "-0.png")))
    code, line = run_error("teacher", drawn / "original", renamed, "--metrics", "psnr")
    assert code == 3 and "seed is 0 in one and 1 in the other" in line


def test_sets_that_say_nothing_are_paired_by_name_and_caption(
    make_images: Make, run_json: Run, run_error: Fail
) -> None:
    sets = two_sets(make_images)
    found = run_json("teacher", *sets, "--metrics", "psnr")
    assert found["warnings"] == ["5 of 5 pairs do not say their seeds or prompts: they are paired by name alone"]
    for folder in sets:
        rows = [{"file_name": f"{index:04d}.png", "text": f"picture {index}"} for index in range(5)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = run_json("teacher", *sets, "--metrics", "psnr")
    assert found["warnings"] == ["5 of 5 pairs do not say their seeds: they are paired by name and caption"]
    metadata = sets[1] / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("picture 3", "another"))
    code, line = run_error("teacher", *sets, "--metrics", "psnr")
    assert code == 3 and "0003.png: caption is 'picture 3' in one and 'another' in the other" in line


def test_wrong_use_is_one_line(
    make_images: Make, tiny_clip: Path, tiny_vit: Path, tmp_path: Path, run_error: Fail
) -> None:
    sets = two_sets(make_images)
    broken = shutil.copytree(sets[1], tmp_path / "broken")
    (broken / "0002.png").write_bytes(b"half")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((sets[0], tmp_path / "absent"), "absent: does not exist"),
        ((sets[0], broken), "1 of 5 images cannot be read: 0002.png"),
        ((*sets, "--metrics", "dino", "--dino-model", tiny_clip), "the dino extractor needs a dinov2 or vit model"),
        ((*sets, "--metrics", "clip-i", "--clip-model", tiny_vit), "the clip extractor needs a clip model"),
        ((*sets, "--metrics", "dino", "--dino-model", "nobody/nothing"), "--offline is set"),
        ((*sets, "--metrics", "ssim", "--dino-model", tiny_vit), "--dino-model belongs to dino; add dino to --metrics"),
        ((*sets, "--metrics", "ssim", "--crops", 3), "--crops belongs to fid, clip-i and dino"),
        ((*sets, "--metrics", "dino", "--dino-model", tiny_vit, "--crops", 3, "--crop-size", 33), "smaller than crops"),
        ((*sets, "--metrics", "psnr", "--max-images", 6), "5 images, 6 asked for"),
    ]
    for arguments, message in cases:
        code, line = run_error("teacher", *arguments)
        assert code == 2 and message in line, line


def test_networks_by_hub_id_come_from_the_cache_offline(
    make_images: Make, tiny_vit: Path, tmp_path: Path, run_json: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "models--org--dino"
    shutil.copytree(tiny_vit, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    sets = two_sets(make_images)
    by_id, by_path = (
        run_json("teacher", *sets, "--metrics", "dino", "--dino-model", model) for model in ("org/dino", tiny_vit)
    )
    assert by_id["dino"] == by_path["dino"] and by_id["extractors"] == by_path["extractors"]
