from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from flatten_diffusion.distill import hub_dataset, image_folder, prompt_file


def picture(path: Path, size: tuple[int, int] = (40, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 10, 10)).save(path)


def test_folder_with_text_files(tmp_path: Path) -> None:
    picture(tmp_path / "b.png")
    picture(tmp_path / "sub" / "a.jpg")
    (tmp_path / "b.txt").write_text(" a red card \n")
    examples = image_folder(tmp_path)
    assert [(example.name, example.caption) for example in examples] == [("b.png", "a red card"), ("sub/a.jpg", "")]
    assert examples[0].open is not None and examples[0].open().size == (40, 24)
    assert [example.name for example in image_folder(tmp_path, max_samples=1)] == ["b.png"]


def test_folder_with_metadata(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    rows = [{"file_name": "x.png", "said": ["first", "second"]}, {"file_name": "gone.png", "said": "lost"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    examples = image_folder(tmp_path, caption_column="said")
    assert [(example.name, example.caption) for example in examples] == [("x.png", "first"), ("gone.png", "lost")]


@pytest.mark.parametrize("line", ["{broken", '["x.png"]', '{"file_name": "x.png"}'])
def test_bad_metadata_names_the_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "fine"}\n' + line)
    with pytest.raises(ValueError, match="line 2"):
        image_folder(tmp_path)


def test_empty_or_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        image_folder(tmp_path)
    with pytest.raises(NotADirectoryError, match="nowhere"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="prompts"):
        prompt_file(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="no prompts"):
        prompt_file(tmp_path / "prompts.txt")


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\n two \nthree", encoding="utf-8")
    examples = prompt_file(tmp_path / "prompts.txt", max_samples=2)
    assert [example.caption for example in examples] == ["one", "two"]
    assert all(example.open is None for example in examples)


def test_the_datasets_library_is_asked_for_by_name() -> None:
    if importlib.util.find_spec("datasets") is not None:
        pytest.skip("datasets is installed")
    with pytest.raises(ImportError, match="pip install datasets"):
        hub_dataset("someone/something")


def test_local_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the datasets library")
    picture(tmp_path / "data" / "x.png", (16, 8))
    (tmp_path / "data" / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "a card"}\n')
    examples = hub_dataset(str(tmp_path / "data"), cache_dir=tmp_path / "cache")
    assert [example.caption for example in examples] == ["a card"]
    assert examples[0].open is not None and examples[0].open().size == (16, 8)
    with pytest.raises(ValueError, match="no column 'caption'"):
        hub_dataset(str(tmp_path / "data"), cache_dir=tmp_path / "cache", caption_column="caption")
