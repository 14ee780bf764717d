from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import FeedForward

from flatten_diffusion.highres import HighRes, OneByOne, chunked_feed_forward, generate_stages, tiled_vae
from flatten_diffusion.scenes import load_scenes_pipeline, render

from .tiny import FAMILIES, PROMPT, build


def last_latents(pipeline: Any, **options: Any) -> torch.Tensor:
    # One stage: between stages pixels are rounded to 8 bits, which blows rounding up.
    settings = HighRes(sizes=[(48, 64)], steps=4, **options)
    (*_, last) = generate_stages(pipeline, PROMPT, settings, seed=2)
    return last.latents


@pytest.mark.parametrize("name", FAMILIES)
def test_sequential_guidance_is_that_of_a_batch(name: str) -> None:
    pipeline = build(name)
    batches: list[int] = []
    model = getattr(pipeline, "unet", None) or pipeline.transformer
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    batched = last_latents(pipeline)
    assert set(batches) == ({1} if name == "flux" else {2})
    batches.clear()
    sequential = last_latents(pipeline, sequential_guidance=True)
    assert set(batches) == {1}
    hook.remove()
    torch.testing.assert_close(sequential, batched, rtol=1e-3, atol=1e-3)


def test_one_by_one_is_the_model_in_all_else() -> None:
    pipeline = build("sd3")
    stand_in = OneByOne(pipeline.transformer)
    assert stand_in.config is pipeline.transformer.config and stand_in.dtype == torch.float32
    inputs = {
        "hidden_states": torch.randn(3, 4, 8, 8),
        "timestep": torch.tensor([5.0, 6.0, 7.0]),
        "encoder_hidden_states": torch.randn(3, 7, 56),
        "pooled_projections": torch.randn(3, 24),
    }
    with torch.no_grad():
        expected = pipeline.transformer(**inputs)
        got = stand_in(**inputs)
        assert type(got) is type(expected)
        torch.testing.assert_close(got.sample, expected.sample, rtol=1e-4, atol=1e-5)
        assert isinstance(stand_in(**inputs, return_dict=False), tuple)


def test_one_by_one_divides_dicts_and_lists() -> None:
    class Echo(torch.nn.Module):
        def forward(self, x: Any, more: dict[str, Any], whole: torch.Tensor) -> Any:
            assert len(x) == 1 and len(more["rows"]) == 1 and len(whole) == 5
            return [x[0] + more["rows"][0]], more["number"]

    whole, rows = torch.zeros(5), torch.arange(3.0)
    got, number = OneByOne(Echo())([torch.tensor(float(i)) for i in range(3)], {"rows": rows, "number": 7}, whole)
    assert [value.item() for value in got] == [0, 2, 4] and number == 7


@pytest.mark.parametrize("tokens", [1, 7, 1000])
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_chunked_feed_forward_is_the_whole_one(name: str, tokens: int) -> None:
    pipeline = build(name)
    expected = last_latents(pipeline)
    torch.testing.assert_close(last_latents(pipeline, feed_forward_chunk=tokens), expected, rtol=1e-3, atol=1e-3)


def test_chunks_bound_what_the_hidden_layer_sees() -> None:
    pipeline = build("sd")
    layer = next(module for module in pipeline.unet.modules() if isinstance(module, FeedForward))
    seen: list[int] = []
    hook = layer.net[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with chunked_feed_forward(pipeline.unet, 10):
        layer(torch.randn(2, 25, 16))
    hook.remove()
    assert seen == [10, 10, 5] and "forward" not in vars(layer)


def test_chunking_keeps_a_forward_that_was_there() -> None:
    pipeline = build("sd")
    layer = next(module for module in pipeline.unet.modules() if isinstance(module, FeedForward))
    own = layer.forward
    layer.forward = own
    with chunked_feed_forward(pipeline.unet, 10):
        assert vars(layer)["forward"] is not own
    assert vars(layer)["forward"] is own


def test_a_model_without_feed_forward_is_named() -> None:
    with (
        pytest.raises(ValueError, match="Linear has no FeedForward layers"),
        chunked_feed_forward(torch.nn.Linear(2, 2), 4),
    ):
        pass


@pytest.mark.parametrize("on", [False, True])
def test_tiling_is_as_before(on: bool) -> None:
    vae = build("sd").vae
    vae.use_tiling = on
    before = dict(vars(vae))
    with tiled_vae(vae, 16):
        assert vae.use_tiling and vae.tile_sample_min_size == 16 and vae.tile_latent_min_size == 4
    assert vars(vae) == before


def test_tiles_of_the_embedded_vae_are_near_the_whole() -> None:
    vae = load_scenes_pipeline().vae
    pixels = np.asarray(render("a striped red circle left of a blue star on a white background", 192))
    picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(picture).latent_dist.mode()
        whole = vae.decode(latents).sample
        with tiled_vae(vae):
            assert 0 < (vae.encode(picture).latent_dist.mode() - latents).abs().mean() < 0.02
            tiled = vae.decode(latents).sample
    assert 0 < (tiled - whole).abs().mean() * 127.5 < 2.5  # of 255; rounding through the autoencoder costs as much
