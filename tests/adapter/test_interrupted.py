"""Ctrl-C at the lines of linearize, merge, unmerge and restore: all is as before, or the call can be repeated."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from flatten_diffusion import AdapterConfig, linearize, restore
from flatten_diffusion.adapter import convert
from flatten_diffusion.models import find_attention_layers

from ..models.tiny import assert_untouched, build, stir
from ..models.tiny_wrapped import build_wrapped

PACKAGE = str(Path(convert.__file__).parent.parent)
CONFIG = AdapterConfig(deltas=("q", "out"), delta_rank=2)


def lines_of(call: Callable[[], Any]) -> int:
    """How many lines of this package a call runs."""
    return _traced(call, -1)[0]


def interrupted_at(call: Callable[[], Any], line: int) -> bool:
    """Run a call with a KeyboardInterrupt at one of them; whether that came out."""
    return _traced(call, line)[1]


def _traced(call: Callable[[], Any], stop: int) -> tuple[int, bool]:
    seen = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            seen += 1
            if seen - 1 == stop:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return seen, True
    finally:
        sys.settrace(before)
    return seen, False


def steps(count: int) -> range:
    """Some 60 of them, in a stride that no loop shares."""
    return range(0, count, max(1, count // 60) | 1)


def tiny_of(name: str) -> Any:
    tiny = build_wrapped(name) if name == "sd3" else build(name)
    tiny.model.requires_grad_(False)
    return tiny


def processors(model: torch.nn.Module) -> dict[str, Any]:
    return {layer.name: layer.attn.processor for layer in find_attention_layers(model)}


@pytest.mark.compatibility("Ctrl-C inside linearize", "works", "the model is as it was")
@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_linearize(name: str) -> None:
    tiny = tiny_of(name)
    keys, modules, before = list(tiny.model.state_dict()), list(tiny.model.named_modules()), processors(tiny.model)
    native = tiny()
    linearize(tiny.model, CONFIG)  # the first makes processor classes, which are kept
    restore(tiny.model)
    count = lines_of(lambda: linearize(tiny.model, CONFIG))
    restore(tiny.model)
    assert count > 500
    for line in steps(count):
        assert interrupted_at(lambda: linearize(tiny.model, CONFIG), line)
        assert processors(tiny.model) == before, line
        assert_untouched(tiny.model, keys, modules)
    assert torch.equal(tiny(), native)
    linearize(tiny.model, CONFIG)


@pytest.mark.compatibility("Ctrl-C inside restore", "works", "the next `restore` finishes it")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_restore(name: str, merged: bool) -> None:
    tiny = tiny_of(name)
    keys, modules, before = list(tiny.model.state_dict()), list(tiny.model.named_modules()), processors(tiny.model)
    weights = {key: tensor.clone() for key, tensor in tiny.model.state_dict().items()}

    def converted() -> None:
        adapter = linearize(tiny.model, CONFIG)
        stir(adapter)
        if merged:
            adapter.merge()

    converted()
    count = lines_of(lambda: restore(tiny.model))
    for line in steps(count):
        converted()
        assert interrupted_at(lambda: restore(tiny.model), line)
        if hasattr(tiny.model, "flatten_adapter"):
            restore(tiny.model)
        with pytest.raises(ValueError, match="nothing to restore"):
            restore(tiny.model)
        assert processors(tiny.model) == before, line
        assert_untouched(tiny.model, keys, modules)
        assert all(torch.equal(tensor, weights[key]) for key, tensor in tiny.model.state_dict().items()), line


@pytest.mark.parametrize("what", ["merge", "unmerge"])
def test_merge_and_unmerge(what: str) -> None:
    tiny = tiny_of("pixart")
    adapter = linearize(tiny.model, CONFIG)
    stir(adapter)
    apart = tiny()
    adapter.merge()
    together = tiny()
    adapter.unmerge()
    if what == "unmerge":
        adapter.merge()
    count = lines_of(getattr(adapter, what))
    adapter.unmerge() if what == "merge" else adapter.merge()
    for line in steps(count):
        assert interrupted_at(getattr(adapter, what), line)
        assert torch.equal(tiny(), together if adapter.is_merged else apart), line
        if adapter.is_merged != (what == "unmerge"):  # it came through before the interrupt
            adapter.unmerge() if what == "merge" else adapter.merge()
    adapter.unmerge()
    assert torch.equal(tiny(), apart)


def test_disabled() -> None:
    tiny = tiny_of("pixart")
    native = tiny()
    adapter = linearize(tiny.model, CONFIG)
    stir(adapter)
    converted = tiny()

    def use() -> None:
        with adapter.disabled():
            pass

    for line in range(lines_of(use)):
        assert interrupted_at(use, line)
        assert torch.equal(tiny(), converted), line
        assert all(layer.state.idle for _, layer, _ in adapter.converted_layers()), line
    with adapter.disabled():
        assert torch.equal(tiny(), native)
