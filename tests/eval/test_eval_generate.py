"""The generate command: the same images however often it is stopped, split or batched."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flatten_diffusion import files
from flatten_eval import generate
from flatten_eval.cli import main
from flatten_eval.pipelines import load_pipeline
from flatten_eval.processes import Processes

from .pieces import ROOT, child_environment, command_line

Run = Callable[..., dict[str, Any]]
Fail = Callable[..., tuple[int, str]]
CPU = torch.device("cpu")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\n\ntwo dogs, one blue\n a house \n", encoding="utf-8")
    return path


def arguments(pipeline: Path, prompts: Path, output: Path, *more: object) -> list[str]:
    every = ["generate", pipeline, "--prompts", prompts, "--seeds", 0, 7, "--steps", 2, "--output", output, *more]
    return [*map(str, every), "--device", "cpu", "--offline"]


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def same(a: Path, b: Path) -> bool:
    first, second = pictures(a), pictures(b)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def reference(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    file = folder / "prompts.txt"
    file.write_text("a red cat\ntwo dogs, one blue\na house\n")
    assert main(arguments(tiny_pipeline, file, folder / "out", "--batch", 2)) == 0
    return folder / "out"


def test_one_png_per_prompt_and_seed_with_its_settings(reference: Path, tiny_pipeline: Path) -> None:
    found = pictures(reference)
    assert list(found) == [f"{index:06d}-{seed}.png" for index in range(3) for seed in (0, 7)]
    assert all(picture.shape == (32, 32, 3) for picture in found.values())
    values = list(found.values())
    assert all((a != b).any() for i, a in enumerate(values) for b in values[:i])
    with Image.open(reference / "000001-7.png") as image:
        written = json.loads(image.info["flatten_eval"])
    assert written["prompt"] == "two dogs, one blue" and written["seed"] == 7 and written["steps"] == 2
    assert written["pipeline"] == tiny_pipeline.name and written["dtype"] == "float32"
    # Whoever has the pipeline can draw it again from what it says.
    pipeline = load_pipeline(str(tiny_pipeline), dtype="float32", device=CPU, offline=True)
    generator = torch.Generator("cpu").manual_seed(written["generator_seed"])
    again = pipeline(written["prompt"], num_inference_steps=2, generator=generator, output_type="np").images[0]
    assert np.abs(again * 255 - found["000001-7.png"]).max() <= 1.01
    rows = [json.loads(line) for line in (reference / "metadata.jsonl").read_text().splitlines()]
    assert rows[2] == {"file_name": "000001-0.png", "text": "two dogs, one blue"}
    assert sorted(path.suffix for path in reference.iterdir()) == [".json", ".jsonl", *[".png"] * 6]


def test_only_what_is_missing_is_made_and_comes_out_the_same(
    reference: Path, tiny_pipeline: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(reference, tmp_path / "out")
    (output / "000001-7.png").unlink()
    (output / "000002-0.png").write_bytes((output / "000002-0.png").read_bytes()[:200])
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("*.png") if path.name != "000002-0.png"}
    sizes: list[int] = []
    run_batch = generate.run_batch
    monkeypatch.setattr(generate, "run_batch", lambda *a: sizes.append(len(a[2])) or run_batch(*a))
    assert main(arguments(tiny_pipeline, prompts, output, "--batch", 2)) == 0
    assert sizes == [2, 2]
    assert same(output, reference)
    assert all((output / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())


def test_killed_at_once_and_started_again(reference: Path, tiny_pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = command_line(*arguments(tiny_pipeline, prompts, output, "--batch", 2))
    process = subprocess.Popen(command, cwd=ROOT, env=child_environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(output.glob("*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(output.glob("*.png")), "killed before the first image"
    assert main(arguments(tiny_pipeline, prompts, output, "--batch", 2)) == 0
    assert same(output, reference)


def test_batch_size_changes_rounding_only(reference: Path, tiny_pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    for batch in (1, 5):
        assert main(arguments(tiny_pipeline, prompts, tmp_path / f"{batch}", "--batch", batch)) == 0
        for name, picture in pictures(tmp_path / f"{batch}").items():
            difference = np.abs(picture.astype(int) - pictures(reference)[name].astype(int))
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_the_number_of_processes_changes_nothing(
    reference: Path, tiny_pipeline: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of three ranks does its own share; `wait` and the launcher are exercised by the two-process fid test."""
    pipeline = load_pipeline(str(tiny_pipeline), dtype="float32", device=CPU, offline=True)
    settings = generate.GenerationSettings(tiny_pipeline.name, generate.pipeline_sha256(str(tiny_pipeline)), steps=2)
    jobs = generate.make_jobs(["a red cat", "two dogs, one blue", "a house"], [0, 7])
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    made = [generate.generate(pipeline, settings, jobs, tmp_path, Processes(r, 3, CPU), 2) for r in (2, 0, 1)]
    assert made == [2, 2, 2] and same(tmp_path, reference)


