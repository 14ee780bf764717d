"""Converted and restored 500 times: nothing stays behind."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from flatten_diffusion import AdapterConfig, linearize, load_adapter, restore
from flatten_diffusion.models import wrapped
from flatten_diffusion.models.autotune import _found
from flatten_diffusion.models.processor import _class_with
from flatten_diffusion.models.timing import _known

from ..models.tiny import build, stir
from ..models.tiny_wrapped import build_wrapped

CONFIG = AdapterConfig(deltas=("q", "out"), delta_rank=2)


def hooks_of(model: torch.nn.Module) -> int:
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
            module._state_dict_hooks,
            module._load_state_dict_pre_hooks,
        )
    )


def kept_by_modules() -> tuple[int, ...]:
    """Sizes of what this package keeps for the life of the process."""
    return len(wrapped._CLASSES), _class_with.cache_info().currsize, len(_found), len(_known)


def alive() -> Counter[str]:
    """Objects that the collector follows, by class."""
    gc.collect()
    return Counter(type(found).__name__ for found in gc.get_objects())


@pytest.mark.slow
@pytest.mark.compatibility("Converting and restoring", "works", "500 times without a leak")
@pytest.mark.parametrize(("name", "times"), [("sd15", 400), ("sd3", 100)])
def test_nothing_stays_behind(name: str, times: int, tmp_path: Path) -> None:
    tiny: Any = build(name) if name == "sd15" else build_wrapped(name)
    keys, hooks, attributes = list(tiny.model.state_dict()), hooks_of(tiny.model), set(vars(tiny.model))
    stir(linearize(tiny.model, CONFIG))
    tiny.model.flatten_adapter.save_pretrained(tmp_path)
    restore(tiny.model)

    def convert(turn: int) -> list[weakref.ref[Any]]:
        adapter = load_adapter(tiny.model, tmp_path) if turn % 5 == 0 else linearize(tiny.model, CONFIG)
        if turn % 20 == 0:
            with torch.no_grad(), adapter.disabled():
                tiny()
            tiny().sum().backward()
            tiny.model.zero_grad(set_to_none=True)
        if turn % 7 == 0:
            adapter.merge()
        _, layer, mixer = next(adapter.converted_layers())
        traces = [weakref.ref(thing) for thing in (adapter, layer, mixer)]
        restore(tiny.model)
        return traces

    for turn in range(21):
        convert(turn)
    process = psutil.Process()
    before, kept, memory = alive(), kept_by_modules(), process.memory_info().rss
    traces = [trace for turn in range(times) for trace in convert(turn)]
    assert kept_by_modules() == kept
    assert (list(tiny.model.state_dict()), hooks_of(tiny.model)) == (keys, hooks)
    assert set(vars(tiny.model)) == attributes
    gc.collect()
    assert all(trace() is None for trace in traces)
    del traces
    grown = alive() - before
    # The interpreter's own caches may grow by a little, once; a leak grows by at least one object each time.
    assert sum(grown.values()) < times / 2, grown.most_common(5)
    assert process.memory_info().rss - memory < 16 * 2**20
