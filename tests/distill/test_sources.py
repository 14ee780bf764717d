from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
from diffusers.utils import logging
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


def captions_of(folder: Path) -> dict[str, str]:
    return {example.name: example.caption for example in image_folder(folder)}


def test_missing_captions_are_empty_and_odd_ones_refused(tmp_path: Path) -> None:
    rows = ["null", "NaN", "[]", '" a card "', "7", "7.0", '"one\u2028two"']
    lines = [f'{{"file_name": "{index}.png", "text": {caption}}}' for index, caption in enumerate(rows)]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    assert list(captions_of(tmp_path).values()) == ["", "", "", "a card", "7", "7", "one\u2028two"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": {"en": "a card"}}')
    with pytest.raises(ValueError, match="line 1: its caption is dict"):
        image_folder(tmp_path)


def test_csv_and_nested_metadata_and_what_they_leave_out(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png", "sub/c.png", "sub/deep/d.png"):
        picture(tmp_path / name)
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,text\na.png,"a ""red"", card"\n', encoding="utf-8")
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "deep/d.png", "text": "deep"}\n')
    (tmp_path / "sub" / "c.txt").write_text("\ufeffbeside\n", encoding="utf-8")
    expected = {"a.png": 'a "red", card', "sub/deep/d.png": "deep", "sub/b.png": "", "sub/c.png": "beside"}
    assert captions_of(tmp_path) == expected
    (tmp_path / "sub" / "deep" / "metadata.csv").write_text("file_name,text\nd.png,other\n")
    with pytest.raises(ValueError, match=r"d.png is listed in .* and in .*: keep one"):
        image_folder(tmp_path)


def test_parquet(tmp_path: Path) -> None:
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(ImportError, match="metadata.parquet needs the pyarrow library"):
            image_folder(tmp_path)
        return
    import pyarrow
    from pyarrow import parquet

    with pytest.raises(ValueError, match="damaged or no parquet"):
        image_folder(tmp_path)
    rows = pyarrow.table({"file_name": ["a.png", "b.png"], "text": ["a card", None]})
    parquet.write_table(rows, tmp_path / "metadata.parquet")
    assert captions_of(tmp_path) == {"a.png": "a card", "b.png": ""}


def test_hidden_things_and_pipes_are_no_images(tmp_path: Path) -> None:
    for name in ("a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png", "._a.png"):
        picture(tmp_path / name)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "metadata.csv").write_text("nonsense")
    os.mkfifo(tmp_path / "pipe.png")
    assert list(captions_of(tmp_path)) == ["a.png"]
    (tmp_path / "metadata.csv").write_text("file_name,text\npipe.png,x\n")
    load = image_folder(tmp_path)[0].open
    assert load is not None
    with pytest.raises(FileNotFoundError):
        load()


def test_images_without_a_caption_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(3):
        picture(tmp_path / f"{index}.png")
    (tmp_path / "0.txt").write_text("a card")
    logging.enable_propagation()
    try:
        image_folder(tmp_path)
    finally:
        logging.disable_propagation()
    assert "2 of 3 images have no caption" in caplog.text


def test_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for name in ("a.txt", "metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_bytes("déjà".encode("latin-1"))
        with pytest.raises(ValueError, match=f"{name} is no UTF-8"):
            image_folder(tmp_path)
        (tmp_path / name).unlink()


def test_empty_or_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images"):
        image_folder(tmp_path)
    with pytest.raises(NotADirectoryError, match="nowhere"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="prompts"):
        prompt_file(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="no prompts"):
        prompt_file(tmp_path / "prompts.txt")


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffone\u2028more\n\n two \nthree", encoding="utf-8")
    examples = prompt_file(tmp_path / "prompts.txt", max_samples=2)
    assert [example.caption for example in examples] == ["one\u2028more", "two"]
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
