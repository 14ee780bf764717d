"""Hundreds of damaged adapters: each is refused in one short line, or gives the output that was saved."""

from __future__ import annotations

import json
import random
import string
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize, load_adapter, restore
from flatten_diffusion.adapter import saving

from ..models.tiny import Tiny, build, stir

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What a fault injector puts in a value's place.
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 10**23, 10**400, 0.5, -0.0, "", "x", "x" * 10**5, "a\nb", "\u2028", "../../etc/passwd",
    [], {}, [[]], {"": 0}, [None] * 1000, {"name": "focused_linear"}, "auto", "focused_linear", 3001, 63, 1e308,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tiny, torch.Tensor, torch.Tensor]:
    """A folder with an adapter, the model that it fits, the model's own output, and the one that it must give."""
    folder = tmp_path_factory.mktemp("saved")
    tiny = build("pixart")
    tiny.model.requires_grad_(False)
    native = tiny()
    own = {"transformer_blocks.1.attn1": FocusedLinearConfig(2.0, 3)}
    adapter = linearize(tiny.model, AdapterConfig(overrides=own, deltas=("q",), delta_rank=2))
    stir(adapter)
    adapter.save_pretrained(folder)
    converted = tiny()
    restore(tiny.model)
    return folder, tiny, native, converted


def judge(saved: tuple[Path, Tiny, torch.Tensor, torch.Tensor], folder: Path, what: Any, exact: bool = True) -> bool:
    """Whether the folder was refused, as it should be; where it loads, it must give what was saved, if `exact`."""
    _, tiny, _, converted = saved
    keys = list(tiny.model.state_dict())
    try:
        load_adapter(tiny.model, folder)
    except (ValueError, OSError) as error:
        message = str(error)
        assert "\n" not in message and len(message) < 400 + len(str(folder)), (what, message[:1000])
        assert not isinstance(error, UnicodeError), (what, message)
        assert list(tiny.model.state_dict()) == keys and not hasattr(tiny.model, "flatten_adapter"), what
        return True
    with torch.no_grad():
        output = tiny()
    restore(tiny.model)
    assert output.isfinite().all(), what
    assert torch.equal(output, converted) or not exact, what
    return False


def copied(folder: Path, target: Path) -> dict[str, bytes]:
    """The files' contents, copied to another folder."""
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    for name, content in files.items():
        (target / name).write_bytes(content)
    return files


def test_the_judge_itself(saved: Any, tmp_path: Path) -> None:
    copied(saved[0], tmp_path)
    assert not judge(saved, tmp_path, "untouched")
    with torch.no_grad():
        assert torch.equal(saved[1](), saved[2]) and not torch.equal(saved[2], saved[3])


def test_single_bits_of_the_config(saved: Any, tmp_path: Path) -> None:
    """None of them loads with another output; most do not load at all."""
    content = copied(saved[0], tmp_path)[CONFIG]
    randomness = random.Random(0)
    refused = 0
    for position in randomness.sample(range(8 * len(content)), 220):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        (tmp_path / CONFIG).write_bytes(damaged)
        refused += judge(saved, tmp_path, position)
    assert refused > 150


def test_single_bits_of_the_weights(saved: Any, tmp_path: Path) -> None:
    content = copied(saved[0], tmp_path)[WEIGHTS]
    randomness = random.Random(1)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    positions = [*range(0, 64, 3), *randomness.sample(range(64, 8 * header), 60)]
    positions += randomness.sample(range(8 * header, 8 * len(content)), 30)
    for position in positions:
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        (tmp_path / WEIGHTS).write_bytes(damaged)
        refused = judge(saved, tmp_path, position)
        assert refused or position < 8 * header, position  # spaces of the header mean nothing


def test_pieces_of_files(saved: Any, tmp_path: Path) -> None:
    files = copied(saved[0], tmp_path)
    randomness = random.Random(2)
    for name, content in files.items():
        for _ in range(25):
            start, stop = sorted(randomness.sample(range(len(content)), 2))
            junk = randomness.randbytes(randomness.randrange(40))
            for damaged in (content[:start], content[:start] + content[stop:], content[:start] + junk + content[stop:]):
                (tmp_path / name).write_bytes(damaged)
                refused = judge(saved, tmp_path, (name, start, stop))
                assert refused or name == CONFIG, (name, start, stop)  # its digest cut: as if of an earlier save
        (tmp_path / name).write_bytes(content)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a JSON text."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += paths(part, (*at, key))
    return found


def changed(description: Any, randomness: random.Random) -> Any:
    """A value replaced, removed, or one beside it that does not belong there."""
    description = json.loads(json.dumps(description))
    *parents, last = randomness.choice(paths(description))
    target = description
    for key in parents:
        target = target[key]
    kind = randomness.random()
    if kind < 0.7:
        target[last] = randomness.choice(STRANGE)
    elif kind < 0.85:
        del target[last]
    elif isinstance(target, dict):
        target["".join(randomness.choices(string.printable, k=randomness.choice((1, 10, 10**4))))] = 1
    else:
        target.append(target[last])
    return description


@pytest.mark.parametrize("signed", [False, True])
def test_values_of_the_config(saved: Any, tmp_path: Path, signed: bool) -> None:
    """Signed again, as one who writes such files would: then they may load with what they say, if they fit."""
    files = copied(saved[0], tmp_path)
    description, tensors = json.loads(files[CONFIG]), load_file(tmp_path / WEIGHTS)
    randomness = random.Random(3 + signed)
    loaded = 0
    for _ in range(150):
        other = changed(description, randomness)
        if signed and isinstance(other, dict):
            other["sha256"] = saving.signature(tensors, other)
            save_file(tensors, tmp_path / WEIGHTS, metadata={"adapter_config": json.dumps(other)})
        (tmp_path / CONFIG).write_text(json.dumps(other))
        loaded += not judge(saved, tmp_path, other, exact=not signed)
    assert loaded < 75


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "9" * 10**5, "NaN", '"\\ud800"', "\ufeff{}", "1e999"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_json_beyond_sense(saved: Any, tmp_path: Path, name: str, text: str) -> None:
    copied(saved[0], tmp_path)
    if name == CONFIG:
        (tmp_path / CONFIG).write_text(text)
    else:
        save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata={"adapter_config": text})
    assert judge(saved, tmp_path, text[:20])


def test_places_that_are_no_files(saved: Any, tmp_path: Path) -> None:
    import os

    files = copied(saved[0], tmp_path)
    for name, content in files.items():
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        assert judge(saved, tmp_path, f"{name} is a folder")
        (tmp_path / name).rmdir()
        os.mkfifo(tmp_path / name)  # reading it would wait for ever
        assert judge(saved, tmp_path, f"{name} is a pipe")
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
        assert judge(saved, tmp_path, f"{name} leads nowhere")
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(content)
    assert not judge(saved, tmp_path, "whole again")
