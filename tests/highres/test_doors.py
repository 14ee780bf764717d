from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from flatten_diffusion.highres import HighRes, check_pipeline, generate_stages, ntk_rotary
from flatten_diffusion.highres.pipelines import stage_scheduler
from flatten_diffusion.scenes import load_scenes_pipeline, load_sd3_scenes_pipeline

from ..distill.tiny import tiny_aura_flow
from .tiny import PROMPT, build, state_of

TWO = ((32, 32), (64, 64))


def refused(pipeline: Any, match: str, **options: Any) -> None:
    """Refused in one line before the denoiser is called, and nothing is left."""
    before = state_of(pipeline)
    with pytest.raises((ValueError, TypeError), match=match) as error:
        generate_stages(pipeline, PROMPT, HighRes(**{"sizes": TWO, **options}))
    assert "\n" not in str(error.value)
    assert state_of(pipeline) == before


@pytest.mark.parametrize(
    ("name", "sizes", "match"),
    [
        ("sd", [(32, 34)], "multiples of 4 pixels, not 32x34"),
        ("sd", [(32, 32), (66, 64)], "multiples of 4"),
        ("sd3", [(32, 36)], "multiples of 8"),
        ("flux", [(32, 36)], "multiples of 8"),
        ("sd3", [(32, 32), (136, 64)], "positions for 128 pixels"),
    ],
)
def test_sizes_that_the_pipeline_cannot_draw(name: str, sizes: Any, match: str) -> None:
    refused(build(name), match, sizes=sizes)


def test_a_target_is_checked_and_the_way_to_it_found() -> None:
    assert check_pipeline(build("sd"), HighRes(target=(96, 64))) == ((40, 28), (96, 64))
    refused(build("sd"), "multiples of 4", sizes=None, target=(65, 64))
    refused(build("sd"), "1 numbers for 2 later", sizes=None, target=(128, 128), strength=[0.5])
    assert check_pipeline(load_sd3_scenes_pipeline(), HighRes(target=(512, 512))) == (
        (128, 128),
        (256, 256),
        (512, 512),
    )


def test_pipelines_without_a_sibling_are_named() -> None:
    refused(tiny_aura_flow(), "AuraFlowPipeline has no image-to-image sibling")
    pipeline = build("sd")
    sibling = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
    refused(sibling, "StableDiffusionImg2ImgPipeline is no text-to-image pipeline: pass a StableDiffusionPipeline")
    with pytest.raises(TypeError, match="UNet2DConditionModel is no diffusers pipeline"):
        generate_stages(pipeline.unet, PROMPT, HighRes(sizes=TWO))


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="prompt is list"):
        generate_stages(build("sd"), [PROMPT], HighRes(sizes=TWO))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed is None"):
        generate_stages(build("sd"), PROMPT, HighRes(sizes=TWO), seed=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="settings is dict"):
        generate_stages(build("sd"), PROMPT, {})  # type: ignore[arg-type]


def test_options_that_a_pipeline_has_not(tmp_path: Path) -> None:
    refused(build("sd"), "DDIMScheduler has no time shift", time_shift=3.0)
    refused(build("sd"), "UNet2DConditionModel has no rotary", rotary_scaling="ntk")
    refused(build("sd"), "multiple of 16 pixels", tile=20)
    refused(load_scenes_pipeline(), "takes no latents of 12 channels", sizes=[(64, 64), (128, 128)], upsample="latent")
    pipeline = build("sd")
    pipeline.unet.set_attention_slice(1)
    refused(pipeline, "runs SlicedAttnProcessor, whose scores", proportional_attention=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        generate_stages(build("sd"), PROMPT, HighRes(sizes=TWO), output_dir=file)


def shift_of(scheduler: Any, steps: int = 8) -> float:
    """s of sigma = s u / (1 + (s - 1) u), from the schedule itself, with u = 1/2 given by hand."""
    scheduler.set_timesteps(sigmas=[1.0, 0.5], **({"mu": 1.0} if scheduler.config.use_dynamic_shifting else {}))
    sigma = scheduler.sigmas[1].item()
    return sigma / (1 - sigma)


def test_time_shift_grows_with_the_side() -> None:
    pipeline = build("sd3")
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    settings = HighRes(sizes=TWO)

    def shift(size: tuple[int, int], settings: HighRes = settings) -> float:
        return shift_of(stage_scheduler(pipeline, settings, size, (32, 32)))

    assert shift((32, 32)) == pytest.approx(3.0)
    assert shift((64, 64)) == pytest.approx(6.0)
    assert shift((32, 128)) == pytest.approx(6.0)
    assert shift((64, 64), HighRes(sizes=TWO, time_shift=5)) == pytest.approx(5.0)
    assert shift((64, 64), HighRes(sizes=TWO, time_shift=None)) == pytest.approx(3.0)
    assert pipeline.scheduler.shift == 3.0 and pipeline.scheduler.config.shift == 3.0


def test_time_shift_of_schedulers_that_look_at_the_size() -> None:
    """At the native size the grown shift starts from the pipeline's own line; beyond, it does not run away on it."""
    pipeline = build("flux")
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    side = 8 * 16  # 256 tokens: the line's first point, 0.5
    settings = HighRes(sizes=[(side, side), (2 * side, 2 * side)])
    grown = stage_scheduler(pipeline, settings, (2 * side, 2 * side), (side, side))
    assert shift_of(grown) == pytest.approx(2 * math.exp(0.5))
    assert stage_scheduler(pipeline, settings, (side, side), (side, side)).config.use_dynamic_shifting
    assert pipeline.scheduler.config.use_dynamic_shifting


def test_other_schedules_are_copied_as_they_are() -> None:
    pipeline = build("sd")
    copy = stage_scheduler(pipeline, HighRes(sizes=TWO), (64, 64), (32, 32))
    assert copy is not pipeline.scheduler and dict(copy.config) == dict(pipeline.scheduler.config)


def test_flow_shift_of_multistep_solvers() -> None:
    pipeline = build("sd3")
    pipeline.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    assert stage_scheduler(pipeline, HighRes(sizes=TWO), (64, 64), (32, 32)).config.flow_shift == pytest.approx(6.0)


def test_ntk_scaling_slows_the_last_channel_by_the_factor() -> None:
    model = build("flux").transformer
    ids = torch.tensor([[0.0, 5.0, 9.0]])
    theta = model.pos_embed.theta
    angle = torch.atan2(*reversed([part.double() for part in model.pos_embed(ids)]))
    with ntk_rotary(model, 2.0):
        slower = torch.atan2(*reversed([part.double() for part in model.pos_embed(ids)]))
    assert model.pos_embed.theta == theta
    # Axes of 4, 6 and 6 channels, each angle twice: rows stand at 4 to 9, the fastest first, the slowest last.
    assert slower[0, 4].item() == pytest.approx(angle[0, 4].item())
    assert slower[0, 8].item() == pytest.approx(angle[0, 8].item() / 2, rel=1e-4)
