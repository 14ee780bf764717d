"""Captions as training and evaluation both read them: from metadata files, else from a .txt beside the image."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from .files import parse_json

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of the files that caption images; each lists those of its own folder and below by paths relative to it."""


def decode_text(content: bytes, source: str) -> str:
    """UTF-8 text, without its byte order mark. Raises ValueError for anything else, naming `source`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no UTF-8 text (byte {error.start}): save it as UTF-8.") from error


def as_caption(value: Any, source: str) -> str:
    """A caption, stripped; the first of several; "" for what is missing: null, NaN, an empty list.

    Raises:
        ValueError: neither text nor a whole number, naming `source`.
    """
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    if value is None or value != value:  # NaN, as tables write what is missing
        return ""
    if isinstance(value, float) and value.is_integer():  # a class in a column that also has gaps
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{source}: its caption is {type(value).__name__}, not text.")
    return str(value).strip()


def read_metadata(content: bytes, source: str, image_column: str, caption_column: str) -> list[tuple[str, str]]:
    """(file name, caption) of each row, in order; the format is that of the suffix of `source`, a name or path.

    Raises:
        ValueError: a row that cannot be read or lacks a column; names `source` and the line.
        ImportError: a parquet file without pyarrow.
    """
    read = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}[PurePath(source).suffix]
    listed = []
    for where, row in read(content, source):
        name = row.get(image_column) if isinstance(row, Mapping) else None
        if not isinstance(name, str) or not name or caption_column not in row:
            raise ValueError(f"{where}: it must hold {image_column!r} and {caption_column!r}.")
        listed.append((name, as_caption(row[caption_column], where)))
    return listed


def _json_lines(content: bytes, source: str) -> Iterable[tuple[str, Any]]:
    # Not splitlines(): U+2028 and its like may stand inside a caption.
    for number, line in enumerate(decode_text(content, source).split("\n"), start=1):
        if line.strip():
            where = f"{source}, line {number}"
            yield where, parse_json(line, where, constant=lambda name: None)


def _csv_rows(content: bytes, source: str) -> Iterable[tuple[str, Any]]:
    rows = csv.DictReader(io.StringIO(decode_text(content, source), newline=""))
    try:
        for row in rows:
            yield f"{source}, line {rows.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{source}, line {rows.line_num}: {error}.") from error


def _parquet_rows(content: bytes, source: str) -> Iterable[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"{source} needs the pyarrow library: pip install pyarrow, or write metadata.csv.") from error
    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{source} is damaged or no parquet file ({str(error)[:200]}).") from error
    yield from ((f"{source}, row {number}", row) for number, row in enumerate(rows))
