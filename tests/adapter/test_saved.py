import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize, load_adapter, restore
from flatten_diffusion.adapter import loading, saving
from flatten_diffusion.adapter.fingerprint import fingerprint

from ..models.tiny import CONVERTIBLE, build, stir

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
CONFIGURED = AdapterConfig(FocusedLinearConfig(focusing_factor=2.5), min_tokens=3, exclude=["mid_block.*"])


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter for the tiny SD 1.5, and the output it must give."""
    tiny = build("sd15")
    adapter = linearize(tiny.model, CONFIGURED)
    stir(adapter)
    adapter.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        return tmp_path / "out", tiny()


def _description(folder):
    return json.loads((folder / CONFIG).read_text())


def _changed(description, **changes):
    for dotted, value in changes.items():
        target = description
        *parents, last = dotted.split("__")
        for key in parents:
            target = target[key]
        if value is KeyError:
            del target[last]
        else:
            target[last] = value
    return description


def _sign(folder, description, tensors, header=True):
    """Both files anew, signed as a save signs them: what is left to refuse is what they say."""
    description["sha256"] = saving.signature(tensors, description)
    metadata = {"adapter_config": json.dumps(description)} if header else None
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    (folder / CONFIG).write_text(json.dumps(description))


def _rewrite(folder, **changes):
    _sign(folder, _changed(_description(folder), **changes), load_file(folder / WEIGHTS))


def _refuses(model, folder, error, message):
    """`load_adapter` raises one line and leaves the model as it was."""
    keys = list(model.state_dict())
    with pytest.raises(error, match=message) as caught:
        load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == keys and not hasattr(model, "flatten_adapter")
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_save_and_load_is_exact(name, tmp_path):
    tiny, fresh = build(name), build(name)
    adapter = linearize(tiny.model)
    stir(adapter)
    adapter.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([CONFIG, WEIGHTS, CARD])
    loaded = load_adapter(fresh.model, tmp_path)
    assert loaded.layers == adapter.layers and loaded.config == adapter.config
    for (key, ours), (same, theirs) in zip(loaded.named_parameters(), adapter.named_parameters(), strict=True):
        assert key == same and torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(fresh(), tiny())
        native = build(name)()
        restore(fresh.model)
        assert torch.equal(fresh(), native)


def test_settings_and_layers_come_back(saved):
    folder, expected = saved
    tiny = build("sd15")
    adapter = load_adapter(tiny.model, folder)
    assert adapter.config == CONFIGURED
    assert len(adapter.layers) == 3
    with torch.no_grad():
        assert torch.equal(tiny(), expected)


def test_keys_are_module_paths_and_small(saved):
    folder, _ = saved
    keys = load_file(folder / WEIGHTS).keys()
    assert {key.rpartition(".")[2] for key in keys} == {"log_scale", "conv_weight", "conv_bias"}
    assert all(key.startswith(("down_blocks.0.", "up_blocks.1.")) and ".attn1." in key for key in keys)


def test_the_card_says_what_it_is(saved):
    card = (saved[0] / CARD).read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "3 layers" in card and "load_adapter" in card and "UNet2DConditionModel" in card
    assert "up_blocks.1.attentions.1.transformer_blocks.0.attn1" in card


def test_dtypes_are_kept_in_the_file_and_follow_the_model(tmp_path):
    tiny = build("sd15")
    tiny.model.to(torch.bfloat16)
    adapter = linearize(tiny.model)
    stir(adapter)
    adapter.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    fresh = build("sd15")
    loaded = load_adapter(fresh.model, tmp_path)
    for ours, theirs in zip(loaded.parameters(), adapter.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


def test_loading_takes_a_fine_tune_but_no_other_model(saved):
    folder, _ = saved
    load_adapter(build("sd15", seed=7).model, folder)
    _refuses(build("sd21").model, folder, ValueError, "made for a UNet2DConditionModel with other parameter shapes")
    _refuses(build("pixart").model, folder, ValueError, "made for 'UNet2DConditionModel', this model is PixArt")


def test_loading_twice_raises(saved):
    tiny = build("sd15")
    load_adapter(tiny.model, saved[0])
    with pytest.raises(ValueError, match="converted already"):
        load_adapter(tiny.model, saved[0])


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_weights_file(saved, keep):
    path = saved[0] / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    _refuses(build("sd15").model, saved[0], OSError, "adapter_model.safetensors is truncated")


def test_a_flipped_bit_in_the_weights(saved):
    path = saved[0] / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    _refuses(build("sd15").model, saved[0], OSError, "adapter_model.safetensors is damaged")


def test_something_that_is_no_safetensors_file(saved):
    torch.save({}, saved[0] / WEIGHTS)
    _refuses(build("sd15").model, saved[0], OSError, "no safetensors file")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file(saved, name):
    (saved[0] / name).unlink()
    _refuses(build("sd15").model, saved[0], FileNotFoundError, f"holds no {name}")


@pytest.mark.parametrize("text", ['{"format_version": 1', "[]", "\xff"])
def test_a_broken_config(saved, text):
    (saved[0] / CONFIG).write_bytes(text.encode("latin-1"))
    _refuses(build("sd15").model, saved[0], OSError, "adapter_config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format_version 3, newer than 2: upgrade"),
        ({"format_version": 10**400}, "format_version 10000*, newer than 2: upgrade"),
        ({"format_version": 1}, "format_version 1, of flatten_diffusion 0.1: this version reads 2 only; distil again"),
        ({"format_version": 2.0}, "format_version 2.0: it was not written"),
        ({"format_version": KeyError}, "format_version None"),
        ({"base_model": KeyError}, "lacks base_model or layers"),
        ({"layers": KeyError}, "lacks base_model or layers"),
        ({"layers": []}, "no or repeated layers"),
        ({"layers": ["mid_block.attentions.0.transformer_blocks.0.attn2"]}, "which this model cannot convert"),
        ({"config__mixer": "from_the_future"}, "Unknown mixer 'from_the_future'"),
        ({"config__mixer__name": "from_the_future"}, "Unknown mixer 'from_the_future'"),
        ({"config__overrides": {"nowhere": {"name": "focused_linear"}}}, "overrides for layers that it does not"),
        ({"config__new_setting": 1}, "Unknown setting 'new_setting'"),
        ({"config__mixer__kernel_size": 4}, "kernel_size is 4"),
        ({"config__mixer__kernel_size": 3}, "has shape .* and must have"),
        ({"config__mixer__kernel_size": 0}, "has unexpected '.*conv_bias'"),
        ({"config": [1]}, "config is list"),
    ],
)
def test_a_config_that_does_not_fit(saved, changes, message):
    _rewrite(saved[0], **changes)
    _refuses(build("sd15").model, saved[0], ValueError, message)


def test_keys_shapes_and_values_that_do_not_fit(saved):
    folder, expected = saved
    original = load_file(folder / WEIGHTS)
    key = sorted(original)[0]
    for edit, message in (
        (lambda tensors: tensors.pop(key), f"lacks '{key}'"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "has unexpected 'extra'"),
        (lambda tensors: tensors.update({key: torch.zeros(3)}), r"has shape \[3\] and must have"),
        (lambda tensors: tensors.update({key: tensors[key].long()}), "must be floating point"),
        (lambda tensors: tensors[key].view(-1)[:1].fill_(float("nan")), f"{key} has values that are not finite"),
        (lambda tensors: tensors[key].view(-1)[-1:].fill_(float("inf")), f"{key} has values that are not finite"),
    ):
        tensors = {name: tensor.clone() for name, tensor in original.items()}
        edit(tensors)
        _sign(folder, _description(folder), tensors)
        _refuses(build("sd15").model, folder, ValueError, message)
    for header in (True, False):  # a tool that rewrites safetensors may drop the header: the config then counts
        _sign(folder, _description(folder), original, header)
        tiny = build("sd15")
        load_adapter(tiny.model, folder)
        with torch.no_grad():
            assert torch.equal(tiny(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_floating_dtype_loads_and_what_overflows_in_the_layers_does_not(saved, dtype):
    folder, _ = saved
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    _sign(folder, _description(folder), tensors)
    tiny = build("sd15")
    adapter = load_adapter(tiny.model, folder)
    assert all(torch.equal(p, tensors[name].float()) for name, p in adapter.named_parameters())
    with torch.no_grad():
        assert tiny().isfinite().all()
    if dtype != torch.float64:
        return
    key = sorted(tensors)[0]
    tensors[key].view(-1)[0] = 1e200
    _sign(folder, _description(folder), tensors)
    _refuses(
        build("sd15").model, folder, ValueError, f"{key} has values that are not finite in the layer's torch.float32"
    )
    tensors[key].view(-1)[0] = 1e5
    _sign(folder, _description(folder), tensors)
    load_adapter(build("sd15").model, folder)
    _refuses(build("sd15").model.half(), folder, ValueError, "not finite in the layer's torch.float16")


@pytest.mark.parametrize("header", [True, False])
def test_tensors_edited_without_signing(saved, header):
    folder, _ = saved
    tensors = load_file(folder / WEIGHTS)
    tensors[sorted(tensors)[0]].view(-1)[0] += 1
    metadata = {"adapter_config": json.dumps(_description(folder))} if header else None
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    _refuses(build("sd15").model, folder, OSError, "its checksum fits neither tensors nor settings")


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    adapter = linearize(build("sd15").model)
    with torch.no_grad():
        next(adapter.parameters()).view(-1)[0] = float("inf")
    with pytest.raises(ValueError, match="attn1.mixer.log_scale has values that are not finite"):
        adapter.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_runs_sliced_attention_refuses(saved):
    tiny = build("sd15")
    tiny.model.set_attention_slice(1)
    _refuses(tiny.model, saved[0], ValueError, "attn1 runs SlicedAttnProcessor")


def test_a_hand_edited_setting_is_refused(saved):
    description = _changed(_description(saved[0]), config__min_tokens=10**6)
    (saved[0] / CONFIG).write_text(json.dumps(description))
    _refuses(build("sd15").model, saved[0], OSError, "adapter_config.json is damaged or was edited")


@pytest.mark.parametrize("crash_at", [WEIGHTS, CONFIG, CARD])
def test_a_save_cut_off_at_any_file_leaves_one_whole_adapter(saved, crash_at, monkeypatch):
    folder, old = saved
    tiny = build("sd15")
    adapter = linearize(tiny.model, AdapterConfig(mixer=FocusedLinearConfig(kernel_size=3)))
    stir(adapter, seed=5)
    with torch.no_grad():
        new = tiny()
    replace = os.replace

    def crash(source, target):
        if os.path.basename(target) == crash_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        adapter.save_pretrained(folder)
    monkeypatch.undo()
    assert sorted(os.listdir(folder)) == sorted([CONFIG, WEIGHTS, CARD])
    fresh = build("sd15")
    load_adapter(fresh.model, folder)
    with torch.no_grad():
        assert torch.equal(fresh(), old if crash_at == WEIGHTS else new)


def test_saving_again_replaces_and_leaves_other_files(saved):
    folder, _ = saved
    (folder / "notes.txt").write_text("mine")
    tiny = build("sd15")
    adapter = linearize(tiny.model, AdapterConfig(mixer=FocusedLinearConfig(kernel_size=0)))
    adapter.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == sorted([CONFIG, WEIGHTS, CARD, "notes.txt"])
    assert load_adapter(build("sd15").model, folder).config.mixer.kernel_size == 0
    first = (folder / WEIGHTS).read_bytes()
    adapter.save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == first


def test_places_that_are_no_adapter(saved, tmp_path, monkeypatch):
    model = build("sd15").model
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file: save an adapter to a folder"):
        linearize(build("sd15").model).save_pretrained(tmp_path / "file")
    _refuses(model, tmp_path / "file", NotADirectoryError, "is a file: pass the folder")
    _refuses(model, "/no/such/place", FileNotFoundError, "neither a folder nor a Hub name")
    with pytest.raises(OSError, match="'some/name' is no folder here") as error:
        load_adapter(model, "some/name", local_files_only=True, cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_loading_from_the_hub_passes_everything_on(saved, monkeypatch):
    calls = []

    def download(repo, filename, **arguments):
        calls.append((repo, filename, arguments))
        return str(saved[0] / filename)

    monkeypatch.setattr(loading, "hf_hub_download", download)
    tiny = build("sd15")
    load_adapter(tiny.model, "user/name", revision="v1", token="t", cache_dir="c", local_files_only=True)
    expected = {"revision": "v1", "token": "t", "cache_dir": Path("c"), "local_files_only": True}
    assert calls == [("user/name", CONFIG, expected), ("user/name", WEIGHTS, expected)]
    with torch.no_grad():
        assert torch.equal(tiny(), saved[1])


def test_pushing_uploads_the_three_files(tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **arguments):
            calls.append(("create", repo_id, arguments))
            return type("Url", (), {"repo_id": f"user/{repo_id}"})()

        def upload_folder(self, **arguments):
            calls.append(("upload", arguments))

    monkeypatch.setattr(saving, "HfApi", Api)
    adapter = linearize(build("sd15").model)
    with pytest.raises(ValueError, match="not a Hub name"):
        adapter.save_pretrained(tmp_path / "bad", push_to_hub=True, repo_id="a/b/c")
    assert not calls and not (tmp_path / "bad").exists()
    adapter.save_pretrained(tmp_path / "mine", push_to_hub=True, token="t", private=True, commit_message="m")
    assert calls[0] == ("token", "t")
    assert calls[1] == ("create", "mine", {"private": True, "exist_ok": True})
    upload = calls[2][1]
    assert upload["repo_id"] == "user/mine" and upload["commit_message"] == "m"
    assert sorted(upload["allow_patterns"]) == sorted([CONFIG, WEIGHTS, CARD])


def test_the_fingerprint_sees_shapes_and_nothing_else():
    base = fingerprint(build("sd15").model)
    assert len(base) == 64 and fingerprint(build("sd15", seed=3).model) == base
    assert fingerprint(build("sd21").model) != base
    model = build("sd15").model.half()
    linearize(model)
    assert fingerprint(model) == base
    restore(model)
    model.fuse_qkv_projections()
    assert fingerprint(model) == base


def test_saving_the_model_itself_drops_the_adapter_with_a_warning(tmp_path, saved):
    tiny = build("sd15")
    native = tiny().detach()
    load_adapter(tiny.model, saved[0])
    tiny.model.save_pretrained(tmp_path / "model")
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(tiny(plain).detach(), native)
    load_adapter(plain, saved[0])
    assert torch.equal(tiny(plain).detach(), saved[1])


def test_a_copied_folder_loads(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    load_adapter(build("sd15").model, str(tmp_path / "copy"))
