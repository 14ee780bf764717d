"""What cannot be converted or saved is said at the door, in one line."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from flatten_diffusion import AdapterConfig, linearize, restore

from ..models.tiny import build, stir


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"mixer": "agent"}, TypeError, "config is dict: pass an AdapterConfig, or one of training-free"),
        ("x" * 1000, ValueError, "Unknown preset 'xxx.*choose one of training-free"),
        (3, TypeError, "config is int"),
    ],
)
def test_what_is_no_config(config: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        linearize(build("sd15").model, config)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_training_free_is_pyramid_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLATTEN_DIFFUSION_CACHE", str(tmp_path))
    monkeypatch.setattr("flatten_diffusion.models.timing._known", {})
    monkeypatch.setattr("flatten_diffusion.models.autotune._found", {})
    monkeypatch.setattr("flatten_diffusion.models.timing._time_ratio", lambda runs_at, side, device: 50 / side**2)
    tiny = build("sd15")
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model, "training-free")
        assert adapter.config == AdapterConfig(mixer="pyramid", min_tokens="auto")
        out = tiny()
    assert not torch.equal(out, native) and (out - native).norm() < 0.05 * native.norm()
    assert "tokens (measured)" in str(adapter.report())


@pytest.mark.compatibility("Weights made in inference mode", "refused", "load the model outside `torch.inference_mode`")
def test_weights_of_inference_mode() -> None:
    with torch.inference_mode():
        tiny = build("sd15")
    with pytest.raises(ValueError, match="made under torch.inference_mode"):
        linearize(tiny.model)


def test_a_diverged_adapter_is_not_saved(tmp_path: Path) -> None:
    adapter = linearize(build("sd15").model)
    adapter.save_pretrained(tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        next(adapter.parameters())[0] = torch.inf
    with pytest.raises(ValueError, match="not finite: a diverged adapter is not saved"):
        adapter.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_a_copy_made_inside_disabled_is_enabled_and_of_its_own() -> None:
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    stir(adapter)
    with torch.no_grad():
        converted = tiny()
        with adapter.disabled():
            twin = copy.deepcopy(tiny.model)
        assert torch.equal(tiny(twin), converted)
        restore(twin)
        assert torch.equal(tiny(), converted)


@pytest.mark.compatibility("Group offload to disk", "refused", "by `adapter.save_pretrained`: save before")
def test_group_offload_to_disk_is_refused_when_saving(tmp_path: Path) -> None:
    from diffusers.hooks import apply_group_offloading

    if "offload_to_disk_path" not in inspect.signature(apply_group_offloading).parameters:
        pytest.skip("this diffusers does not offload groups to disk")
    tiny = build("sd15")
    adapter = linearize(tiny.model)
    apply_group_offloading(
        tiny.model,
        onload_device=torch.device("cpu"),
        offload_type="leaf_level",
        offload_to_disk_path=str(tmp_path / "offload"),
    )
    with pytest.raises(ValueError, match="offloaded: save the adapter before offloading"):
        adapter.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
