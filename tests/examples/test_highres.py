"""The example of large pictures, at sizes of seconds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from flatten_diffusion.scenes import ADAPTER_DIR

SCRIPT = Path(__file__).parents[2] / "examples" / "highres.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # it takes the memory meter of quickstart.py beside it
    spec = importlib.util.spec_from_file_location("highres_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["highres.py", *map(str, arguments)])
    module.main()


def test_it_prints_a_table_and_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--sizes", 64, "96x128", "--num_inference_steps", 2, "--adapter", ADAPTER_DIR, "--device", "cpu"]
    arguments += ["--output", tmp_path / "large", "--baseline", "--json", tmp_path / "table.json", "--offline"]
    run(monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert "64x64" in printed and "96x128" in printed and "extrapolated" in printed
    with Image.open(tmp_path / "large" / "2-96x128" / "picture.png") as picture:
        assert picture.size == (128, 96)
    table = json.loads((tmp_path / "table.json").read_text())
    assert [stage["size"] for stage in table["stages"]] == [[64, 64], [96, 128]]
    assert table["baseline"]["seconds_per_step"]["original"] > 0
    run(monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert "from disk" in printed and "no step to time" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--baseline"], "--baseline"),
        (["--training_free", "--adapter", "x"], "--training_free"),
        (["--sizes", "64", "32"], "stage grow"),
        (["--sizes", "huge"], "--sizes"),
        (["--strength", "0"], "strength is 0"),
        (["--json", "no-such-folder/x.json"], "--json"),
    ],
    ids=str,
)
def test_wrong_use_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, *arguments)
    assert raised.value.code == 2
    assert says in capsys.readouterr().err


def test_what_the_pipeline_cannot_draw_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^highres.py: StableDiffusionPipeline draws multiples of 8 pixels"):
        run(monkeypatch, "--sizes", 60, "--output", tmp_path, "--device", "cpu")
    with pytest.raises(SystemExit, match=r"^highres.py: .*no-such-pipeline"):
        run(monkeypatch, "--pretrained_model_name_or_path", tmp_path / "no-such-pipeline", "--offline")
