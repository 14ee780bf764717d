"""`convert` and `mixers`: what the library does, from the command line."""

import json

import pytest

from flatten_diffusion import list_mixers, load_adapter, restore
from flatten_diffusion.scenes import load_scenes_pipeline
from flatten_eval.cli import main


def test_a_converted_pipeline_is_reported_and_its_adapter_loads(tmp_path, capsys):
    folder = tmp_path / "adapter"
    arguments = ["convert", "scenes", "--set", "kernel_size=3", "--window", "4", "--exclude", "mid_block.*"]
    assert main([*arguments, "--output", str(folder), "--device", "cpu", "--json", str(tmp_path / "r.json")]) == 0
    assert "down_blocks.0.attentions.0" in capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    pipe = load_scenes_pipeline()
    adapter = load_adapter(pipe, folder)
    assert result["layers"] == list(adapter.layers) and len(adapter.layers) == 6
    assert adapter.config.window == 4 and adapter.config.mixer.kernel_size == 3
    restore(pipe)


def test_training_free_is_the_pyramid(capsys):
    assert main(["convert", "scenes", "--training-free", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["mixer"]["name"] == "pyramid"


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (["--set", "kernel_size=2"], "kernel_size"),
        (["--set", "colour=red"], "colour"),
        (["--training-free", "--window", "8"], "leave out"),
        (["--exclude", "*"], "layer"),
    ],
)
def test_what_cannot_be_converted_is_one_line(wrong, complaint, capsys):
    assert main(["convert", "scenes", "--device", "cpu", *wrong]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert complaint in printed[-1] and printed[-1].startswith("flatten-eval: error")


def test_every_mixer_is_listed_with_its_settings(capsys):
    assert main(["mixers", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["mixers"]
    assert list(listed) == list(list_mixers())
    assert listed["focused_linear"]["settings"]["focusing_factor"] == 3
    assert main(["mixers"]) == 0 and "focusing_factor=3" in capsys.readouterr().out
