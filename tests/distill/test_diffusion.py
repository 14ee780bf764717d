from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_snr

from flatten_diffusion.distill import Diffusion
from flatten_diffusion.distill.denoiser_call import sampling_shift

from .tiny import tiny_flux, tiny_sd3

TIMESTEPS = torch.tensor([0, 1, 17, 400, 998])


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, 3, 5, generator=generator), torch.randn(5, 4, 3, 5, generator=generator)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_agrees_with_the_scheduler(prediction: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction, beta_schedule="scaled_linear")
    diffusion, (clean, noise) = Diffusion(scheduler), pair()
    expected = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, TIMESTEPS)}
    assert torch.allclose(
        diffusion.add_noise(clean, noise, TIMESTEPS), scheduler.add_noise(clean, noise, TIMESTEPS), atol=1e-5
    )
    assert torch.allclose(diffusion.target(clean, noise, TIMESTEPS), expected[prediction], atol=1e-5)


def test_flow_matching_agrees_with_the_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    diffusion, (clean, noise) = Diffusion(scheduler), pair()
    timesteps = scheduler.timesteps[[0, 3, 400, 800, 999]]
    assert torch.allclose(
        diffusion.add_noise(clean, noise, timesteps), scheduler.scale_noise(clean, timesteps, noise), atol=1e-5
    )
    assert torch.equal(diffusion.target(clean, noise, timesteps), noise - clean)
    drawn = diffusion.draw_timesteps(4000, torch.Generator().manual_seed(0))
    # With shift s, the median of a uniform draw lands at s / (1 + s) = 0.75.
    assert drawn.median().item() == pytest.approx(750, abs=2)
    assert drawn.min() > 0 and drawn.max() <= 1000


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(prediction: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction)
    snr = compute_snr(scheduler, TIMESTEPS).double()
    clipped = snr.clamp(max=5.0)
    expected = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction]
    assert torch.allclose(Diffusion(scheduler).snr_weights(TIMESTEPS, 5.0).double(), expected, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_finite_without_any_signal(prediction: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True)
    weights = Diffusion(scheduler).snr_weights(torch.tensor([999]), 5.0)
    assert weights.isfinite().all()
    assert weights.item() == pytest.approx(1.0 if prediction == "epsilon" else 0.0, abs=1e-6)


def test_flow_weights_are_min_snr_of_the_clean_error() -> None:
    weights = Diffusion(FlowMatchEulerDiscreteScheduler()).snr_weights(torch.tensor([250.0, 900.0]), 5.0)
    expected = [min((0.75 / 0.25) ** 2, 5.0) * 0.25**2, (0.1 / 0.9) ** 2 * 0.9**2]
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_timesteps_are_stratified() -> None:
    drawn = Diffusion(DDPMScheduler()).draw_timesteps(10, torch.Generator().manual_seed(3))
    assert drawn.dtype == torch.int64
    assert sorted((drawn // 100).tolist()) == list(range(10))
    assert drawn.tolist() != sorted(drawn.tolist())


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_median_timestep_is_the_samplers(scheduler: Any) -> None:
    drawn = Diffusion(scheduler).draw_timesteps(4000, torch.Generator().manual_seed(0))
    scheduler.set_timesteps(101)
    assert drawn.median().item() == pytest.approx(scheduler.timesteps.float().median().item(), abs=5)


@pytest.mark.parametrize("build", [tiny_flux, tiny_sd3])
def test_a_shift_by_size_is_the_pipelines(build: Any) -> None:
    pipeline, size = build(), (96, 128)
    options = {"use_dynamic_shifting": True, "shift": 7.0, "base_shift": 0.5, "max_shift": 9.0}
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**options)
    diffusion = Diffusion(pipeline.scheduler)
    with pytest.raises(ValueError, match="by the image's size"):
        diffusion.draw_timesteps(2, torch.Generator())
    shift = sampling_shift(pipeline, pipeline.transformer, size)
    drawn = diffusion.draw_timesteps(4000, torch.Generator().manual_seed(0), shift)
    pipeline("a", height=size[0], width=size[1], output_type="latent")
    assert drawn.median().item() == pytest.approx(pipeline.scheduler.timesteps.double().quantile(0.5).item(), abs=5)
    assert sampling_shift(pipeline, pipeline.transformer, (32, 32)) != shift


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="counts backwards"):
        Diffusion(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ValueError, match="rectified"):
        Diffusion(DDPMScheduler(prediction_type="rectified"))
    flow = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert Diffusion(flow).prediction == "flow"
