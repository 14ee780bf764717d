from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flatten_diffusion import AdapterConfig, FocusedLinearAttnProcessor, linearize
from flatten_diffusion.models import find_attention_layers, proportional_attention
from flatten_diffusion.models.attention import score_factor
from flatten_diffusion.models.proportional import ProportionalProcessor

from ..models.tiny import build as build_tiny
from ..models.tiny_wrapped import build_wrapped

RATIO = 4.0


def tiny(name: str) -> Any:
    return build_tiny(name) if name in ("sd15", "pixart") else build_wrapped(name)


def image_layers(model: Any) -> list[Any]:
    return [info.attn for info in find_attention_layers(model) if info.reason is None and info.offered is None]


def test_the_factor() -> None:
    assert score_factor(4096, 4) == pytest.approx(math.sqrt(math.log(4096) / math.log(1024)))
    assert score_factor(77, 1.0) == 1.0
    assert score_factor(2, 100) == 1.0  # no logarithm of one token


@pytest.mark.parametrize("name", ["sd15", "pixart"])
@pytest.mark.parametrize("converted", [False, True])
def test_it_is_scaling_by_hand(name: str, converted: bool) -> None:
    """Query projections of self-attention multiplied by hand, in softmax layers and in pyramid ones."""
    it = tiny(name)
    layers = image_layers(it.model)
    if converted:
        linearize(it.model, AdapterConfig(mixer="pyramid"))
    with torch.no_grad():
        plain = it()
        with proportional_attention(it.model, RATIO):
            scaled = it()
        assert torch.equal(it(), plain) and not torch.allclose(scaled, plain, rtol=1e-5, atol=1e-6)
        hooks = []
        for attn in layers:  # each layer has its own number of tokens

            def by_hand(_: Any, args: Any, query: torch.Tensor) -> torch.Tensor:
                return query * score_factor(query.shape[1], RATIO)

            hooks.append(attn.to_q.register_forward_hook(by_hand))
        torch.testing.assert_close(it(), scaled, rtol=1e-4, atol=1e-5)
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("mixer", [None, "pyramid"])
def test_joint_attention_scales_image_and_text(name: str, mixer: str | None) -> None:
    it = tiny(name)
    if mixer is not None:
        linearize(it.model, AdapterConfig(mixer=mixer))
    with torch.no_grad():
        plain = it()
        with proportional_attention(it.model, RATIO):
            scaled = it()
        assert torch.equal(it(), plain) and not torch.equal(scaled, plain)
        # A window that holds the whole image is the softmax itself.
    if mixer is not None:
        other = tiny(name)
        with torch.no_grad(), proportional_attention(other.model, RATIO):
            torch.testing.assert_close(scaled, other(), rtol=1e-3, atol=1e-4)


def test_below_min_tokens_and_disabled_the_softmax_is_scaled() -> None:
    it = tiny("sd15")
    with torch.no_grad(), proportional_attention(it.model, RATIO):
        expected = it()
    adapter = linearize(it.model, AdapterConfig(min_tokens=10_000))
    with torch.no_grad(), proportional_attention(it.model, RATIO):
        assert torch.equal(it(), expected)
    with torch.no_grad(), adapter.disabled(), proportional_attention(it.model, RATIO):
        assert torch.equal(it(), expected)
    joint = tiny("flux")
    with torch.no_grad(), proportional_attention(joint.model, RATIO):
        expected = joint()
    adapter = linearize(joint.model)
    with torch.no_grad(), adapter.disabled(), proportional_attention(joint.model, RATIO):
        assert torch.equal(joint(), expected)


def test_the_focused_map_does_not_see_it() -> None:
    it = tiny("sd15")
    linearize(it.model)
    with torch.no_grad():
        plain = it()
        with proportional_attention(it.model, RATIO):
            assert torch.equal(it(), plain)


def test_windows_beside_it_do() -> None:
    it = tiny("sd15")
    linearize(it.model, AdapterConfig(window=4))
    with torch.no_grad():
        plain = it()
        with proportional_attention(it.model, RATIO):
            assert not torch.allclose(it(), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_processors_are_back_also_after_an_error(name: str) -> None:
    it = tiny(name)
    before = [attn.processor for attn in image_layers(it.model)]
    with pytest.raises(KeyError), proportional_attention(it.model, RATIO):
        assert all(isinstance(attn.processor, ProportionalProcessor) for attn in image_layers(it.model))
        raise KeyError
    assert [attn.processor for attn in image_layers(it.model)] == before


def test_a_ratio_of_one_changes_no_bit() -> None:
    it = tiny("sd15")
    with torch.no_grad():
        plain = it()
        with proportional_attention(it.model, 1):
            torch.testing.assert_close(it(), plain, rtol=0, atol=0)


def test_it_nests_and_keeps_the_outer_one_on_converted_layers() -> None:
    it = tiny("sd15")
    adapter = linearize(it.model, AdapterConfig(mixer="pyramid"))
    with proportional_attention(it.model, 2.0):
        with proportional_attention(it.model, 3.0):
            pass
        assert {layer.state.token_ratio for _, layer, _ in adapter.converted_layers()} == {2.0}
    assert all(layer.state.idle for _, layer, _ in adapter.converted_layers())


def test_what_cannot_be_reached_is_named() -> None:
    it = tiny("sd15")
    it.model.set_attn_processor(FocusedLinearAttnProcessor())
    with (
        pytest.raises(ValueError, match="FocusedLinearAttnProcessor, whose scores"),
        proportional_attention(it.model, 2),
    ):
        pass
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has no self-attention"), proportional_attention(linear, 2):
        pass
    with pytest.raises(ValueError, match="positive number"), proportional_attention(it.model, 0):
        pass


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_compiled_models_follow(name: str) -> None:
    it = tiny(name)
    linearize(it.model, AdapterConfig(mixer="pyramid"))
    torch._dynamo.reset()
    compiled = torch.compile(it.model, backend="aot_eager", dynamic=False, fullgraph=True)
    with torch.no_grad():
        for ratio in (1.0, RATIO, 1.0):
            with proportional_attention(it.model, ratio):
                torch.testing.assert_close(it(compiled), it(), rtol=1e-3, atol=1e-4)
