"""Whatever a user gives: a result or one line, never a traceback, a hang, or a set that is silently another one."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flatten_diffusion.scenes import ADAPTER_DIR
from flatten_eval.cli import main
from flatten_eval.errors import InputError
from flatten_eval.features import featurise as featurise_module
from flatten_eval.features import load_extractor
from flatten_eval.features.featurise import featurise
from flatten_eval.files import create_json, require_writable, shown_name
from flatten_eval.images import ImageReader, UnreadableImage, load_captions, open_images
from flatten_eval.processes import Processes

from .pieces import ROOT, child_environment, command_line

Make = Callable[..., Path]
Run = Callable[..., dict[str, Any]]
Fail = Callable[..., tuple[int, str]]
CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


def packed(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.glob("*.png")):
            archive.write(path, path.name)
    return target


def test_a_damaged_zip_is_one_line(make_images: Make, tmp_path: Path, run_error: Fail) -> None:
    images = make_images("a", 4)
    whole = packed(images, tmp_path / "good.zip").read_bytes()
    directory = whole.index(b"PK\x01\x02")
    length = struct.pack("<H", 60_000)
    cases = {
        "name": whole[: directory + 28] + length + whole[directory + 30 :],
        "offset": whole[: directory + 42] + b"\xff\xff\xff\x7f" + whole[directory + 46 :],
        "method": whole[: directory + 10] + b"\x63\x00" + whole[directory + 12 :],
        "content": whole[:60] + bytes(200) + whole[260:],
    }
    for name, content in cases.items():
        damaged = tmp_path / f"{name}.zip"
        damaged.write_bytes(content)
        code, line = run_error("fid", images, damaged, "--extractor", "pixels", "--no-resume")
        assert code == 2 and damaged.name in line, line


@pytest.mark.parametrize(
    "source", ["builtins:print", "sys:exit", "itertools:count", ":f", "math:", "json:loads", "x" * 10_000]
)
def test_what_is_no_extractor_is_one_line(make_images: Make, run_error: Fail, source: str) -> None:
    images = make_images("a", 4)
    code, line = run_error("fid", images, images, "--extractor", source, "--no-resume")
    assert code == 2 and source[:100] in line and len(line) < 1100


def test_a_module_that_exits_is_one_line(make_images: Make, tmp_path: Path, run_error: Fail) -> None:
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    images = make_images("a", 4)
    code, line = run_error("fid", images, images, "--extractor", f"{tmp_path / 'leaves.py'}:f")
    assert code == 2 and "cannot be imported (SystemExit" in line


@pytest.mark.parametrize(
    "arguments",
    [
        *(("fid", "a", "b", *rest) for rest in (
            ("--seed", 2**70), ("--seed", -(2**64)), ("--resize-to", 10**6), ("--batch-size", 10**9),
        )),
        *(("generate", "scenes", "--output", "o", *rest) for rest in (
            ("--size", 100_000), ("--size", "9" * 5000), ("--steps", 10**9), ("--guidance", "nan"), ("--seeds", 2**70),
            ("--batch", 0),
        )),
        *(("throughput", "--op", *rest) for rest in (
            ("--kernel-size", 1001), ("--tokens", 10**12), ("--warmup", -1), ("--seconds", "inf"), ("--window", -8),
            ("--sizes", "0x8"),
        )),
    ],
)  # fmt: skip
def test_numbers_are_bounded_at_the_door(arguments: tuple[object, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "error: argument --" in error and len(error) < 250


def test_an_output_that_cannot_be_written_is_said_first(make_images: Make, tmp_path: Path, run_error: Fail) -> None:
    (tmp_path / "file").write_text("")
    images = make_images("a", 4)
    for target in (tmp_path / "file" / "result.json", tmp_path, Path("/proc/none/result.json")):
        code, line = run_error("fid", tmp_path / "absent", images, "--extractor", "pixels", "--json", target)
        assert code == 2 and "choose another output path" in line and "absent" not in line, line
        code, line = run_error("statistics", images, target.with_suffix(".npz"), "--extractor", "nonsense")
        assert code == 2 and ("choose another output path" in line or target == tmp_path), line
        code, line = run_error("throughput", "--arch", "sd15", "--plot", target)
        assert code == 2 and "choose another output path" in line
    for output in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/none")):
        code, line = run_error("generate", "nobody/nothing", "--num-images", 1, "--output", output)
        assert code == 2 and "choose another output path" in line, line
    require_writable(tmp_path / "new" / "deep" / "x.json")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["[]", "null", "{", "[" * 100_000, '"x"', "\xff", '{"steps": NaN}'])
def test_a_record_that_is_none_is_one_line(tiny_pipeline: Path, tmp_path: Path, run_error: Fail, content: str) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    output = tmp_path / "out"
    output.mkdir()
    (output / "generation.json").write_bytes(content.encode("latin-1"))
    arguments = ("--prompts", tmp_path / "prompts.txt", "--steps", 1, "--output", output)
    code, line = run_error("generate", tiny_pipeline, *arguments)
    assert code == 2 and "generation.json: damaged; remove it" in line and len(line) < 400


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"_class_name": "Nothing"}', '{"_class_name": "StableDiffusionPipeline"}']
)
def test_a_damaged_pipeline_is_one_line(tmp_path: Path, run_error: Fail, content: str) -> None:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text(content)
    (tmp_path / "prompts.txt").write_text("a\n")
    arguments = ("--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "out")
    code, line = run_error("generate", folder, *arguments)
    assert code == 2 and "cannot be loaded as a pipeline" in line


def test_prompts_keep_what_looks_like_a_line_end_and_lose_a_mark(tmp_path: Path) -> None:
    from flatten_eval.pipelines import read_prompts

    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + "a\u2028b\r\nc\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a\u2028b", "c"]
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n' + "[" * 100_000)
    with pytest.raises(InputError, match="line 2 is truncated or no JSON"):
        read_prompts(tmp_path / "p.jsonl")


def test_compare_of_scenes_with_other_prompts_still_reports(tmp_path: Path, run_json: Run) -> None:
    (tmp_path / "prompts.txt").write_text("a photo of a cat\na red circle on a white background\n")
    found = run_json(
        "compare", "scenes", "--adapter", ADAPTER_DIR, "--prompts", tmp_path / "prompts.txt", "--steps", 1,
        "--speed-sizes", "--output", tmp_path / "out",
    )  # fmt: skip
    assert found["facts"] is None and found["paired"]["pairs"] == 2
    assert any("stated facts" in warning and "a photo of a cat" in warning for warning in found["warnings"])
    assert "a photo of a cat" in (tmp_path / "out" / "report.html").read_text()


def test_nothing_written_names_a_folder_of_this_machine(
    tiny_pipeline: Path, tiny_adapter: Path, make_images: Make, tmp_path: Path, run_json: Run
) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    out = tmp_path / "out"
    found = run_json(
        "compare", tiny_pipeline, "--adapter", tiny_adapter, "--prompts", tmp_path / "prompts.txt", "--steps", 1,
        "--speed-sizes", "--real", make_images("real", 4, 32, 32), "--output", out,
    )  # fmt: skip
    statistics = run_json("statistics", out / "original", tmp_path / "s.npz", "--extractor", "pixels")
    fid = run_json("fid", tmp_path / "s.npz", out / "converted", "--extractor", "pixels")
    texts = [json.dumps(result) for result in (found, statistics, fid)]
    texts += [path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".jsonl", ".html")]
    for path in out.rglob("*.png"):
        with Image.open(path) as image:
            texts.append(json.dumps(image.info))
    assert len(texts) == 3 + 6 + 4
    for text in texts:
        for folder in (tmp_path, tiny_pipeline.parent, tiny_adapter.parent, ROOT):
            assert str(folder) not in text
    assert shown_name(tiny_pipeline) == tiny_pipeline.name and shown_name("org/model") == "org/model"


def test_names_that_are_no_text_do_not_matter(
    tiny_pipeline: Path, tmp_path: Path, run_json: Run, run_error: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    out = tmp_path / os.fsdecode(b"caf\xe9")
    arguments = ("--prompts", tmp_path / "prompts.txt", "--steps", 1, "--output", out)
    for made in (1, 0):
        assert run_json("generate", tiny_pipeline, *arguments)["made"] == made
    assert run_error("generate", tiny_pipeline, *arguments[:-1], tmp_path / "o", "--negative-prompt", "\udcff")[0] == 2
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="utf-8"))
    assert main([*map(str, ("generate", tiny_pipeline, *arguments)), "--device", "cpu", "--offline"]) == 0
    sys.stdout.flush()
    assert b"caf\\udce9: 1 images, 0 made now" in printed.getvalue()


def test_pipelines_of_one_name_do_not_mix(tiny_pipeline: Path, tmp_path: Path, run_json: Run, run_error: Fail) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    arguments = ("--prompts", tmp_path / "prompts.txt", "--steps", 1, "--output", tmp_path / "out")
    run_json("generate", tiny_pipeline, *arguments)
    moved = shutil.copytree(tiny_pipeline, tmp_path / "elsewhere" / tiny_pipeline.name)
    assert run_json("generate", moved, *arguments)["made"] == 0
    weights = next(moved.glob("unet/*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    code, line = run_error("generate", moved, *arguments)
    assert code == 2 and "holds images made with pipeline_sha256" in line


def test_two_runs_in_one_folder_both_end_well(tiny_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join("abcdef"))
    output = tmp_path / "out"
    command = command_line(
        "generate", tiny_pipeline, "--prompts", tmp_path / "prompts.txt", "--steps", 2, "--output", output,
        "--device", "cpu", "--offline",
    )  # fmt: skip
    runs = [
        subprocess.Popen(command, cwd=ROOT, env=child_environment(), stderr=subprocess.PIPE, text=True) for _ in "ab"
    ]
    errors = [run.communicate(timeout=240)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    assert not any("Traceback" in error for error in errors)
    assert len(list(output.glob("*.png"))) == 6 and not list(output.glob(".*"))


def test_a_folder_is_claimed_by_one_of_two(tmp_path: Path) -> None:
    assert create_json(tmp_path / "deep" / "r.json", {"a": 1}) and not create_json(
        tmp_path / "deep" / "r.json", {"a": 2}
    )
    assert json.loads((tmp_path / "deep" / "r.json").read_text()) == {"a": 1}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.json"]


def test_what_killed_runs_left_is_swept(make_images: Make, tmp_path: Path, features: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    from flatten_diffusion.files import _HOST

    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    left = unfinished / f".pass-{'0' * 32}.safetensors.{_HOST}-{gone.pid}-abcd.tmp"
    alive = unfinished / f".pass-{'0' * 32}.safetensors.{_HOST}-{os.getpid()}-abcd.tmp"
    for path in (left, alive):
        path.write_bytes(b"half")
    extractor = load_extractor(f"{features}:cells", device=CPU)
    featurise(open_images(make_images("a", 3)), extractor, ALONE, resume_folder=unfinished)
    assert list(unfinished.iterdir()) == [alive]


def test_a_bit_flipped_in_an_unfinished_pass_is_noticed(
    make_images: Make, tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_images(make_images("a", 12))
    extractor = load_extractor(f"{features}:cells", device=CPU)
    plain = featurise(images, extractor, ALONE, batch_size=4).moments.covariance()
    path = featurise_module._checkpoint_path(tmp_path, images, extractor, ALONE, 4, False)
    monkeypatch.setattr(featurise_module, "SAVE_SECONDS", -1.0)
    kept: list[bytes] = []
    save = featurise_module._save_state

    def keeping(target: Path, state: Any) -> None:
        save(target, state)
        kept.append(target.read_bytes())

    monkeypatch.setattr(featurise_module, "_save_state", keeping)
    featurise(images, extractor, ALONE, batch_size=4, resume_folder=tmp_path)
    whole = kept[1]  # two of three blocks
    calls: list[int] = []
    extract = extractor.extract
    monkeypatch.setattr(extractor, "extract", lambda batch: calls.append(len(batch)) or extract(batch))
    path.write_bytes(whole)
    featurise(images, extractor, ALONE, batch_size=4, resume_folder=tmp_path)
    assert calls == [4]  # as it was saved, it is continued
    for index in range(8, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        again = featurise(images, extractor, ALONE, batch_size=4, resume_folder=tmp_path).moments.covariance()
        assert torch.equal(again, plain), index
    assert calls.count(4) > 100  # and begun anew with nearly every flip


def test_hidden_things_are_no_images(make_images: Make, tmp_path: Path, run_json: Run) -> None:
    real, fake = make_images("real", 20, seed=1), make_images("fake", 20, seed=2)
    options = ("--extractor", "pixels", "--no-resume")
    before = run_json("fid", real, fake, *options)
    for name in (".ipynb_checkpoints/0000-checkpoint.png", ".git/x.png", "__MACOSX/._0000.png", ".x.png"):
        path = fake / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (28, 20), "red").save(path)
    after = run_json("fid", real, fake, *options)
    assert (after["count"], after["frechet_distance"]) == (20, before["frechet_distance"])
    with zipfile.ZipFile(tmp_path / "fake.zip", "w") as archive:
        for path in fake.rglob("*.png"):
            archive.write(path, path.relative_to(fake))
    assert len(open_images(tmp_path / "fake.zip")) == 20


def test_pipes_and_dangling_links_are_said_and_never_waited_for(
    make_images: Make, tmp_path: Path, run_error: Fail
) -> None:
    images = make_images("a", 4)
    started = time.monotonic()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("fid", "--prompts"):
        arguments = (images, tmp_path / "pipe.png", "--extractor", "pixels")
        if name == "--prompts":
            name, arguments = "generate", ("x", name, tmp_path / "pipe.png", "--output", tmp_path / "out")
        assert run_error(name, *arguments)[0] == 2
    os.mkfifo(images / "x.png")
    with pytest.raises(InputError, match=r"x\.png: named like an image, but no file"):
        open_images(images)
    (images / "x.png").unlink()
    (images / "y.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"y\.png: named like an image, but no file"):
        open_images(images)
    assert time.monotonic() - started < 60


def test_every_decoding_is_the_one_of_training(tmp_path: Path, run_error: Fail) -> None:
    from flatten_diffusion.images import to_rgb

    folder = tmp_path / "odd"
    folder.mkdir()
    ramp = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)
    Image.fromarray(ramp).save(folder / "float.tif")
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(folder / "wide.png")
    Image.new("RGBA", (6, 4), (200, 0, 0, 128)).save(folder / "half.png")
    with ImageReader(open_images(folder)) as reader:
        for path in folder.iterdir():
            with Image.open(path) as image:
                expected = np.asarray(to_rgb(image))
            assert np.array_equal(reader.pixels(path.name), expected)
        assert reader.pixels("float.tif").max() == 255 == reader.pixels("wide.png").max()
    Image.fromarray(ramp * 300).save(folder / "float.tif")
    with ImageReader(open_images(folder)) as reader, pytest.raises(UnreadableImage, match=r"float\.tif \(.*300"):
        reader.pixels("float.tif")
    code, line = run_error("fid", folder, folder, "--extractor", "pixels", "--no-resume")
    assert code == 2 and "1 of 3 images cannot be read: float.tif (" in line


def test_captions_of_every_kind(make_images: Make, tmp_path: Path) -> None:
    images = make_images("a", 3)
    names = [f"{index:04d}.png" for index in range(3)]
    below = images / "below"
    below.mkdir()
    shutil.move(images / names[2], below / names[2])
    (images / "metadata.csv").write_bytes(b'\xef\xbb\xbffile_name,text\n0000.png,one\n0001.png,"two, too"\n')
    (below / "metadata.jsonl").write_text(
        json.dumps({"file_name": names[2], "text": "three\u2028still"}, ensure_ascii=False)
    )
    assert load_captions(open_images(images), None) == ["one", "two, too", "three\u2028still"]
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as packed_images:
        for path in images.rglob("*.*"):
            packed_images.write(path, path.relative_to(images))
    assert load_captions(open_images(archive), None) == ["one", "two, too", "three\u2028still"]
    for caption in ("null", "NaN", '""'):
        (below / "metadata.jsonl").write_text(f'{{"file_name": "{names[2]}", "text": {caption}}}')
        with pytest.raises(InputError, match="1 of 3 images have no caption"):
            load_captions(open_images(images), None)
    (tmp_path / "own.txt").write_text('{"file_name": "0000.png"}')
    with pytest.raises(InputError, match=r"own\.txt, line 1: it must hold"):
        load_captions(open_images(images), tmp_path / "own.txt")
