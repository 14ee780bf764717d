"""The teacher's forward process, read from its scheduler: noisy latents, targets and loss weights at a timestep."""

from __future__ import annotations

from typing import Any

import torch

from ..files import sha256_of_tensors

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
"""What a model may be trained to predict. "flow" is the velocity noise - clean of flow matching."""


class Diffusion:
    """How clean latents become noisy ones, and what the model should say about them.

    Diffusion models use the scheduler's `alphas_cumprod` (Ho et al., "Denoising Diffusion Probabilistic Models",
    NeurIPS 2020, eq. 4; v-prediction: Salimans & Ho, ICLR 2022); flow matching uses `x = (1 - s) clean + s noise`
    (Lipman et al., ICLR 2023) with the scheduler's `shift` or `flow_shift` of s.

    Attributes:
        prediction: one of `PREDICTIONS`.
        steps: number of training timesteps.
        shift: of timesteps towards noise; None where the scheduler leaves it to the image's size.

    Raises:
        ValueError: a scheduler that says neither, that counts from noise to data, or a prediction type this does not
            know.
    """

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.config
        self.steps = int(config.num_train_timesteps)
        shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
        self.shift = None if config.get("use_dynamic_shifting") else shift
        self._alphas: torch.Tensor | None = None
        if config.get("invert_sigmas"):
            raise ValueError(f"{type(scheduler).__name__} with invert_sigmas cannot be distilled: it counts backwards.")
        if type(scheduler).__name__.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
            self.prediction = "flow"
            return
        self.prediction = config.get("prediction_type", "epsilon")
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if self.prediction not in PREDICTIONS or alphas is None:
            raise ValueError(
                f"{type(scheduler).__name__} with prediction_type {self.prediction!r} cannot be distilled: use a "
                "scheduler with alphas_cumprod and epsilon, v_prediction or sample, or a flow-matching one."
            )
        self._alphas = alphas.double().cpu()

    def draw_timesteps(self, count: int, generator: torch.Generator, shift: float | None = None) -> torch.Tensor:
        """[count] timesteps as the model takes them, stratified: one in each count-th of the range, shuffled.

        int64 for diffusion, float32 (1000 s, with s in (0, 1]) for flow matching, shifted by `shift` where the
        scheduler leaves that to the image's size (see `denoiser_call.sampling_shift`).

        Raises:
            ValueError: such a scheduler, and no `shift`.
        """
        order = torch.randperm(count, generator=generator)
        share = (order + torch.rand(count, generator=generator)) / count
        if self.prediction != "flow":
            return (share * self.steps).long().clamp(max=self.steps - 1)
        share, shift = share.clamp(min=1e-3), shift if self.shift is None else self.shift
        if shift is None:
            raise ValueError("The scheduler shifts timesteps by the image's size: pass `shift`.")
        return self.steps * shift * share / (1 + (shift - 1) * share)

    def identity(self) -> str:
        """A digest of the process."""
        alphas = {} if self._alphas is None else {"alphas": self._alphas}
        return sha256_of_tensors(alphas, f"{self.prediction} {self.steps} {self.shift}")

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, ...] at `timesteps` [B]."""
        signal, sigma = self._factors(timesteps, clean)
        return signal * clean + sigma * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the model is trained to predict, in the shape of `clean`."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        if self.prediction == "flow":
            return noise - clean
        signal, sigma = self._factors(timesteps, clean)
        return signal * noise - sigma * clean

    def snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """[B] weights of a squared error in the model's prediction: min-SNR (Hang et al., ICCV 2023, eq. 8).

        `min(SNR, gamma)` on the clean image's error, translated to what the model predicts.
        """
        signal, sigma = self._factors(timesteps, torch.empty(len(timesteps), dtype=torch.float64))
        clipped = torch.minimum((signal / sigma.clamp(min=1e-12)).square(), torch.tensor(gamma, dtype=torch.float64))
        if self.prediction == "epsilon":  # clean error = (sigma / signal)^2 * epsilon error
            weights = torch.minimum(torch.ones_like(clipped), gamma * (sigma / signal.clamp(min=1e-12)).square())
        elif self.prediction == "sample":
            weights = clipped
        else:  # clean error = sigma^2 * v error, in both parametrisations
            weights = clipped * sigma.square()
        return weights.float().to(timesteps.device)

    def _factors(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of clean and noise at [B] timesteps, shaped to broadcast over `like`."""
        if self._alphas is None:
            sigma = timesteps.double().cpu() / self.steps
            signal = 1 - sigma
        else:
            alphas = self._alphas[timesteps.cpu()]
            signal, sigma = alphas.sqrt(), (1 - alphas).sqrt()
        shape = (-1, *[1] * (like.dim() - 1))
        return signal.reshape(shape).to(like), sigma.reshape(shape).to(like)
