"""Fusing and unfusing projections around a conversion, in every order: bit-equal after, and nothing of ours counts."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from flatten_diffusion import AdapterConfig, FocusedLinearAttnProcessor, linearize, restore
from flatten_diffusion.models import AdapterAttnProcessor, WrappedProcessor, find_attention_layers

from ..models.tiny import build, stir
from ..models.tiny_wrapped import build_wrapped

WRAPPED = ("hunyuandit", "cogvideox", "auraflow", "sd3", "flux")
# Older diffusers change Flux's processors while fusing, and give AuraFlow no adapters.
older = pytest.mark.skipif(
    not hasattr(diffusers.AuraFlowTransformer2DModel, "add_adapter"), reason="an older diffusers"
)
FLUX = pytest.param("flux", marks=older)
NAMES = ("sd15", "sdxl", "pixart", *WRAPPED)


def tiny_of(name: str) -> Any:
    if name not in WRAPPED:
        return build(name)
    tiny = build_wrapped(name)
    if name == "sd3":  # fused, diffusers itself cannot run dual attention, and forgets the norms of query and key
        plain: dict[str, Any] = {**tiny.model.config, "dual_attention_layers": (), "qk_norm": None}
        tiny.model = type(tiny.model)(**plain).eval()
    return tiny


def kinds(model: nn.Module) -> dict[str, str]:
    """The class of each processor; one of ours that carries nothing counts as what it runs."""
    found = {}
    for layer in find_attention_layers(model):
        processor: Any = layer.attn.processor
        if isinstance(processor, WrappedProcessor):
            processor = processor.native
        elif isinstance(processor, AdapterAttnProcessor):
            processor = processor.native_of(layer.attn)  # type: ignore[arg-type]
        found[layer.name] = type(processor).__name__
    return found


def orders() -> list[tuple[str, ...]]:
    """Every order in which fuse comes before unfuse and linearize before restore."""
    steps = ("fuse", "unfuse", "linearize", "restore")
    return [
        order
        for order in itertools.permutations(steps)
        if order.index("fuse") < order.index("unfuse") and order.index("linearize") < order.index("restore")
    ]


def act(tiny: Any, step: str) -> None:
    if step == "fuse":
        tiny.model.fuse_qkv_projections()
    elif step == "unfuse":
        tiny.model.unfuse_qkv_projections()
    elif step == "linearize":
        stir(linearize(tiny.model, AdapterConfig(deltas=("q", "out"), delta_rank=2)))
    else:
        restore(tiny.model)


@pytest.mark.compatibility(
    "fuse_qkv_projections",
    "order matters",
    "fuse before converting; fused later, calls are refused until unfused; all orders end bit-equal",
)
@torch.no_grad()
@pytest.mark.parametrize("order", orders(), ids="-".join)
@pytest.mark.parametrize("name", [*NAMES[:-1], FLUX])
def test_all_orders_end_where_they_began(name: str, order: tuple[str, ...]) -> None:
    tiny, plain = tiny_of(name), tiny_of(name)
    plain.model.load_state_dict(tiny.model.state_dict())
    before, native = kinds(tiny.model), tiny()
    act(plain, "fuse")
    fused, results, converted = plain(), [native], False
    torch.testing.assert_close(fused, native, rtol=1e-4, atol=1e-5)
    for step in order:
        act(tiny, step)
        converted = {"linearize": True, "restore": False}.get(step, converted)
        if not converted:
            results.append(tiny())
            assert torch.equal(results[-1], native) or torch.equal(results[-1], fused), step
        elif step == "linearize":
            linear = tiny()
            assert not torch.equal(linear, native)
        elif name == "flux":  # its processors look at the layer's flag
            torch.testing.assert_close(tiny(), linear, rtol=1e-3, atol=1e-4)
        elif step == "fuse":
            with pytest.raises(RuntimeError, match="was replaced by Fused.* after linearize"):
                tiny()
        elif order.index("fuse") > order.index("linearize"):
            assert torch.equal(tiny(), linear)  # unfuse put ours back
        else:
            with pytest.raises(RuntimeError, match="was replaced by .* after linearize"):
                tiny()
    assert kinds(tiny.model) == before
    assert torch.equal(tiny(), native)
    if (
        order == ("linearize", "fuse", "restore", "unfuse") and name != "flux"
    ):  # diffusers had kept ours, which carry nothing by now
        with pytest.raises(ValueError, match="converted already: call restore"):
            linearize(tiny.model)
        restore(tiny.model)
    found = [layer.attn.processor for layer in find_attention_layers(tiny.model)]
    assert not any(isinstance(processor, (FocusedLinearAttnProcessor, WrappedProcessor)) for processor in found)
    assert kinds(tiny.model) == before and torch.equal(tiny(), native)
    act(tiny, "linearize")
    assert not torch.equal(tiny(), native)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "auraflow", FLUX])
def test_merge_after_unfusing_as_its_error_says(name: str) -> None:
    tiny = tiny_of(name)
    native = tiny()
    adapter = linearize(tiny.model, AdapterConfig(deltas=("q", "out"), delta_rank=2))
    stir(adapter)
    linear = tiny()
    tiny.model.fuse_qkv_projections()
    if name == "flux":
        with pytest.raises(ValueError, match="call unfuse_qkv_projections"):
            adapter.merge()
    tiny.model.unfuse_qkv_projections()
    adapter.merge()
    torch.testing.assert_close(tiny(), linear, rtol=1e-3, atol=1e-4)
    restore(tiny.model)
    assert torch.equal(tiny(), native)


@torch.no_grad()
def test_deltas_where_fusing_changes_nothing_that_is_read() -> None:
    tiny = build_wrapped("ltx")
    adapter = linearize(tiny.model, AdapterConfig(deltas=("q", "k", "v", "out"), delta_rank=2))
    stir(adapter)
    expected = tiny()
    for attn, _, _ in adapter.converted_layers():
        if not hasattr(attn, "fuse_projections"):
            pytest.skip("this diffusers does not fuse LTX")
        attn.fuse_projections()
    torch.testing.assert_close(tiny(), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("order", orders(), ids="-".join)
@pytest.mark.parametrize("name", ["sd15", pytest.param("auraflow", marks=older)])
def test_a_later_lora_counts(name: str, order: tuple[str, ...]) -> None:
    peft = pytest.importorskip("peft")
    tiny, plain = tiny_of(name), tiny_of(name)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    for step in order:
        act(tiny, step)
    for model in (tiny.model, plain.model):
        torch.manual_seed(5)
        model.add_adapter(config)
    assert torch.equal(tiny(), plain())
