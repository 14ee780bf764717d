"""The ablation runner refuses wrong input in one line, before it loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.experiments import ablation


def test_data_that_cannot_be_used_is_said_before_the_pipeline_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "load_pipeline", lambda *args, **kwargs: pytest.fail("loaded the pipeline"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "metadata.jsonl").write_text("no json\n")
    for arguments, message in (
        (["--train_data_dir", str(tmp_path / "empty")], "holds no images"),
        (["--train_data_dir", str(tmp_path / "absent")], "is no folder"),
        (["--train_data_dir", str(tmp_path / "listed")], "metadata.jsonl"),
        (["--min_tokens", "-1"], "min_tokens is -1"),
        (["--variants", "nothing like it"], "--variants matches none"),
    ):
        assert ablation.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error


def test_too_few_images_and_a_missing_pipeline_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--num_scenes", "1", "--resolution", "64"], "1 held-out examples of 1"),
        (["--num_scenes", "20", "--resolution", "100"], "100x100 pixels do not fit"),
        (["--pretrained_model_name_or_path", str(tmp_path)], "model_index.json"),
    ):
        assert ablation.main(arguments) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and message in error[0], error
