"""What the student is asked for, end to end: the teacher's prediction, the truth, and the teacher's features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..adapter import Adapter
from .batches import NoisyBatch
from .bounds import check_numbers, number
from .capture import FeatureTap
from .conditioning import Conditioning, predict
from .denoiser_call import is_shared
from .diffusion import Diffusion


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of the loss; a part of weight 0 is not computed.

    Attributes:
        teacher: squared error to the teacher's prediction, a learned variance included.
        target: squared error to what the teacher was trained to predict.
        features: squared error of each converted layer's output, relative to the mean square of the teacher's.
        guided: squared error between the guided predictions `u + s (c - u)` of both, divided by s squared; costs a
            second pass of both.
        guidance_scale: that s (Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022).
        min_snr_gamma: weighs timesteps by min-SNR (Hang et al., ICCV 2023); None weighs all alike.
    """

    teacher: float = number(1.0, 0.0, 1e6)
    target: float = number(0.5, 0.0, 1e6)
    features: float = number(0.5, 0.0, 1e6)
    guided: float = number(0.0, 0.0, 1e6)
    guidance_scale: float = number(3.0, 1e-3, 1e3)
    min_snr_gamma: float | None = number(None, 1e-3, 1e3)

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.teacher + self.target + self.features + self.guided:
            raise ValueError("All parts of the loss have weight 0: weigh one of teacher, target, features, guided.")


class Objective:
    """Computes the loss of a batch.

    Args:
        adapter: of the model that is distilled.
        network: what is called: the model, or a wrapper around it.
        diffusion: the teacher's forward process.
        weights: see `LossWeights`.
    """

    def __init__(self, adapter: Adapter, network: nn.Module, diffusion: Diffusion, weights: LossWeights) -> None:
        self.adapter, self.network, self.diffusion, self.weights = adapter, network, diffusion, weights

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The network's prediction as float32."""
        return predict(self.adapter.model, self.network, noisy, timesteps, conditioning).float()

    def teacher(self, batch: NoisyBatch) -> torch.Tensor:
        """The original model's prediction for a batch, without gradients."""
        with torch.no_grad(), self.adapter.disabled():
            return self.predict(batch.noisy, batch.timesteps, batch.conditioning)

    def student(self, batch: NoisyBatch) -> torch.Tensor:
        """The converted model's prediction for a batch."""
        return self.predict(batch.noisy, batch.timesteps, batch.conditioning)

    def loss(self, batch: NoisyBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum, and its parts without their weights, detached."""
        weights = self.weights
        parts: dict[str, torch.Tensor] = {}
        needs_teacher = weights.teacher > 0 or weights.features > 0
        with FeatureTap(self.adapter) as teacher_features:
            wanted = self.teacher(batch) if needs_teacher else None
        with FeatureTap(self.adapter) as student_features:
            answer = self.student(batch)
        per_sample = torch.ones(len(batch), device=batch.noisy.device)
        if weights.min_snr_gamma is not None:
            per_sample = self.diffusion.snr_weights(batch.timesteps, weights.min_snr_gamma)
        if weights.teacher > 0 and wanted is not None:
            parts["teacher"] = _weighted(answer - wanted, per_sample)
        if weights.target > 0:
            # A learned variance follows the mean in the channels and has no target of its own.
            parts["target"] = _weighted(answer[:, : batch.target.shape[1]] - batch.target, per_sample)
        if weights.features > 0:
            found, wanted_of = student_features.outputs, teacher_features.outputs
            parts["features"] = torch.stack([relative_error(found[name], wanted_of[name]) for name in wanted_of]).mean()
        if weights.guided > 0:
            parts["guided"] = self._guided(batch, per_sample)
        total = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def _guided(self, batch: NoisyBatch, per_sample: torch.Tensor) -> torch.Tensor:
        """Both branches in one batch of twice the size."""
        doubled = {
            name: tensor if is_shared(name) else torch.cat([batch.null[name], tensor])
            for name, tensor in batch.captioned.items()
        }
        noisy, timesteps = torch.cat([batch.noisy, batch.noisy]), batch.timesteps.repeat(2)
        scale = self.weights.guidance_scale

        def guided() -> torch.Tensor:
            unconditional, conditional = self.predict(noisy, timesteps, doubled).chunk(2)
            return unconditional + scale * (conditional - unconditional)

        with torch.no_grad(), self.adapter.disabled():
            wanted = guided()
        return _weighted(guided() - wanted, per_sample) / scale**2


def _weighted(error: torch.Tensor, per_sample: torch.Tensor) -> torch.Tensor:
    return (error.square().flatten(1).mean(1) * per_sample).mean()


def relative_error(answer: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Each sample's squared error over the square of `wanted`, averaged over the batch, in float32.

    Sample by sample, so that a batch split over processes gives the loss and the gradient of the whole.
    """
    wanted = wanted.detach().float()
    error, power = (x.square().flatten(1).mean(1) for x in (answer.float() - wanted, wanted))
    return (error / power.clamp(min=1e-12)).mean()


@dataclass(frozen=True)
class Gap:
    """Denoising losses on held-out batches.

    Attributes:
        teacher, student: mean squared error to the true target.
        distance: mean squared error between the two.
    """

    teacher: float
    student: float
    distance: float

    def closed(self, raw: Gap) -> float:
        """The share of the raw swap's loss gap that is gone, 1 when the student is as good as the teacher."""
        return (raw.student - self.student) / (raw.student - raw.teacher)


@torch.no_grad()
def measure_gap(
    objective: Objective, batches: list[NoisyBatch], reduce: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> Gap:
    """Compare teacher and student on `batches`; `reduce` sums over processes."""
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        wanted, answer = objective.teacher(batch), objective.student(batch)
        channels = batch.target.shape[1]
        errors = [wanted[:, :channels] - batch.target, answer[:, :channels] - batch.target, answer - wanted]
        sums[:3] += torch.stack([error.double().square().mean().cpu() for error in errors]) * len(batch)
        sums[3] += len(batch)
    total = reduce(sums)
    teacher, student, distance = (total[:3] / total[3]).tolist()
    return Gap(teacher, student, distance)
