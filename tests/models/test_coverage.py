"""Every model class of the installed diffusers that attends has rows in the family table, or a reason."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from diffusers.models.unets.unet_2d_blocks import SimpleCrossAttnDownBlock2D
from torch import nn

from flatten_diffusion import linearize
from flatten_diffusion.models import ARCHITECTURES, REFUSED, find_attention_layers, token_layout

from .tiny import build, stir
from .tiny_parts import T, position_ids
from .tiny_wrapped import build_wrapped

_NEWEST = pytest.mark.skipif(not hasattr(diffusers, "Flux3Transformer2DModel"), reason="an older diffusers")
_OUTSIDE = ("outside the families", "joint text-image attention", "image and text keys share one softmax")

# What classes are made with that their defaults do not suffice for.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (32, 32),
        "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16,
    },
    "ControlNetUnionModel": {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48},
    "DreamLiteTransformer2DModel": {"in_channels": 32},
    "RFD4ProteinaAutoencoder": {"atom37_mask": [[1.0] * 37] * 147, "allowed_residue_types": [0]},
    "Transformer2DModel": {"in_channels": 32},
    "TransformerTemporalModel": {"in_channels": 32},
}  # fmt: skip
_TINY: dict[str, Callable[[], Any]] = {
    "EasyAnimateTransformer3DModel": partial(build_wrapped, "easyanimate"),
    "HiDreamImageTransformer2DModel": partial(build_wrapped, "hidream"),
    "HunyuanDiT2DControlNetModel": partial(build_wrapped, "hunyuandit_controlnet"),
    "HunyuanDiT2DModel": partial(build_wrapped, "hunyuandit"),
    "LatteTransformer3DModel": partial(build, "latte"),
    "LuminaNextDiT2DModel": partial(build_wrapped, "luminanext"),
    "OmniGenTransformer2DModel": partial(build_wrapped, "omnigen"),
    "ZImageControlNetModel": partial(build_wrapped, "zimage_controlnet"),
}


def _modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models.")
    return [importlib.import_module(module.name) for module in found]


def _model_classes() -> Iterator[type[nn.Module]]:
    for module in _modules():
        for _, cls in inspect.getmembers(module, inspect.isclass):
            # A "Multi..." holds a list of models that have rows of their own.
            plain = issubclass(cls, ModelMixin) and not cls.__name__.endswith("Mixin") and "Multi" not in cls.__name__
            if plain and cls.__module__ == module.__name__:
                yield cls


def _made(cls: type[nn.Module]) -> nn.Module:
    """A model of the class, without memory where its defaults suffice, and of a few blocks where they allow that."""
    if cls.__name__ in _TINY:
        return _TINY[cls.__name__]().model
    given = _ARGUMENTS.get(cls.__name__, {})
    known = inspect.signature(cls.__init__).parameters
    deep = [name for name in _DEPTHS if name in known and isinstance(known[name].default, int)]
    shallow = {name: min(known[name].default, 4) for name in deep}
    with torch.device("meta"):
        try:
            return cls(**shallow, **given)
        except (AssertionError, IndexError, ValueError):
            return cls(**given)
        except RuntimeError:  # tables made from numbers on the CPU
            pass
    return cls(**shallow, **given)


_DEPTHS = (
    "num_layers",
    "num_single_layers",
    "num_visual_blocks",
    "num_hidden_layers",
    "depth",
    "transformer_num_layers",
)


@pytest.mark.parametrize("cls", list(_model_classes()), ids=lambda cls: cls.__name__)
def test_every_layer_that_attends_has_a_row_or_a_reason(cls):
    """Where this fails after an update of diffusers: see "Adding a family" in flatten_diffusion/models/README.md."""
    for finding in find_attention_layers(_made(cls)):
        assert finding.reason is None or not any(word in finding.reason for word in _OUTSIDE), finding.name


@_NEWEST
def test_no_row_and_no_reason_is_of_a_class_that_is_gone():
    names = {name for found in _modules() for name in dir(found)}
    assert {architecture.owner for architecture in ARCHITECTURES} <= names
    assert set(REFUSED) <= names


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("PriorTransformer", {"num_layers": 1}, "predicts an image embedding from a few tokens"),
        ("T5FilmDecoder", {"num_layers": 1}, "spectrogram frames and notes"),
        ("AutoencoderKLMochi", {}, "an autoencoder, not a denoiser"),
    ],
)
def test_a_class_that_is_refused_says_why(name, arguments, why):
    with torch.device("meta"):
        model = getattr(diffusers, name)(**arguments)
    with pytest.raises(ValueError, match=f"{name} has no layer that can be converted: .*{why}") as error:
        linearize(model)
    assert "\n" not in str(error.value)


def test_a_vae_with_known_layers_is_no_such_class():
    assert "AutoencoderKL" not in REFUSED


# ---- what one tiny model a class does not show ----


def _grids(adapter):
    return {row.name: row.grid for row in adapter.report().converted}


def test_flux3_reads_its_image_its_references_and_both():
    tiny = build_wrapped("flux3")
    adapter = linearize(tiny.model)
    with torch.no_grad():
        tiny()
        assert _grids(adapter) == {
            "mode_blocks.image.0.attn": (4, 6),
            "mode_blocks.image_cond.0.attn": (3, 3),
            "single_transformer_blocks.0.attn": ((1, 4, 6), (1, 3, 3)),
        }
        tiny(image_cond_hidden_states=None, image_cond_ids=None)
        assert _grids(adapter)["single_transformer_blocks.0.attn"] == (4, 6)


@pytest.mark.parametrize(("name", "audio"), [("ltx2", "audio_attn1"), ("kandinsky6", "audio_dec_block.self_attention")])
def test_audio_beside_a_video_has_a_grid_of_its_own(name, audio):
    tiny = build_wrapped(name)
    with torch.no_grad():
        native = tiny()
        adapter = linearize(tiny.model)
        output = tiny()
        assert output.isfinite().all() and not torch.equal(output, native)
        for layer, grid in _grids(adapter).items():
            assert grid == ((1, 10) if layer.endswith(audio) else (2, 4, 6))
        with adapter.disabled():
            assert torch.equal(tiny(), native)
    assert len(_grids(adapter)) > tiny.converted


def test_layers_that_are_linear_already_are_left_alone():
    reasons = {finding.name: finding.reason for finding in find_attention_layers(build_wrapped("acestep").model)}
    assert reasons["layers.0.self_attn"].startswith("attends within a sliding window")
    assert reasons["layers.1.self_attn"] is None


@_NEWEST
def test_differential_attention_is_named():
    with torch.device("meta"):
        model = diffusers.StableAudio3DiTModel(depth=1)
    with pytest.raises(ValueError, match="differential attention: the difference of two softmaxes"):
        linearize(model)


def test_a_unet_that_only_attends_to_text_keeps_it():
    with torch.device("meta"):
        block = SimpleCrossAttnDownBlock2D(32, 32, 8, attention_head_dim=8, only_cross_attention=True)
    assert [finding.reason for finding in find_attention_layers(nn.ModuleList([block]))] == ["cross-attention"]


@_NEWEST
def test_a_dreamlite_that_only_attends_to_text_keeps_it():
    home = inspect.getmodule(diffusers.DreamLiteUNetModel)
    block = home.DreamLiteTransformer2DModel(2, 8, in_channels=32, cross_attention_dim=24, only_cross_attention=True)
    assert [finding.reason for finding in find_attention_layers(block)] == ["cross-attention"] * 2


def test_sparse_attention_of_kandinsky5_stays():
    reading = token_layout.dense_channels_last_video(
        build_wrapped("kandinsky5").model, torch.zeros(1, 2, 8, 12, 4), {"P": 0.9}
    )
    assert reading.softmax is not None and reading.grid == (2, 4, 6)


def test_other_tokens_between_the_videos_of_cosmos3_keep_softmax():
    model = build_wrapped("cosmos3").model
    assert token_layout.packed_video(model, [(2, 4, 6)], 7, 55).softmax is None
    assert "sound or action" in str(token_layout.packed_video(model, [(2, 4, 6)], 7, 60).softmax)


def test_the_video_of_minimax_follows_its_references():
    """[2 text, reference of 2 x 3, audio, video of 2 x 2 x 3], the reference not part of the image."""
    frame = position_ids(2, 3)
    times = [
        torch.zeros(2, 3),
        frame + T([2.0, 0, 0]),
        torch.zeros(1, 3),
        frame + T([3.0, 0, 0]),
        frame + T([4.5, 0, 0]),
    ]
    indices = torch.cat([torch.arange(2, 8), torch.arange(9, 21)])
    assert token_layout.packed_position_ids(None, torch.cat(times), indices).grid == (2, 2, 3)
    with pytest.raises(ValueError, match="video_indices do not end with the sequence"):
        token_layout.packed_position_ids(None, torch.cat([*times, torch.zeros(1, 3)]), indices)


def test_bria_fibo2_stands_first_where_gists_differ():
    tiny = build_wrapped("briafibo2")
    adapter = linearize(tiny.model)
    stir(adapter)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    text = torch.randn(2, 2, 9, 24)
    hidden = tiny.inputs["hidden_states"]
    starts = []
    attention = tiny.model.layers[0].attention
    attention.register_forward_hook(lambda attn, *_: starts.append(attn.flatten_layer.state.reading.starts))
    with torch.no_grad():
        both = tiny(encoder_hidden_states=text, encoder_attention_mask=mask).unflatten(0, (2, -1))
        assert starts[-1] is not None
        for sample, tokens in ((0, 9), (1, 4)):
            alone = tiny.model(
                hidden[sample : sample + 1],
                T([0.5]),
                text[sample : sample + 1, :, :tokens],
                mask[sample : sample + 1, :tokens],
            )[0]
            assert starts[-1] is None
            torch.testing.assert_close(alone.flatten(), both[sample], rtol=1e-4, atol=1e-4)
        reference = [torch.randn(2, 4, 4, 4)]
        assert tiny(context_latents=reference).isfinite().all()
        assert {row.grid for row in adapter.report().converted} == {((1, 4, 6), (1, 2, 2))}


_ONCE = ("indices_latents", "indices_latents_clean", "indices_latents_history_2x", "indices_latents_history_4x")


def _second(inputs: dict[str, Any], cuts: dict[str, slice]) -> dict[str, Any]:
    """The second sample of a batch, its tokens cut to those that count."""
    alone = {}
    for name, value in inputs.items():
        part = value if name in _ONCE or (name == "position_ids" and value.dim() == 2) else value[1:]
        cut = cuts.get(name)
        alone[name] = part if cut is None else part[cut] if part.dim() == 2 and len(part) > 2 else part[:, cut]
    return alone


_TEXT = {name: slice(5) for name in ("encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_mask")}
_ALL = ("hidden_states", "encoder_hidden_states", "position_ids", "segment_ids", "indicator")


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("krea2", {**_TEXT, "position_ids": slice(2, None)}),
        ("ideogram4", dict.fromkeys(_ALL, slice(2, None))),
        ("ernie", {"text_bth": slice(5)}),
        ("hunyuanimage", _TEXT),
        ("hunyuanvideo15", _TEXT),
        ("framepack", _TEXT),
        ("motifvideo", _TEXT),
        ("nucleus", _TEXT),
        ("joyimageplus", _TEXT),
    ],
)
def test_a_padded_sample_gives_what_it_gives_alone(name, cuts):
    tiny = build_wrapped(name)
    stir(linearize(tiny.model))
    with torch.no_grad():
        together = tiny.model(**tiny.inputs)[0][1]
        alone = tiny.model(**_second(tiny.inputs, cuts))[0][0]
    torch.testing.assert_close(alone, together[-len(alone) :], rtol=1e-4, atol=1e-4)


def test_padding_of_a_signal_does_not_matter():
    tiny = build_wrapped("longcataudio")
    stir(linearize(tiny.model))
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 12:] = False
    changed = tiny.inputs["hidden_states"].clone()
    changed[1, 12:] += 100
    with torch.no_grad():
        both = [tiny(attention_mask=mask, hidden_states=x) for x in (tiny.inputs["hidden_states"], changed)]
    torch.testing.assert_close(*both)


def test_image_tokens_of_hunyuanvideo15_count_where_there_is_an_image():
    tiny = build_wrapped("hunyuanvideo15")
    stir(linearize(tiny.model))
    inputs = {**tiny.inputs, "image_embeds": torch.randn(2, 3, 8)}
    with torch.no_grad():
        together = tiny.model(**inputs)[0][1]
        torch.testing.assert_close(tiny.model(**_second(inputs, _TEXT))[0][0], together, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(tiny.model(**tiny.inputs)[0][1], together)


def test_qwenimage21_from_its_cache_is_what_it_is_whole():
    tiny = build_wrapped("qwenimage21")
    adapter = linearize(tiny.model)
    stir(adapter)
    home = inspect.getmodule(type(tiny.model))
    cache = home.QwenImage21KVCache(len(tiny.model.transformer_blocks))
    with torch.no_grad():
        whole = tiny()
        target = tiny.model(**tiny.inputs, kv_cache=cache, kv_cache_mode="extract")[0]
        assert torch.equal(target.flatten(), whole)
        cached = tiny.model(**tiny.inputs, kv_cache=cache, kv_cache_mode="cached")[0]
        torch.testing.assert_close(cached, target[:, -cached.shape[1] :], rtol=1e-4, atol=1e-5)
        adapter.add_deltas(("q", "k", "v", "out"), 2)
        assert torch.equal(tiny(), whole)


def test_references_of_glm_are_keys_beside_the_image():
    tiny = build_wrapped("glm")
    adapter = linearize(tiny.model)
    stir(adapter)
    home = inspect.getmodule(type(tiny.model))
    cache = home.GlmImageKVCache(num_layers=2)
    first = {name: value[:1] for name, value in tiny.inputs.items()}
    with torch.no_grad():
        plain = tiny.model(**first)[0]
        cache.set_mode("write")
        tiny.model(**first, kv_caches=cache)
        cache.set_mode("read")
        seen = tiny.model(**first, kv_caches=cache)[0]
    assert seen.isfinite().all() and not torch.allclose(seen, plain)
