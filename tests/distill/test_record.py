from __future__ import annotations

import pytest
import torch
from flatten_diffusion.distill.record import FeatureTap, LayerCall, watch_teacher

from flatten_diffusion import AdapterConfig, linearize

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
    calls: dict[str, LayerCall] = {}
    students: dict[str, torch.Tensor] = {}

    def consume(call: LayerCall) -> None:
        calls[call.name] = call
        students[call.name] = call.student()

    with torch.no_grad(), watch_teacher(adapter, consume):
        output = tiny()
    assert torch.equal(output, base)  # the watched run is the original
    assert list(calls) and set(calls) == set(adapter.layers)
    for layer, call in calls.items():
        assert torch.equal(call.output, native.outputs[layer])
        mixed = call.attn.to_out[0](call.mixed)
        if call.output.dim() == 3:
            assert torch.equal(mixed, call.output)
        inputs = call.mixer_inputs()
        assert inputs is not None and not torch.equal(students[layer], call.output)
        again = call.attn.to_out[0](call.mixer(*inputs.arguments()).flatten(2))
        again = again + call.mixer.deltas["out"](call.mixer(*inputs.arguments()).flatten(2))
        if call.output.dim() == 3:
            assert torch.allclose(again, students[layer], atol=1e-6)


def test_nothing_is_left_behind() -> None:
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tiny.model.modules()]
    converted = tiny()
    with pytest.raises(RuntimeError, match="stop"), watch_teacher(adapter, _stop):
        tiny()
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tiny.model.modules()]
    assert torch.equal(tiny(), converted)


def _stop(call: LayerCall) -> None:
    raise RuntimeError("stop")


def test_layers_below_min_tokens_have_no_student() -> None:
    tiny = build("sd15")
    adapter = linearize(tiny.model, AdapterConfig(min_tokens=16 * 24))
    seen: dict[str, bool] = {}

    def consume(call: LayerCall) -> None:
        seen[call.name] = call.mixer_inputs() is None
        if seen[call.name]:
            assert torch.equal(call.student(), call.output)

    with torch.no_grad(), watch_teacher(adapter, consume):
        tiny()
    assert set(seen.values()) == {True, False}
