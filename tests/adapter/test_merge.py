"""Merged, then changed by something else, then unmerged: the base weights come back, or one line says why not."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import nn

from flatten_diffusion import AdapterConfig, linearize, restore
from flatten_diffusion.adapter import Adapter

from ..models.tiny import Tiny, build, stir

ALL = ("q", "k", "v", "out")


def merged(name: str = "sd15", rank: int | None = 2) -> tuple[Tiny, Adapter, dict[str, torch.Tensor]]:
    """A merged model, and its base weights from before."""
    tiny = build(name)
    tiny.model.requires_grad_(False)
    base = {key: tensor.clone() for key, tensor in tiny.model.state_dict().items()}
    adapter = linearize(tiny.model, AdapterConfig(deltas=ALL, delta_rank=rank))
    stir(adapter)
    adapter.merge()
    return tiny, adapter, base


def base_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if "flatten_mixer" not in key}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.mark.compatibility("Another dtype after `merge`", "works", "`unmerge` follows it")
@pytest.mark.parametrize("how", ["unmerge", "restore"])
@pytest.mark.parametrize("rank", [None, 2])
def test_another_dtype(how: str, rank: int | None) -> None:
    tiny, adapter, base = merged(rank=rank)
    tiny.model.to(torch.bfloat16)
    adapter.unmerge() if how == "unmerge" else restore(tiny.model)
    assert {parameter.dtype for parameter in tiny.model.parameters()} == {torch.bfloat16}
    assert_same(base_of(tiny.model), {key: tensor.bfloat16() for key, tensor in base.items()})


@pytest.mark.parametrize("state", ["its own", "the base's"])
def test_a_state_dict_loaded_meanwhile(state: str, caplog: pytest.LogCaptureFixture) -> None:
    tiny, adapter, base = merged()
    whole = {key: tensor.clone() for key, tensor in tiny.model.state_dict().items()}
    tiny.model.load_state_dict(whole | (base if state == "the base's" else {}))
    adapter.unmerge()
    assert_same(base_of(tiny.model), base)
    assert "changed while the adapter was merged" not in caplog.text


def nudge(tiny: Tiny) -> dict[str, torch.Tensor]:
    """A step of fine-tuning on some base weights and biases, in place; what was added."""
    steps = {}
    with torch.no_grad():
        for key, parameter in tiny.model.named_parameters():
            if "attn1.to_q" in key or "attn1.to_out.0.weight" in key:
                steps[key] = torch.full_like(parameter, 0.125)
                parameter.add_(steps[key])
    return steps


@pytest.mark.parametrize("how", ["unmerge", "restore"])
def test_fine_tuning_meanwhile_is_kept(how: str, caplog: pytest.LogCaptureFixture) -> None:
    tiny, adapter, base = merged()
    steps = nudge(tiny)
    with caplog.at_level(logging.WARNING):
        adapter.unmerge() if how == "unmerge" else restore(tiny.model)
    assert "were subtracted from them" in caplog.text and "\n" not in caplog.records[-1].getMessage()
    found = base_of(tiny.model)
    for key, tensor in base.items():
        wanted = tensor + steps.pop(key) if key in steps else tensor
        torch.testing.assert_close(found.pop(key), wanted, rtol=0, atol=1e-6)
    # Biases that the merge made and fine-tuning moved have no original to go back to.
    assert found.keys() == steps.keys() and all(key.endswith("to_q.bias") for key in found)
    for key, step in steps.items():
        torch.testing.assert_close(found[key], step, rtol=0, atol=1e-6)


@pytest.mark.compatibility("fuse_lora", "works", "before or after `merge`, undone in either order, up to rounding")
@pytest.mark.parametrize("fused_first", [False, True])
def test_a_lora_fused_meanwhile(fused_first: bool) -> None:
    peft = pytest.importorskip("peft")
    tiny = build("sd15")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    tiny.model.add_adapter(config)
    native = tiny().detach()
    adapter = linearize(tiny.model, AdapterConfig(deltas=ALL, delta_rank=2))
    stir(adapter)
    converted = tiny().detach()

    def close(wanted: torch.Tensor) -> None:
        torch.testing.assert_close(tiny().detach(), wanted, rtol=1e-3, atol=1e-4)

    if fused_first:
        tiny.model.fuse_lora()
    adapter.merge()
    if not fused_first:
        tiny.model.fuse_lora()
    close(converted)
    if fused_first:
        tiny.model.unfuse_lora()
        close(converted)
    adapter.unmerge()
    close(converted)
    if not fused_first:
        tiny.model.unfuse_lora()
        close(converted)
    restore(tiny.model)
    close(native)


def _replaced(tiny: Tiny) -> None:
    attn = tiny.model.get_submodule(tiny.model.flatten_adapter.layers[-1])
    attn.to_q = nn.Linear(attn.to_q.in_features, attn.to_q.out_features)


def _both_changed(tiny: Tiny) -> None:
    nudge(tiny)
    with torch.no_grad():
        for parameter in tiny.model.flatten_adapter.parameters():
            parameter.mul_(1.01)


def _packed(tiny: Tiny) -> None:
    attn = tiny.model.get_submodule(tiny.model.flatten_adapter.layers[-1])
    attn.to_q.weight = nn.Parameter(attn.to_q.weight.to(torch.int8), requires_grad=False)


class Packed(torch.Tensor):
    """As torchao's: a subclass that claims to be floating point."""


