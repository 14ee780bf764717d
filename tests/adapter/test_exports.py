"""Graphs of whole converted models: torch.jit.trace is refused, torch.export gives what the model gives."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from flatten_diffusion import FocusedLinearAttnProcessor, linearize, restore

from ..models.tiny import build, stir
from ..models.tiny_wrapped import build_wrapped


class Flat(torch.nn.Module):
    """A model that is called by position, as a trace calls it."""

    def __init__(self, tiny: Any) -> None:
        super().__init__()
        self.model, self.names = tiny.model, list(tiny.inputs)

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(**dict(zip(self.names, values, strict=True)), return_dict=False)[0]
        return output


def trace(tiny: Any) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that sizes become constants, and that tracing is old
        return torch.jit.trace(Flat(tiny).eval(), tuple(tiny.inputs.values()), check_trace=False)


@pytest.mark.compatibility("torch.jit.trace", "refused", "of a converted model: `torch.export.export` follows it")
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_trace_of_a_converted_model_is_refused(name: str) -> None:
    tiny: Any = build(name) if name == "sd15" else build_wrapped(name)
    adapter = linearize(tiny.model)
    with pytest.raises(RuntimeError, match="cannot be traced by torch.jit: use torch.export.export") as error:
        trace(tiny)
    assert "\n" not in str(error.value)
    assert all(layer.state.idle for _, layer, _ in adapter.converted_layers())
    with torch.no_grad(), adapter.disabled():
        traced = trace(tiny)
        native = Flat(tiny)(*tiny.inputs.values())
    torch.testing.assert_close(traced(*tiny.inputs.values()), native)
    restore(tiny.model)
    trace(tiny)


def test_a_trace_of_the_parameter_free_swap_is_right_at_any_size() -> None:
    tiny = build("sd15")
    tiny.model.set_attn_processor(FocusedLinearAttnProcessor())
    traced = trace(tiny)
    with torch.no_grad():
        for inputs in (tiny.inputs, tiny.inputs | tiny.turned()):
            torch.testing.assert_close(traced(*inputs.values()), Flat(tiny)(*inputs.values()), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.compatibility("torch.export", "works", "one size of image, which its guards hold; Flux with `pin_grid`")
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_an_exported_program_gives_what_the_model_gives(name: str) -> None:
    tiny: Any = build(name) if name == "sd15" else build_wrapped(name)
    adapter = linearize(tiny.model)
    stir(adapter)
    if name == "flux":
        adapter.pin_grid(tiny.grid)
    else:
        adapter.set_backend("reference")  # whose nodes are torch's own, as ONNX wants them
    with torch.no_grad():
        expected = Flat(tiny)(*tiny.inputs.values())
        program = torch.export.export(tiny.model.eval(), (), dict(tiny.inputs, return_dict=False))
        torch.testing.assert_close(program.module()(**tiny.inputs, return_dict=False)[0], expected)
        if name == "sd15":
            assert not any("flatten_diffusion" in str(node.target) for node in program.graph.nodes)
            with pytest.raises(AssertionError, match="Guard failed"):
                program.module()(**tiny.inputs | tiny.turned(), return_dict=False)
