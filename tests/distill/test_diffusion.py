from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.training_utils import compute_snr

from flatten_diffusion.distill import Diffusion

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
    assert 0 < drawn.min() and drawn.max() <= 1000


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


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="rectified"):
        Diffusion(DDPMScheduler(prediction_type="rectified"))
    flow = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert Diffusion(flow).prediction == "flow"