def _subclassed(tiny: Tiny) -> None:
    attn = tiny.model.get_submodule(tiny.model.flatten_adapter.layers[-1])
    attn.to_q.weight = nn.Parameter(attn.to_q.weight.data.as_subclass(Packed), requires_grad=False)


@pytest.mark.compatibility(
    "Quantised weights",
    "refused",
    "by `merge` and `unmerge`: tensor subclasses and packed weights; so are meta and offloaded ones",
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replaced, r"attn1.q was replaced by Linear since merge\(\)"),
        (_both_changed, r"weight and addition both changed since merge\(\): reload"),
        (_packed, "attn1.q holds Tensor: quantised and sharded weights do not merge"),
        (_subclassed, "attn1.q holds Packed: quantised"),
        (lambda tiny: tiny.model.to("meta"), "is on the meta device"),
        (lambda tiny: cpu_offload(tiny.model, torch.device("cpu")), "remove_all_hooks"),
    ],
    ids=["replaced", "both changed", "packed", "subclass", "meta", "offloaded"],
)
@pytest.mark.parametrize("how", ["unmerge", "restore"])
def test_what_cannot_be_unmerged_is_refused_whole(how: str, change: Callable[[Tiny], Any], message: str) -> None:
    tiny, adapter, _ = merged()
    change(tiny)
    before = {key: (id(p), p.data_ptr(), p._version) for key, p in tiny.model.named_parameters()}
    with pytest.raises(ValueError, match=message) as error:
        adapter.unmerge() if how == "unmerge" else restore(tiny.model)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert adapter.is_merged and tiny.model.flatten_adapter is adapter
    assert {key: (id(p), p.data_ptr(), p._version) for key, p in tiny.model.named_parameters()} == before


def test_offloaded_and_back_it_unmerges() -> None:
    tiny, adapter, base = merged()
    converted = tiny()
    cpu_offload(tiny.model, torch.device("cpu"))
    assert torch.equal(tiny(), converted)
    with pytest.raises(ValueError, match="remove_all_hooks"):
        adapter.unmerge()
    remove_hook_from_module(tiny.model, recurse=True)
    adapter.unmerge()
    assert_same(base_of(tiny.model), base)


def test_merging_what_is_offloaded_is_refused() -> None:
    tiny, adapter, _ = merged()
    adapter.unmerge()
    cpu_offload(tiny.model, torch.device("cpu"))
    converted = tiny()
    with pytest.raises(ValueError, match="offloaded"):
        adapter.merge()
    assert not adapter.is_merged and torch.equal(tiny(), converted)


def test_a_copy_of_a_merged_model_unmerges_by_itself() -> None:
    tiny, adapter, base = merged()
    twin = copy.deepcopy(tiny.model)
    converted = tiny()
    twin.flatten_adapter.unmerge()
    assert_same(base_of(twin), base)
    assert adapter.is_merged and torch.equal(tiny(), converted)
    nudge(tiny)
    adapter.unmerge()  # subtracts


def test_fused_projections_while_merged() -> None:
    tiny, _, base = merged()
    native = build("sd15")().detach()
    tiny.model.fuse_qkv_projections()
    restore(tiny.model)
    assert torch.equal(tiny(), native)
    tiny.model.unfuse_qkv_projections()
    assert torch.equal(tiny(), native)
    found = base_of(tiny.model)
    assert_same({key: found[key] for key in base}, base)