def test_an_adapter_changes_the_images_and_is_recorded(
    reference: Path, tiny_pipeline: Path, tiny_adapter: Path, prompts: Path, tmp_path: Path
) -> None:
    assert main(arguments(tiny_pipeline, prompts, tmp_path / "out", "--adapter", tiny_adapter)) == 0
    first, second = pictures(reference), pictures(tmp_path / "out")
    assert any((first[name] != second[name]).any() for name in first)
    settings = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert settings["adapter"] == tiny_adapter.name and len(settings["adapter_sha256"]) == 64


def test_other_settings_do_not_mix(reference: Path, tiny_pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    output = shutil.copytree(reference, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert main(arguments(tiny_pipeline, prompts, output, "--guidance", 3)) == 2
    other = tmp_path / "other.txt"
    other.write_text("a green cat\n")
    assert main(arguments(tiny_pipeline, other, output)) == 2
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_wrong_input_is_one_line(tiny_pipeline: Path, prompts: Path, tmp_path: Path, run_error: Fail) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"nothing": 1}\n')
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    out = ("--output", tmp_path / "out")
    good = ("--prompts", prompts)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((tiny_pipeline, "--prompts", tmp_path / "absent.txt", *out), "no such prompts file"),
        ((tiny_pipeline, "--prompts", tmp_path / "empty.txt", *out), "holds no prompts"),
        ((tiny_pipeline, "--prompts", tmp_path / "bad.jsonl", *out), "line 2: needs a text"),
        ((tiny_pipeline, "--prompts", tmp_path / "latin.txt", *out), "no UTF-8"),
        ((tiny_pipeline, *good, "--seeds", 1, 1, *out), "a seed is given twice"),
        ((tiny_pipeline, *good, "--num-images", 3, *out), "exclude each other"),
        ((tiny_pipeline, *good, "--output", tmp_path / "file"), "not a folder"),
        ((tiny_pipeline, *out), "needs prompts"),
        ((tiny_pipeline, *good, "--adapter", tmp_path / "folder", *out), "adapter "),
        ((tiny_pipeline, *good, "--size", "36", *out), "divisible by 8"),
        ((tiny_pipeline, *good, "--size", "32x36", *out), "choose another --size"),
        ((tmp_path / "folder", *good, *out), "no model_index.json"),
        (("nobody/nothing", *good, *out), "cannot be loaded as a pipeline"),
    ]
    for case, message in cases:
        code, line = run_error("generate", *case, "--steps", 1)
        assert code == 2 and message in line, (case, line)
    assert not (tmp_path / "out").exists()


class Asks:
    """What a pipeline says of sizes: SD3 raises from its own check, Flux only warns and draws a smaller image."""

    vae_scale_factor = 8

    def __call__(self, prompt: str, height: int, width: int) -> None: ...


class Patched(Asks):
    def check_inputs(self, prompt: str, prompt_2: str, height: int, width: int, negative_prompt: str = "") -> None:
        if height % 16 or width % 16:
            raise ValueError("`height` and `width` have to be divisible by 16")


class Packed(Asks):
    def check_inputs(self, prompt: str, height: int, width: int) -> None: ...

    def _pack_latents(self) -> None: ...


