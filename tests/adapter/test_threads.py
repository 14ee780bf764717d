"""One model, several threads: other shapes at the same time, disabled in one of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from flatten_diffusion import AdapterConfig, linearize
from flatten_diffusion.models.layer import PassState

from ..models.tiny import build, stir
from ..models.tiny_wrapped import build_wrapped


def prepared(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """A converted model and the changes of input that turn its image: as many tokens, another grid."""
    tiny: Any = build_wrapped(name) if name == "sd3" else build(name)
    tiny.model.requires_grad_(False)
    adapter = linearize(tiny.model, AdapterConfig(deltas=("q",), delta_rank=2, window=2 if name == "sd3" else 0))
    stir(adapter)
    return tiny, adapter, tiny.turn if name == "sd3" else tiny.turned()


def together(*jobs: Callable[[], bool], calls: int) -> list[int]:
    """Each job `calls` times in a thread of its own, at once; how often each was right."""
    right, start = [0] * len(jobs), threading.Barrier(len(jobs))

    def run(index: int, job: Callable[[], bool]) -> None:
        start.wait()
        for _ in range(calls):
            right[index] += job()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(jobs)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return right


@pytest.mark.compatibility(
    "Threads", "works", "other shapes and `disabled` at once; a compiled model wants one thread at a time"
)
@pytest.mark.parametrize("name", ["sd15", "pixart", "sd3"])
def test_other_shapes_and_disabled_at_once(name: str) -> None:
    tiny, adapter, turned = prepared(name)

    def job(changes: dict[str, Any], disabled: bool) -> Callable[[], bool]:
        def call() -> torch.Tensor:
            with torch.no_grad(), adapter.disabled() if disabled else nullcontext():
                output: torch.Tensor = tiny(**changes)
            return output

        expected = call()
        return lambda: torch.equal(call(), expected)

    calls = 40
    assert together(job({}, False), job(turned, False), job({}, True), calls=calls) == [calls] * 3
    assert all(not layer._threads and layer.state.idle for _, layer, _ in adapter.converted_layers())


def test_checkpointed_backward_passes_at_once() -> None:
    tiny, adapter, turned = prepared("pixart")
    tiny.model.train()
    adapter.requires_grad_()
    parameters = list(adapter.parameters())

    def gradients(changes: dict[str, Any]) -> list[torch.Tensor]:
        return list(torch.autograd.grad(tiny(**changes).square().sum(), parameters))

    wanted = [gradients({}), gradients(turned)]
    tiny.model.enable_gradient_checkpointing()

    def job(changes: dict[str, Any], expected: list[torch.Tensor]) -> Callable[[], bool]:
        return lambda: all(map(torch.allclose, gradients(changes), expected))

    assert together(job({}, wanted[0]), job(turned, wanted[1]), calls=15) == [15, 15]


def test_a_thread_that_dies_inside_a_pass_leaves_nothing() -> None:
    tiny, adapter, _ = prepared("pixart")
    handle = tiny.model.transformer_blocks[1].register_forward_hook(lambda *_: 1 / 0)

    def fail() -> None:
        with pytest.raises(ZeroDivisionError), adapter.disabled():
            tiny()

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    handle.remove()
    for _, layer, _ in adapter.converted_layers():
        assert not layer._threads and layer._compiled.__dict__ == PassState().__dict__
