"""The README's first command, at a small size."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def run(monkeypatch, *arguments):
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, arguments)])
    module.main()


def test_it_prints_one_table_and_writes_both_rows(monkeypatch, tmp_path, capsys):
    picture, numbers = tmp_path / "both.png", tmp_path / "both.json"
    small = ["--size", 160, "--num_inference_steps", 3]
    run(monkeypatch, "--output", picture, "--json", numbers, *small)
    printed = capsys.readouterr().out
    assert "160x160, text to pixels" in printed and "facts that hold" in printed and str(picture) in printed
    measured = json.loads(numbers.read_text())["measured"]
    assert list(measured) == ["original", "converted"]
    for side in measured.values():
        assert {name: len(values) for name, values in side.items()} == {"seconds": 2, "mebibytes": 2, "facts": 2}
        assert min(side["seconds"]) > 0 and all(0 <= share <= 1 for share in side["facts"])
    sheet = Image.open(picture)
    assert sheet.width > 2 * 512 and sheet.height > 2 * 512
    # The two rows come from the same seeds but not from the same attention.
    half = sheet.height // 2
    assert (
        sheet.crop((0, 30, sheet.width, half)).tobytes()
        != sheet.crop((0, half + 26, sheet.width, sheet.height)).tobytes()
    )


@pytest.mark.parametrize(
    "wrong", [["--size", 100], ["--size", 64], ["--num_inference_steps", 1], ["--output", "no-such-folder/x.png"]]
)
def test_wrong_use_is_refused_before_anything_is_drawn(monkeypatch, wrong, capsys):
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, *wrong)
    assert raised.value.code == 2
    assert wrong[0].removeprefix("--num_inference_") in capsys.readouterr().err
