from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flatten_diffusion import AdapterConfig, linearize
from flatten_diffusion.highres import HighRes, generate_large, generate_stages
from flatten_diffusion.highres.record import Request
from flatten_diffusion.scenes import load_scenes_pipeline

from .tiny import FAMILIES, PROMPT, build, state_of

SIZES = ((32, 32), (48, 64), (64, 96))
EVERYTHING = {"sequential_guidance": True, "feed_forward_chunk": 20, "proportional_attention": True, "tile": 32}


def settings(**options: Any) -> HighRes:
    return HighRes(**{"sizes": SIZES, "steps": 4, "strength": 0.5, **options})


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image)


def drawn(pipeline: Any, **options: Any) -> list[Any]:
    where = options.pop("output_dir", None)
    return list(generate_stages(pipeline, PROMPT, settings(**options), seed=3, output_dir=where))


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_of_every_family_are_reproducible_and_leave_nothing(name: str) -> None:
    pipeline = build(name)
    options = {**EVERYTHING, **({"rotary_scaling": "ntk"} if name == "flux" else {})}
    before = state_of(pipeline)
    stages = drawn(pipeline, **options)
    assert state_of(pipeline) == before
    assert [stage.size for stage in stages] == list(SIZES)
    assert [(stage.image.height, stage.image.width) for stage in stages] == list(SIZES)
    assert [tuple(stage.latents.shape) for stage in stages] == [(1, 4, h // 4, w // 4) for h, w in SIZES]
    assert [stage.steps for stage in stages] == [4, 2, 2]
    again = generate_large(pipeline, PROMPT, settings(**options), seed=3)
    assert np.array_equal(pixels(again), pixels(stages[-1].image))
    other = generate_large(pipeline, PROMPT, settings(**options), seed=4)
    assert not np.array_equal(pixels(other), pixels(stages[-1].image))


def test_the_first_stage_is_the_pipelines_own_picture() -> None:
    pipeline = build("sd")
    (stage,) = generate_stages(
        pipeline, PROMPT, settings(sizes=[(32, 48)], tiled_vae=False), seed=3, guidance_scale=2.0
    )
    own = pipeline(
        PROMPT,
        height=32,
        width=48,
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=Request(PROMPT, seed=3).generator(1),
    ).images[0]
    assert np.array_equal(pixels(stage.image), pixels(own))


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_latents_may_be_resized_instead(name: str) -> None:
    pipeline = build(name)
    by_latents, by_pixels = (drawn(pipeline, upsample=upsample)[-1] for upsample in ("latent", "pixel"))
    assert by_latents.latents.shape == by_pixels.latents.shape
    assert not torch.equal(by_latents.latents, by_pixels.latents)


@pytest.mark.parametrize("upsample", ["pixel", "latent"])
@pytest.mark.parametrize("finished", [1, 2, 3])
def test_an_interrupted_call_goes_on_bit_equal(tmp_path: Path, finished: int, upsample: str) -> None:
    pipeline = build("sd")
    whole = drawn(pipeline, upsample=upsample, output_dir=tmp_path / "whole")
    stages = generate_stages(pipeline, PROMPT, settings(upsample=upsample), seed=3, output_dir=tmp_path / "parts")
    for _ in range(finished):
        next(stages)
    stages.close()  # type: ignore[attr-defined]
    resumed = drawn(build("sd"), upsample=upsample, output_dir=tmp_path / "parts")
    assert [stage.number for stage in resumed] == list(range(finished, 4))
    assert [stage.resumed for stage in resumed] == [True] + [False] * (3 - finished)
    assert torch.equal(resumed[-1].latents, whole[-1].latents)
    assert np.array_equal(pixels(resumed[-1].image), pixels(whole[-1].image))


def test_an_error_within_a_stage_leaves_the_pipeline_and_the_stages_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = build("sd")
    before = state_of(pipeline)
    forward = pipeline.unet.mid_block.forward

    def interrupted(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if hidden_states.shape[-1] > 4:
            raise KeyboardInterrupt
        return forward(hidden_states, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.unet.mid_block, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drawn(pipeline, output_dir=tmp_path, **EVERYTHING)
    pipeline.unet.mid_block.__dict__.pop("forward", None)  # monkeypatch sets what it found
    assert state_of(pipeline) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-32x32", "settings.json"]


def test_a_damaged_stage_is_drawn_again(tmp_path: Path) -> None:
    pipeline = build("sd")
    whole = drawn(pipeline, output_dir=tmp_path)
    picture = tmp_path / "3-64x96" / "picture.png"
    picture.write_bytes(picture.read_bytes()[:200])
    latents = tmp_path / "2-48x64" / "latents.safetensors"
    latents.write_bytes(latents.read_bytes()[:-1])
    again = drawn(pipeline, output_dir=tmp_path)
    assert [stage.number for stage in again] == [1, 2, 3]
    assert np.array_equal(pixels(again[-1].image), pixels(whole[-1].image))


def test_a_stage_file_holds_its_settings(tmp_path: Path) -> None:
    (*_, last) = drawn(build("sd"), output_dir=tmp_path)
    with Image.open(last.folder / "picture.png") as picture:
        inside = json.loads(picture.info["flatten_diffusion"])
        assert np.array_equal(np.asarray(picture), pixels(last.image))
    assert inside["prompt"] == PROMPT and inside["seed"] == 3 and inside["stage"] == 3
    assert inside["settings"]["strength"] == 0.5 and inside["sizes"] == [list(size) for size in SIZES]


def test_other_settings_in_the_same_folder_are_refused_before_anything_runs(tmp_path: Path) -> None:
    pipeline = build("sd")
    drawn(pipeline, output_dir=tmp_path)

    def says(match: str, prompt: str = PROMPT, seed: int = 3, **options: Any) -> None:
        with pytest.raises(ValueError, match=match) as refused:
            generate_stages(pipeline, prompt, settings(**options), seed=seed, output_dir=tmp_path)
        assert "\n" not in str(refused.value) and "another output_dir" in str(refused.value)

    says("prompt a red circle, not a blue square", prompt="a blue square")
    says("seed 3, not 4", seed=4)
    says("settings strength 0.5, not strength 0.75", strength=0.75)
    says("sizes", sizes=[(32, 32), (64, 64)])
    linearize(pipeline, AdapterConfig())
    says("attention")
    assert drawn(build("sd"), output_dir=tmp_path)[0].resumed
    other = build("sd")
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(2)
    with pytest.raises(ValueError, match="parts unet"):
        generate_stages(other, PROMPT, settings(), seed=3, output_dir=tmp_path)


def test_a_record_that_was_edited_is_refused(tmp_path: Path) -> None:
    pipeline = build("sd")
    drawn(pipeline, output_dir=tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="other settings"):
        list(generate_stages(pipeline, PROMPT, settings(), seed=9, output_dir=tmp_path))
    (tmp_path / "settings.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="truncated or no JSON"):
        generate_stages(pipeline, PROMPT, settings(), seed=3, output_dir=tmp_path)


def test_converted_pipelines_stay_converted() -> None:
    pipeline = build("sd")
    original = drawn(pipeline)[-1]
    adapter = linearize(pipeline, AdapterConfig(mixer="pyramid"))
    processors = [attn.processor for _, attn in adapter.attention_modules()]
    converted = drawn(pipeline, **EVERYTHING)[-1]
    assert [attn.processor for _, attn in adapter.attention_modules()] == processors
    assert all(layer.state.idle for _, layer, _ in adapter.converted_layers())
    assert not torch.equal(converted.latents, original.latents)
    with adapter.disabled():
        assert torch.equal(drawn(pipeline)[-1].latents, original.latents)


def test_values_that_are_not_finite_are_named() -> None:
    pipeline = build("sd")
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="Stage 1 of 32x32 is not finite"):
        drawn(pipeline)


def test_the_embedded_pipeline() -> None:
    pipeline = load_scenes_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    caption = "a red circle on a white background"
    image = generate_large(pipeline, caption, HighRes(target=(192, 192), steps=6), guidance_scale=2.0, seed=1)
    assert image.size == (192, 192)
    corners = np.asarray(image)[[0, 0, -1, -1], [0, -1, 0, -1]].astype(float)
    assert (corners > 180).all()  # the white background is still there
