"""Atomic writes, leftovers of killed writers, bounded JSON, digests."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flatten_diffusion.files import (
    JSON_LIMIT,
    atomic_path,
    parse_json,
    read_json,
    read_tensors,
    sha256_of_tensors,
    write_bytes,
    write_json,
    write_tensors,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a[1].json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": float("nan")})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert read_json(path) == {"x": 1}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_leftovers_of_killed_writers_are_swept_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    code = (
        "import os, sys; from pathlib import Path; from flatten_diffusion.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as t:\n    t.write_bytes(b'half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_path(path) as own:
        own.write_bytes(b"mine")
        write_bytes(path, b"whole")
        assert own.exists()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"mine"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for value in ("one", "two"):
        with atomic_path(tmp_path / "folder", folder=True) as temporary:
            (temporary / value).write_text(value)
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["two"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"{", b"\xff\xfe", b"[NaN]", b"[1e400]", b" " * (JSON_LIMIT + 1)],
    ids=["nested", "truncated", "binary", "nan", "infinite", "huge"],
)
def test_bad_json_is_one_short_line(content: bytes) -> None:
    with pytest.raises(ValueError, match="config is truncated or no JSON") as caught:
        parse_json(content, "config")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_digest_knows_values_names_and_description() -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(0, dtype=torch.bfloat16)}
    digest = sha256_of_tensors(tensors)
    assert digest == sha256_of_tensors(dict(reversed(tensors.items())))
    others = [{"a": torch.ones(3), "c": tensors["b"]}, {"a": torch.ones(3).half(), "b": tensors["b"]}]
    assert digest not in {*map(sha256_of_tensors, others), sha256_of_tensors(tensors, "x")}


def test_tensors_come_back_or_are_damaged(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", {"a": torch.arange(3.0), "b": torch.tensor(2)}
    write_tensors(path, tensors, "said")
    back, description = read_tensors(path)
    assert description == "said" and all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    whole = path.read_bytes()
    for damaged in (
        whole.replace(b"said", b"paid"),
        whole[:-1] + b"\1",
        whole[:-8],
        whole.replace(b'"b"', b'"c"'),
        b"",
    ):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match="damaged"):
            read_tensors(path)