class Demanding(Asks):
    """Its check wants what cannot be guessed here: it says nothing of the size."""

    def check_inputs(self, prompt: str, height: int, width: int, embeds: object) -> None:
        if embeds is None:
            raise ValueError("needs embeds")


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        (Asks, (104, 64), None),
        (Asks, (100, 64), "Asks needs multiples of 8 pixels, not 64x100"),
        (Patched, (96, 64), None),
        (Patched, (96, 104), "Patched refuses 104x96 .* divisible by 16"),
        (Packed, (96, 64), None),
        (Packed, (104, 64), "Packed needs multiples of 16 pixels"),
        (Demanding, (104, 64), None),
        (Demanding, (64, 100), "Demanding needs multiples of 8"),
    ],
)
def test_sizes_that_the_pipeline_does_not_take(kind: type[Asks], size: tuple[int, int], message: str | None) -> None:
    from flatten_eval.errors import InputError

    settings = generate.GenerationSettings(pipeline="x", height=size[0], width=size[1])
    if message is None:
        generate.check_settings(kind(), settings, ["a"])
    else:
        with pytest.raises(InputError, match=message):
            generate.check_settings(kind(), settings, ["a"])


@pytest.mark.parametrize(
    ("name", "attributes", "wrong"),
    [
        ("StableDiffusionPipeline", {}, 100),
        ("StableDiffusionXLPipeline", {}, 100),
        ("PixArtSigmaPipeline", {}, 100),
        ("StableDiffusion3Pipeline", {"patch_size": 2}, 104),
        ("FluxPipeline", {}, 104),
        ("QwenImagePipeline", {}, 104),
    ],
)
def test_sizes_of_real_pipelines(name: str, attributes: dict[str, int], wrong: int) -> None:
    """The classes' own checks, without their models."""
    import diffusers

    from flatten_eval.errors import InputError

    pipeline = object.__new__(getattr(diffusers, name))
    for attribute, value in (attributes | {"vae_scale_factor": 8}).items():
        pipeline.__dict__[attribute] = value
    for size in (96, 1024):
        generate.check_settings(pipeline, generate.GenerationSettings(pipeline="x", height=size, width=size), ["a"])
    for height, width in ((wrong, 96), (96, wrong)):
        settings = generate.GenerationSettings(pipeline="x", height=height, width=width)
        with pytest.raises(InputError, match="choose another --size"):
            generate.check_settings(pipeline, settings, ["a"])


def test_a_full_disk_is_one_line_and_leaves_no_half_image(
    tiny_pipeline: Path, prompts: Path, tmp_path: Path, run_error: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("generate", tiny_pipeline, "--prompts", prompts, "--steps", 1, "--output")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**6, 10**6, 100))
        code, line = run_error(*command, tmp_path / "a")
        assert code == 2 and "not enough disk space" in line and not (tmp_path / "a").exists()
    replace = files.os.replace

    def full(source: Path, target: Path) -> None:
        if str(target).endswith(".png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    code, line = run_error(*command, tmp_path / "b")
    assert code == 2 and "no space left on the disk" in line
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["generation.json"]


def test_a_image_of_nan_is_refused(tiny_pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    from flatten_eval.errors import InputError

    pipeline = load_pipeline(str(tiny_pipeline), dtype="float32", device=CPU, offline=True)
    pipeline.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    settings = generate.GenerationSettings(pipeline="x", steps=1)
    with pytest.raises(InputError, match="000000-0.png: the image is not finite in float32"):
        generate.generate(pipeline, settings, generate.make_jobs(["a"], [0]), tmp_path, Processes(0, 1, CPU))


def test_pipelines_without_prompts(tmp_path: Path, run_json: Run, run_error: Fail) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    out = tmp_path / "out"
    found = run_json("generate", tmp_path / "ddpm", "--num-images", 3, "--steps", 2, "--batch", 2, "--output", out)
    assert found["count"] == found["made"] == 3 and len(pictures(out)) == 3
    assert not (out / "metadata.jsonl").exists()
    again = run_json("generate", tmp_path / "ddpm", "--num-images", 3, "--steps", 2, "--batch", 2, "--output", out)
    assert again["made"] == 0
    code, line = run_error("generate", tmp_path / "ddpm", "--guidance", 2, "--output", tmp_path / "o2")
    assert code == 2 and "DDPMPipeline takes no guidance_scale" in line


def test_labels_of_class_conditional_pipelines() -> None:
    from flatten_eval.errors import InputError

    class DiT:
        labels = {"tench": 0, "goldfish": 1}

    assert generate.class_label(DiT(), "207") == 207 and generate.class_label(DiT(), "goldfish") == 1
    with pytest.raises(InputError, match="not a class number or label"):
        generate.class_label(DiT(), "unicorn")
