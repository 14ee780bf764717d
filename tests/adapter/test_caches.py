"""diffusers' caches over steps: put on before or after a conversion, taken off, and what they keep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from flatten_diffusion import linearize, restore

from ..models.tiny import stir
from ..models.tiny_wrapped import build_wrapped

if not hasattr(diffusers, "TaylorSeerCacheConfig") or not hasattr(diffusers, "MagCacheConfig"):
    pytest.skip("this diffusers has fewer caches", allow_module_level=True)

STEPS = 4
CLOCK = {"timestep": 0}


def steps(tiny: Any) -> list[torch.Tensor]:
    """The outputs of a few steps on slowly changing latents, caches empty before."""
    if tiny.model.is_cache_enabled:
        tiny.model._reset_stateful_cache()
    torch.manual_seed(0)
    start, drift = tiny.inputs["hidden_states"], torch.randn_like(tiny.inputs["hidden_states"])
    context = getattr(tiny.model, "cache_context", lambda name: contextlib.nullcontext())
    outputs = []
    with torch.no_grad():
        for step in range(STEPS):
            CLOCK["timestep"] = 900 - 100 * step
            with context("cond"):
                outputs.append(tiny(hidden_states=start + 1e-3 * step * drift))
    return outputs


def differ(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check(make_config: Callable[[], Any], name: str = "flux") -> None:
    """Before or after the conversion the same; steps are really skipped; native inside disabled; gone afterwards."""
    tiny, late = build_wrapped(name), build_wrapped(name)
    native = steps(tiny)
    tiny.model.enable_cache(make_config())
    native_cached = steps(tiny)
    assert differ(native_cached, native)
    tiny.model.disable_cache()
    adapter = linearize(tiny.model)
    stir(adapter)
    converted = steps(tiny)
    tiny.model.enable_cache(make_config())
    cached = steps(tiny)
    assert torch.equal(cached[0], converted[0]) and differ(cached, converted) and differ(cached, native_cached)
    with adapter.disabled():
        assert not differ(steps(tiny), native_cached)
    late.model.enable_cache(make_config())
    stir(linearize(late.model))
    assert not differ(steps(late), cached)
    for model in (tiny.model, late.model):
        model.disable_cache()
    assert not differ(steps(tiny), converted) and not differ(steps(late), converted)
    restore(tiny.model)
    assert not differ(steps(tiny), native)


@pytest.mark.compatibility("Pyramid Attention Broadcast", "works", "reset the cache before `disabled()`")
@pytest.mark.parametrize("name", ["flux", "cogvideox"])
def test_pyramid_attention_broadcast(name: str) -> None:
    check(
        lambda: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: 500,
        ),
        name,
    )


@pytest.mark.compatibility("FasterCache", "works", "reset the cache before `disabled()`")
def test_faster_cache() -> None:
    check(
        lambda: diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 850),  # the first step has to fill the cache
            attention_weight_callback=lambda _: 0.3,
            current_timestep_callback=lambda: CLOCK["timestep"],
            is_guidance_distilled=True,
            tensor_format="BCHW",
        )
    )


@pytest.mark.compatibility("FirstBlockCache", "works", "reset the cache before `disabled()`")
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_first_block_cache(name: str) -> None:
    check(lambda: diffusers.FirstBlockCacheConfig(threshold=10.0), name)


@pytest.mark.compatibility("MagCache", "works", "reset the cache before `disabled()`")
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_mag_cache(name: str) -> None:
    check(
        lambda: diffusers.MagCacheConfig(
            threshold=1.0, num_inference_steps=STEPS, retention_ratio=0.1, mag_ratios=[1.0] * STEPS
        ),
        name,
    )


@pytest.mark.compatibility("TaylorSeer", "works", "reset the cache before `disabled()`")
def test_taylorseer() -> None:
    check(lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1))
