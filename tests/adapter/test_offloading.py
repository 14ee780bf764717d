"""Weights kept elsewhere, or in another dtype, between passes; native attention backends; averages of weights."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers.training_utils import EMAModel

from flatten_diffusion import AdapterConfig, linearize, load_adapter, restore

from ..models.tiny import build, stir
from ..models.tiny_wrapped import build_wrapped

CPU = torch.device("cpu")
CONFIG = AdapterConfig(deltas=("q", "out"), delta_rank=2)


@pytest.mark.compatibility("Model offload", "works", "`enable_model_cpu_offload` before or after")
@torch.no_grad()
def test_model_offload() -> None:
    tiny, late = build("sd15"), build("sd15")
    stir(linearize(tiny.model, CONFIG))
    converted = tiny()
    cpu_offload_with_hook(tiny.model, CPU)
    cpu_offload_with_hook(late.model, CPU)
    stir(linearize(late.model, CONFIG))
    assert torch.equal(tiny(), converted) and torch.equal(late(), converted)
    restore(late.model)
    assert torch.equal(late(), build("sd15")())


@pytest.mark.compatibility(
    "Group offload", "order matters", "convert first; later is refused, as are merging and saving meanwhile"
)
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@torch.no_grad()
def test_group_offload(kind: str, tmp_path: Any) -> None:
    if not hasattr(diffusers.hooks, "apply_group_offloading"):
        pytest.skip("this diffusers has no group offload")

    def offload(model: Any) -> None:
        options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        diffusers.hooks.apply_group_offloading(
            model, onload_device=CPU, offload_device=CPU, offload_type=kind, **options
        )

    tiny, late = build("pixart"), build("pixart")
    native = tiny()
    adapter = linearize(tiny.model, CONFIG)
    stir(adapter)
    converted = tiny()
    adapter.save_pretrained(tmp_path)
    offload(tiny.model)
    offload(late.model)
    assert torch.equal(tiny(), converted)
    with adapter.disabled():
        assert torch.equal(tiny(), native)
    with pytest.raises(ValueError, match="offloaded in groups: merge.. and unmerge.. before"):
        adapter.merge()
    with pytest.raises(ValueError, match="offloaded: save the adapter before offloading"):
        adapter.save_pretrained(tmp_path / "late")
    for convert in (lambda: linearize(late.model), lambda: load_adapter(late.model, tmp_path)):
        with pytest.raises(ValueError, match="PixArtTransformer2DModel is offloaded in groups: convert before"):
            convert()
    restore(tiny.model)
    assert torch.equal(tiny(), native)


@pytest.mark.compatibility("Layerwise casting", "works", "float8 storage, before or after")
@pytest.mark.parametrize("name", ["sd15", "sd3"])
@torch.no_grad()
def test_layerwise_casting(name: str) -> None:
    tiny, late = ((build(name) if name == "sd15" else build_wrapped(name)) for _ in range(2))
    if not hasattr(tiny.model, "enable_layerwise_casting"):
        pytest.skip("this diffusers has no layerwise casting")
    adapters = []
    for one, first in ((tiny, True), (late, False)):
        for cast in (not first, first):
            if cast:
                one.model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
            else:
                adapters.append(linearize(one.model, CONFIG))
                stir(adapters[-1])
    assert all(p.dtype == torch.float32 for adapter in adapters for p in adapter.parameters())
    assert torch.equal(tiny(), late())
    with adapters[0].disabled(), adapters[1].disabled():
        assert torch.equal(tiny(), late())
    native = build(name) if name == "sd15" else build_wrapped(name)
    native.model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    restore(tiny.model)
    assert torch.equal(tiny(), native())


@pytest.mark.compatibility("Attention backends", "works", "for what stays softmax: text, temporal layers, `disabled()`")
@torch.no_grad()
def test_attention_backends() -> None:
    tiny = build_wrapped("flux")
    if not hasattr(tiny.model, "set_attention_backend"):
        pytest.skip("this diffusers has no attention backends")
    adapter = linearize(tiny.model)
    stir(adapter)
    converted = tiny()
    with adapter.disabled():
        native = tiny()
    tiny.model.set_attention_backend("_native_math")
    torch.testing.assert_close(tiny(), converted, rtol=1e-4, atol=1e-5)
    with adapter.disabled():
        torch.testing.assert_close(tiny(), native, rtol=1e-4, atol=1e-5)
    restore(tiny.model)
    tiny.model.set_attention_backend("native")  # which is kept for the process, not only for the model
    tiny.model.reset_attention_backend()
    assert torch.equal(tiny(), native)


@pytest.mark.compatibility(
    "EMA",
    "order matters",
    "make it after converting, of `adapter.parameters()`: one made before fails at its first step",
)
@torch.no_grad()
def test_an_average_of_weights() -> None:
    tiny = build("sd15")
    early = EMAModel(tiny.model.parameters())
    adapter = linearize(tiny.model, CONFIG)
    late = EMAModel(adapter.parameters(), decay=0.5)
    start = [parameter.clone() for parameter in adapter.parameters()]
    stir(adapter)
    for _ in range(2):  # the first step of diffusers' average copies
        late.step(adapter.parameters())
    late.copy_to(adapter.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(adapter.parameters(), start, strict=True))
    assert tiny().isfinite().all()
    with pytest.raises(RuntimeError, match="must match the size"):
        early.step(tiny.model.parameters())
    restore(tiny.model)
    early.copy_to(tiny.model.parameters())
