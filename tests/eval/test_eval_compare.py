"""The compare command and its report, looked at in a real browser where one is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flatten_eval.cli import main
from flatten_eval.metrics.paired import Pair
from flatten_eval.report import worst_first

Run = Callable[..., dict[str, Any]]
Fail = Callable[..., tuple[int, str]]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "a <script>alert(1)</script> & 'cat'"


@pytest.fixture(scope="module")
def compared(tiny_pipeline: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra eval)")
    folder = tmp_path_factory.mktemp("compare")
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("a dog", HOSTILE, "b", "c")))
    arguments = [
        "compare", tiny_pipeline, "--adapter", tiny_adapter, "--prompts", folder / "prompts.jsonl", "--steps", 2,
        "--speed-sizes", 32, 64, "--rounds", 1, "--report-pairs", 3, "--output", folder / "out", "--device", "cpu",
        "--offline", "--json", folder / "result.json",
    ]  # fmt: skip
    assert main([*map(str, arguments)]) == 0
    return folder


def test_the_result_holds_everything(compared: Path) -> None:
    found = json.loads((compared / "result.json").read_text())
    assert found == json.loads((compared / "out" / "compare.json").read_text())
    assert found["quality"]["extractor"]["name"] == "pixels" and found["quality"]["count"] == 4
    assert found["quality"]["baseline"] is None and found["quality"]["frechet_distance"] > 0
    assert "fid" not in found["quality"]
    assert found["paired"]["pairs"] == len(found["pairs"]) == 4 and 0 < found["paired"]["ssim"] < 1
    assert found["paired"]["lpips"] is None and found["paired"]["lpips_not_available"]
    assert [row["width"] for row in found["speed"]] == [32, 64]
    assert set(found["speed"][0]["variants"]) == {"sdpa", "linear:eager", "floor"}
    assert len(list((compared / "out" / "original").glob("*.png"))) == 4


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_file_without_network(compared: Path) -> None:
    source = (compared / "out" / "report.html").read_text()
    page = Page()
    page.feed(source)
    sources = [attributes[key] for _, attributes in page.tags for key in ("src", "href") if key in attributes]
    assert len(sources) == 2 * 3 + 2 and all(str(url).startswith("data:image/") for url in sources)
    assert not re.search(r"https?://|url\(|@import", source)
    assert HOSTILE in page.text and [tag for tag, _ in page.tags].count("script") == 1
    assert any(attributes.get("name") == "viewport" for _, attributes in page.tags)
    for word in ("Summary", "Pairs, worst first (3 of 4)", "SSIM to the original", "seconds per step, 64x64", "torch"):
        assert word in page.text


def test_worst_pairs_come_first(compared: Path) -> None:
    found = json.loads((compared / "out" / "compare.json").read_text())
    names = re.findall(r"<small>(\d+-\d+\.png)</small>", (compared / "out" / "report.html").read_text())
    assert names == [pair["name"] for pair in sorted(found["pairs"], key=lambda pair: pair["ssim"])][:3]
    pairs = [Pair("a", 1, 0.1, 0.2), Pair("b", 1, 0.9, 0.7)]
    assert [pair.name for pair in worst_first(pairs)] == ["b", "a"]


def browse(page: Path, *options: str, home: Path) -> subprocess.CompletedProcess[bytes]:
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={home}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, timeout=120)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [500, 1200])
def test_the_report_in_a_browser(compared: Path, tmp_path: Path, width: int) -> None:
    """Scripts run, every image decodes, a slider moves the cut, and nothing is wider than the window."""
    page = tmp_path / "probe.html"
    probe = """
    <script>addEventListener('load',()=>{
    const slide=document.querySelector('.slide'),input=slide.querySelector('input');
    input.value=25;input.dispatchEvent(new Event('input'));
    const data=document.documentElement.dataset;
    data.cut=getComputedStyle(slide.querySelectorAll('img')[1]).clipPath;
    data.broken=[...document.images].filter(i=>!i.naturalWidth).length;
    data.overflow=document.documentElement.scrollWidth-document.documentElement.clientWidth;
    })</script></body>"""
    page.write_text((compared / "out" / "report.html").read_text().replace("</body>", probe))
    dom = browse(page, f"--window-size={width},900", "--dump-dom", home=tmp_path / "home").stdout.decode()
    root = re.search(r"<html[^>]*>", dom)
    assert root is not None, dom[:500]
    for fact in ('data-sliders="3"', 'data-broken="0"', 'data-overflow="0"', "25%"):
        assert fact in root[0], root[0]
    shot = tmp_path / "shot.png"
    browse(page, f"--window-size={width},1600", f"--screenshot={shot}", home=tmp_path / "home")
    with Image.open(shot) as image:
        assert image.size[0] == width and np.asarray(image.convert("L")).std() > 5


def test_real_images_set_original_and_converted_side_by_side(
    compared: Path,
    tiny_pipeline: Path,
    tiny_adapter: Path,
    make_images: Callable[..., Path],
    tmp_path: Path,
    run_json: Run,
) -> None:
    real = make_images("real", 4, 32, 32)
    output = shutil.copytree(compared / "out", tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    found = run_json(
        "compare", tiny_pipeline, "--adapter", tiny_adapter, "--prompts", compared / "prompts.jsonl", "--steps", 2,
        "--speed-sizes", "--real", real, "--metrics", "kid", "--output", output,
    )  # fmt: skip
    assert found["quality"]["baseline"]["frechet_distance"] > 0 and found["quality"]["real"]["count"] == 4
    assert found["speed"] == [] and "kid" in found["quality"]["baseline"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_wrong_use_is_one_line(
    tiny_pipeline: Path, compared: Path, tmp_path: Path, run_error: Fail, make_images: Callable[..., Path]
) -> None:
    good = ("--prompts", compared / "prompts.jsonl", "--output", tmp_path / "out")
    code, line = run_error("compare", tiny_pipeline, *good)
    assert code == 2 and "compare needs --adapter" in line
    code, line = run_error("compare", tiny_pipeline, *good, "--adapter", tmp_path, "--real", tmp_path / "absent")
    assert code == 2 and "absent: does not exist" in line
    code, line = run_error("compare", tiny_pipeline, *good, "--adapter", "x", "--extractor", "unknown")
    assert code == 2 and "unknown extractor" in line
    assert not (tmp_path / "out").exists()


def test_the_originals_are_those_of_the_unconverted_pipeline(
    compared: Path, tiny_pipeline: Path, tmp_path: Path, run_json: Run
) -> None:
    """They are drawn with the adapter in place but disabled: every byte of every PNG is the same."""
    run_json(
        "generate", tiny_pipeline, "--prompts", compared / "prompts.jsonl", "--steps", 2, "--output", tmp_path / "out"
    )
    drawn = {path.name: path.read_bytes() for path in (compared / "out" / "original").glob("*.png")}
    assert len(drawn) == 4
    assert drawn == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}


def test_what_is_wrong_is_said_before_anything_is_drawn(
    compared: Path, tiny_pipeline: Path, tiny_adapter: Path, tmp_path: Path, run_error: Fail
) -> None:
    damaged = shutil.copytree(tiny_adapter, tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"half")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--adapter", tmp_path / "absent"), "adapter "),
        (("--adapter", damaged), "adapter "),
        (("--adapter", tiny_adapter, "--speed-sizes", 34), "measuring the speed of UNet2DConditionModel needs"),
    ]
    for case, message in cases:
        out = tmp_path / "out"
        code, line = run_error(
            "compare", tiny_pipeline, "--prompts", compared / "prompts.jsonl", "--steps", 1, "--output", out, *case
        )
        assert code == 2 and message in line, (case, line)
        assert not out.exists()


@pytest.fixture(scope="module")
def at_sizes(tiny_pipeline: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    (folder / "prompts.txt").write_text("a dog\nb\n")
    arguments = [
        "compare", tiny_pipeline, "--adapter", tiny_adapter, "--prompts", folder / "prompts.txt", "--steps", 1,
        "--sizes", "64x48", 32, "--speed-sizes", 32, 96, "--rounds", 1, "--report-pairs", 1, "--output", folder / "out",
        "--crops", "grid", "--crop-size", 16, "--device", "cpu", "--offline", "--json", folder / "result.json",
    ]  # fmt: skip
    assert main([*map(str, arguments)]) == 0
    return folder


def test_several_sizes_are_side_by_side(at_sizes: Path, tiny_pipeline: Path, tmp_path: Path, run_json: Run) -> None:
    found = json.loads((at_sizes / "result.json").read_text())
    assert found == json.loads((at_sizes / "out" / "compare.json").read_text())
    assert [(one["settings"]["width"], one["settings"]["height"]) for one in found["sizes"]] == [(32, 32), (64, 48)]
    assert "quality" not in found and [row["width"] for row in found["speed"]] == [32, 96]
    for one, (name, crops) in zip(found["sizes"], {"32x32": 4, "64x48": 12}.items(), strict=True):
        sides = [at_sizes / "out" / name / side for side in ("original", "converted")]
        assert Image.open(sides[0] / "000000-0.png").size == tuple(map(int, name.split("x")))
        whole = run_json("fid", *sides, "--extractor", "pixels")
        assert one["quality"]["frechet_distance"] == whole["frechet_distance"] != 0
        cut = run_json("fid", *sides, "--extractor", "pixels", "--crops", "grid", "--crop-size", 16)
        assert one["quality"]["crop_frechet_distance"] == cut["crop_frechet_distance"] != whole["frechet_distance"]
        assert cut["crop_count"] == 2 * crops and one["quality"]["crop_extractor"]["crops"] == "grid-16"
        assert one["paired"]["pairs"] == 2 and len(one["pairs"]) == 2
    assert all(warning.startswith(("32x32: ", "64x48: ")) for warning in found["warnings"])


def test_the_report_of_several_sizes(at_sizes: Path) -> None:
    found = json.loads((at_sizes / "result.json").read_text())
    source = (at_sizes / "out" / "report.html").read_text()
    page = Page()
    page.feed(source)
    assert re.findall(r"<th colspan='2' scope='colgroup'>([^<]*)</th>", source) == ["32x32", "64x48", "96x96"]
    rows = {}
    for row in re.findall(r"<tr><td>(.*?)</tr>", source):
        label, *cells = re.sub(r"<[^>]*>", "|", row).replace("||", "|").strip("|").split("|")
        rows[html.unescape(label)] = cells
    assert all(len(cells) == 6 for cells in rows.values())
    ssim = [f"{one['paired']['ssim']:.4g}" for one in found["sizes"]]
    assert rows["SSIM to the original"] == ["–", ssim[0], "–", ssim[1], "–", "–"]
    seconds = [f"{row['variants']['sdpa']['seconds_per_step']:.4g}" for row in found["speed"]]
    assert rows["seconds per step"][0::2] == [seconds[0], "–", seconds[1]]
    cut = [f"{one['quality']['crop_frechet_distance']:.4g}" for one in found["sizes"]]
    assert rows["Fréchet distance (pixels) to the original's images, crops"] == ["–", cut[0], "–", cut[1], "–", "–"]
    for word in ("Pairs at 32x32, worst first (1 of 2)", "Pairs at 64x48, worst first (1 of 2)"):
        assert word in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 2 * 2 + 2


def test_one_of_several_sizes_is_the_one_of_size(
    at_sizes: Path, tiny_pipeline: Path, tiny_adapter: Path, tmp_path: Path, run_json: Run
) -> None:
    common = (tiny_pipeline, "--adapter", tiny_adapter, "--prompts", at_sizes / "prompts.txt", "--steps", 1)
    found = [
        run_json("compare", *common, "--speed-sizes", "--output", tmp_path / option, option, "64x48")
        for option in ("--size", "--sizes")
    ]
    for one in found:
        del one["environment"]
    assert found[0] == found[1] and "crop_frechet_distance" not in found[0]["quality"]
    assert list(found[0]) == [
        "command",
        "settings",
        "quality",
        "facts",
        "paired",
        "pairs",
        "speed",
        "warnings",
        "report",
    ]
    for name in ("original", "converted"):
        one, other = ((tmp_path / option / name / "000000-0.png").read_bytes() for option in ("--size", "--sizes"))
        assert one == other == (at_sizes / "out" / "64x48" / name / "000000-0.png").read_bytes()


def test_real_images_of_several_sizes(
    at_sizes: Path, tiny_pipeline: Path, tiny_adapter: Path, tmp_path: Path, run_json: Run,
    make_images: Callable[..., Path],
) -> None:  # fmt: skip
    output, real = shutil.copytree(at_sizes / "out", tmp_path / "out"), make_images("real", 3, 40, 40)
    found = run_json(
        "compare", tiny_pipeline, "--adapter", tiny_adapter, "--prompts", at_sizes / "prompts.txt", "--steps", 1,
        "--sizes", 32, "64x48", "--speed-sizes", "--real", real, "--crops", 2, "--crop-size", 20, "--output", output,
    )  # fmt: skip
    for one in found["sizes"]:
        name = f"{one['settings']['width']}x{one['settings']['height']}"
        for column, side in ((one["quality"], "converted"), (one["quality"]["baseline"], "original")):
            whole = run_json("fid", real, output / name / side, "--extractor", "pixels")
            cut = run_json("fid", real, output / name / side, "--extractor", "pixels", "--crops", 2, "--crop-size", 20)
            assert column["frechet_distance"] == whole["frechet_distance"]
            assert column["crop_frechet_distance"] == cut["crop_frechet_distance"]
    assert "crop_frechet_distance" in (output / "compare.json").read_text() and found["speed"] == []


def test_sizes_that_cannot_be_are_said_before_anything_is_drawn(
    at_sizes: Path, tiny_pipeline: Path, tiny_adapter: Path, tmp_path: Path, run_json: Run, run_error: Fail
) -> None:
    saved = tmp_path / "s.npz"
    run_json("statistics", at_sizes / "out" / "32x32" / "original", saved, "--extractor", "pixels")
    cut = ("--crops", 2, "--crop-size", 16)
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--sizes", 32, "--size", 32), "--size and --sizes exclude each other"),
        (("--sizes", 32, "32x32"), "a size is given twice"),
        (("--sizes", 32, 33), "33x33"),
        (("--sizes", 32, 64, "--crops", 2, "--crop-size", 40), "pictures of 32x32 are smaller than crops of 40x40"),
        (("--sizes", 32, 64, *cut, "--real", saved), "saved statistics hold no crops beside whole pictures"),
        (("--size", 32, "--metrics", "kid", "--real", saved), "saved statistics cannot give kid"),
        (("--size", 32, "--lpips-weights", tmp_path / "absent"), "absent: no such weights file"),
    ]
    for options, message in cases:
        code, line = run_error(
            "compare", tiny_pipeline, "--adapter", tiny_adapter, "--prompts", at_sizes / "prompts.txt", "--steps", 1,
            "--output", tmp_path / "out", *options,
        )  # fmt: skip
        assert code == 2 and message in line, line
        assert not (tmp_path / "out").exists()
