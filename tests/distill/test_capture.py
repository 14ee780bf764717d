from __future__ import annotations

import pytest
import torch

from flatten_diffusion import AdapterConfig, linearize
from flatten_diffusion.distill.capture import FeatureTap, LayerCapture, capture_teacher

from ..models.tiny import build, stir


@pytest.mark.parametrize("name", ["sd15", "unet2d", "dit", "pixart"])
def test_teacher_and_student_of_every_layer(name: str) -> None:
    tiny = build(name)
    base = tiny()
    adapter = linearize(tiny.model)
    adapter.add_deltas(("q", "k", "v", "out"))
    stir(adapter)
    with FeatureTap(adapter) as native, adapter.disabled():
        tiny()
    calls: dict[str, LayerCapture] = {}
    students: dict[str, torch.Tensor] = {}

    def consume(call: LayerCapture) -> None:
        calls[call.name] = call
        students[call.name] = call.student()

    with torch.no_grad(), capture_teacher(adapter, consume):
        output = tiny()
    assert torch.equal(output, base)  # the watched run is the original
    assert list(calls) and set(calls) == set(adapter.layers)
    for layer, call in calls.items():
        assert torch.equal(call.output, native.outputs[layer])
        mixed = call.attn.to_out[0](call.mixed)
        if call.output.dim() == 3:
            assert torch.equal(mixed, call.output)
        assert call.is_mixed and not torch.equal(students[layer], call.output)
        mixed = call.inputs.mix(call.mixer).flatten(2)
        again = call.attn.to_out[0](mixed) + call.carried.deltas["out"](mixed)
        if call.output.dim() == 3:
            assert torch.allclose(again, students[layer], atol=1e-6)


def test_nothing_is_left_behind() -> None:
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tiny.model.modules()]
    converted = tiny()
    with pytest.raises(RuntimeError, match="stop"), capture_teacher(adapter, _stop):
        tiny()
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tiny.model.modules()]
    assert torch.equal(tiny(), converted)


def _stop(call: LayerCapture) -> None:
    raise RuntimeError("stop")


def test_layers_below_min_tokens_have_no_student() -> None:
    tiny = build("sd15")
    adapter = linearize(tiny.model, AdapterConfig(min_tokens=16 * 24))
    seen: dict[str, bool] = {}

    def consume(call: LayerCapture) -> None:
        seen[call.name] = not call.is_mixed
        if seen[call.name]:
            assert torch.equal(call.student(), call.output)

    with torch.no_grad(), capture_teacher(adapter, consume):
        tiny()
    assert set(seen.values()) == {True, False}
