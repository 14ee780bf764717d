from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize, load_adapter, restore

from ..models.tiny import build, stir

ALL = ("q", "k", "v", "out")


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", ["sd15", "sd21", "unet2d", "dit", "pixart"])
def test_deltas_from_nothing_to_disk_and_back(tmp_path: Path, name: str, rank: int | None) -> None:
    tiny = build(name)
    base = tiny()
    adapter = linearize(tiny.model)
    raw = tiny()
    adapter.add_deltas(ALL, rank)
    assert torch.equal(tiny(), raw)
    stir(adapter)
    stirred = tiny()
    for layer, mixer in adapter.layer_mixers():
        assert list(mixer.deltas) == list(ALL), layer
    with adapter.disabled():
        assert torch.equal(tiny(), base)
    adapter.save_pretrained(tmp_path)
    restore(tiny.model)
    assert torch.equal(tiny(), base)
    again = load_adapter(tiny.model, tmp_path)
    assert again.config.deltas == ALL and again.config.delta_rank == rank
    assert torch.equal(tiny(), stirred)


def test_every_delta_matters_and_learns() -> None:
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    adapter.add_deltas(ALL, 2)
    stir(adapter)
    whole = tiny()
    whole.square().sum().backward()
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    for projection in ALL:
        mixer = next(mixer for _, mixer in adapter.layer_mixers())
        kept = {key: value.clone() for key, value in mixer.deltas[projection].state_dict().items()}
        nn.init.zeros_(mixer.deltas[projection].bias)
        assert not torch.equal(tiny(), whole), projection
        mixer.deltas[projection].load_state_dict(kept)
        assert torch.equal(tiny(), whole)


def test_with_fused_projections() -> None:
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    adapter.add_deltas(ALL, 2)
    stir(adapter)
    expected = tiny()
    restore(tiny.model)
    state = _stirred_state(tiny.model)
    tiny.model.fuse_qkv_projections()
    fused = linearize(tiny.model)
    fused.add_deltas(ALL, 2)
    for key, parameter in fused.named_parameters():
        parameter.data.copy_(state[key])
    assert torch.allclose(tiny(), expected, atol=1e-5)


def _stirred_state(model: nn.Module) -> dict[str, torch.Tensor]:
    adapter = linearize(model)
    adapter.add_deltas(ALL, 2)
    stir(adapter)
    state = adapter.state_dict()
    restore(model)
    return state


@pytest.mark.compatibility("merge", "works", "the same outputs up to rounding; `unmerge` is bit-exact")
@pytest.mark.parametrize("name", ["sd15", "unet2d", "dit"])
def test_merge_and_back(tmp_path: Path, name: str) -> None:
    tiny = build(name)
    base = tiny()
    weights = {key: parameter.clone() for key, parameter in tiny.model.named_parameters()}
    adapter = linearize(tiny.model)
    adapter.add_deltas(ALL, 2)
    stir(adapter)
    apart = tiny()
    adapter.save_pretrained(tmp_path / "apart")
    adapter.merge()
    assert torch.allclose(tiny(), apart, rtol=1e-4, atol=1e-5) and not torch.equal(tiny(), base)
    with pytest.raises(RuntimeError, match="call unmerge"), adapter.disabled():
        pass
    with pytest.raises(RuntimeError, match="merged already"):
        adapter.merge()
    adapter.save_pretrained(tmp_path / "merged")
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("apart", "merged")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    fresh = build(name)
    load_adapter(fresh.model, tmp_path / "merged")  # the fingerprint is the base model's, merged biases or not
    adapter.unmerge()
    assert torch.equal(tiny(), apart)
    adapter.merge()
    restore(tiny.model)
    assert torch.equal(tiny(), base)
    after = dict(tiny.model.named_parameters())
    assert weights.keys() == after.keys() and all(torch.equal(weights[key], after[key]) for key in weights)


def test_merge_is_refused_before_anything_changes() -> None:
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    with pytest.raises(ValueError, match="nothing to merge"):
        adapter.merge()
    adapter.add_deltas(ALL, None)
    stir(adapter)
    expected = tiny()
    with adapter.disabled(), pytest.raises(RuntimeError, match="disabled"):
        adapter.merge()
    last = list(adapter.attention_modules())[-1][1]
    last.to_q = nn.Sequential(last.to_q)
    with pytest.raises(ValueError, match="Sequential"):
        adapter.merge()
    assert torch.equal(tiny(), expected)


def test_merge_is_refused_where_small_calls_stay_softmax() -> None:
    tiny = build("sd15")
    adapter = linearize(tiny.model, AdapterConfig(min_tokens=100))
    adapter.add_deltas(ALL, None)
    expected = tiny()
    with pytest.raises(ValueError, match="min_tokens"):
        adapter.merge()
    assert torch.equal(tiny(), expected)


def test_a_mixer_of_its_own_per_layer(tmp_path: Path) -> None:
    tiny = build("sd15")
    layer = linearize(tiny.model).layers[1]
    restore(tiny.model)
    own = FocusedLinearConfig(focusing_factor=1.5, kernel_size=3)
    adapter = linearize(tiny.model, AdapterConfig(overrides={layer: own}))
    mixers = dict(adapter.mixers())
    assert {name: mixer.config for name, mixer in mixers.items() if name != layer} == {
        name: FocusedLinearConfig() for name in adapter.layers if name != layer
    }
    assert mixers[layer].config == own
    first = adapter.layers[0]
    mixers[first].config = FocusedLinearConfig(focusing_factor=2.0)  # as calibration does
    expected = tiny()
    adapter.save_pretrained(tmp_path)
    restore(tiny.model)
    again = load_adapter(tiny.model, tmp_path)
    assert again.config.overrides == {layer: own, first: FocusedLinearConfig(focusing_factor=2.0)}
    assert again.config == adapter.config and again.config.mixer == FocusedLinearConfig()
    assert torch.equal(tiny(), expected)
    restore(tiny.model)
    with pytest.raises(ValueError, match="'nowhere'"):
        linearize(tiny.model, AdapterConfig(overrides={"nowhere": own}))


def test_bad_settings() -> None:
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    with pytest.raises(ValueError, match="deltas"):
        adapter.add_deltas(("to_q",))
    adapter.add_deltas(("q",), 2)
    with pytest.raises(ValueError, match="rank 2, not 3"):
        adapter.add_deltas(("k",), 3)
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="delta_rank"):
            AdapterConfig(deltas=("q",), delta_rank=bad)  # type: ignore[arg-type]


def test_a_lora_on_the_base_never_lands_on_a_delta() -> None:
    peft = pytest.importorskip("peft")
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    adapter.add_deltas(ALL, 2)
    tiny.model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert all("base_layer" not in name for name, _ in adapter.named_parameters())
    stir(adapter)
    apart = tiny()
    adapter.merge()
    assert torch.allclose(tiny(), apart, rtol=1e-4, atol=1e-5)
