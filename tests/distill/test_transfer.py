from __future__ import annotations

from typing import Any

import pytest
import torch

from flatten_diffusion import AdapterConfig, linearize
from flatten_diffusion.adapter import Adapter
from flatten_diffusion.distill import transfer_step
from flatten_diffusion.distill.capture import FeatureTap
from flatten_diffusion.models import LAYER, TokenLayout

from ..models.tiny import Tiny, build, stir


def prepared(name: str) -> tuple[Tiny, Adapter]:
    tiny = build(name)
    tiny.model.requires_grad_(False)
    adapter = linearize(tiny.model)
    adapter.add_deltas(("q", "k", "v", "out"), 2)
    stir(adapter)
    return tiny, adapter


@pytest.mark.parametrize("name", ["sd15", "dit", "pixart"])
def test_gradients_are_each_layers_own(name: str) -> None:
    tiny, adapter = prepared(name)
    inputs: dict[str, tuple[Any, ...]] = {}
    handles = [
        attn.register_forward_pre_hook(lambda module, args, layer=layer: inputs.__setitem__(layer, args))
        for layer, attn in adapter.attention_modules()
    ]
    with torch.no_grad(), adapter.disabled(), FeatureTap(adapter) as teacher:
        tiny()
    for handle in handles:
        handle.remove()
    tiny()  # says the grids of this image
    expected: dict[str, torch.Tensor] = {}
    losses: dict[str, float] = {}
    for layer, attn in adapter.attention_modules():
        wanted, state = teacher.outputs[layer], getattr(attn, LAYER)
        state.begin(TokenLayout(state.last_grid))
        pairs = zip(attn(*inputs[layer]), wanted, strict=True)
        state.end()
        loss = torch.stack([(one - other).square().sum() / other.square().sum() for one, other in pairs]).mean()
        own = dict(attn.flatten_mixer.named_parameters())
        gradients = torch.autograd.grad(loss, list(own.values()))
        expected.update({f"{layer}.{key}": gradient for key, gradient in zip(own, gradients, strict=True)})
        losses[layer] = loss.item()

    found = transfer_step(adapter, tiny)
    assert {layer: loss.item() for layer, loss in found.items()} == pytest.approx(losses, rel=1e-5)
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[key], rtol=1e-4, atol=1e-7), key
    assert all(parameter.grad is None for parameter in tiny.model.parameters() if not parameter.requires_grad)


def test_the_residual_does_not_count() -> None:
    """With the input added to the output, the error is relative to what the attention alone adds."""
    tiny, adapter = prepared("unet2d")
    attn = next(attn for _, attn in adapter.attention_modules())
    assert attn.residual_connection
    plain = {name: loss.item() for name, loss in transfer_step(adapter, tiny).items()}
    for _, module in adapter.attention_modules():
        module.residual_connection = False
    # The same teacher inputs need the residuals in the network, so only the first layer sees what it saw before.
    first = adapter.layers[0]
    assert transfer_step(adapter, tiny)[first].item() == pytest.approx(plain[first], rel=1e-4)


def test_steps_lower_the_error() -> None:
    tiny, adapter = prepared("sd15")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    first: dict[str, torch.Tensor] = {}
    for _ in range(15):
        optimizer.zero_grad()
        last = transfer_step(adapter, tiny)
        first = first or last
        optimizer.step()
    assert all(last[name] < 0.8 * first[name] for name in first)


def test_softmax_layers_are_left_out() -> None:
    tiny = build("sd15")
    tiny.model.requires_grad_(False)
    adapter = linearize(tiny.model, AdapterConfig(min_tokens=16 * 24))
    losses = transfer_step(adapter, tiny)
    assert 0 < len(losses) < len(adapter.layers)
