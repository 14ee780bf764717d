"""Prompt files."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import InputError


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file (one per line) or a JSON lines file (key text, prompt or caption).

    Raises:
        InputError: missing, empty, not UTF-8, or malformed.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such prompts file")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; give one prompt per line") from error
    if path.suffix in (".jsonl", ".ndjson"):
        prompts = [_prompt_of(path, number, line) for number, line in enumerate(lines, 1) if line]
    else:
        prompts = [line for line in lines if line]
    if not prompts:
        raise InputError(f"{path}: holds no prompts; give one per line")
    return prompts


def _prompt_of(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
        for key in ("text", "prompt", "caption"):
            if isinstance(row, dict) and isinstance(row.get(key), str):
                return str(row[key])
    except ValueError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error})") from error
    raise InputError(f"{path}, line {number}: needs a text, prompt or caption")
