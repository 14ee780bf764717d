from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from flatten_diffusion import linearize
from flatten_diffusion.adapter import Adapter
from flatten_diffusion.distill import Diffusion, Gap, LossWeights, NoisyBatch, Objective, measure_gap
from flatten_diffusion.distill.capture import FeatureTap

from ..models.tiny import build, stir


def case(name: str = "sd15") -> tuple[nn.Module, Adapter, Diffusion, NoisyBatch]:
    """A stirred adapter and a batch of the tiny model's own inputs."""
    tiny = build(name)
    tiny.model.requires_grad_(False)
    adapter = linearize(tiny.model)
    adapter.add_deltas(("q", "out"), 2)
    stir(adapter)
    generator = torch.Generator().manual_seed(0)
    noisy = tiny.inputs[tiny.picture]
    names = ("encoder_hidden_states", "class_labels", "encoder_attention_mask")
    captioned = {key: tiny.inputs[key] for key in names if key in tiny.inputs}
    null = {
        key: torch.zeros_like(tensor) if tensor.is_floating_point() else torch.full_like(tensor, 10)
        for key, tensor in captioned.items()
    }
    batch = NoisyBatch(
        noisy, torch.tensor([7, 600]), torch.randn(noisy.shape, generator=generator), captioned, captioned, null
    )
    return tiny.model, adapter, Diffusion(diffusers.DDPMScheduler()), batch


def call(model: Any, batch: NoisyBatch, conditioning: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    sample: torch.Tensor = model(batch.noisy, batch.timesteps, **(conditioning or batch.conditioning)).sample
    return sample


def test_parts_are_what_they_say() -> None:
    model, adapter, diffusion, batch = case()
    weights = LossWeights(teacher=1.0, target=0.25, features=0.5, guided=2.0, guidance_scale=4.0, min_snr_gamma=5.0)
    loss, parts = Objective(adapter, model, diffusion, weights).loss(batch)

    with torch.no_grad():
        with FeatureTap(adapter) as student_features:
            student = call(model, batch)
        unconditional, conditional = call(model, batch, batch.null), call(model, batch, batch.captioned)
        with adapter.disabled():
            with FeatureTap(adapter) as teacher_features:
                teacher = call(model, batch)
            teacher_pair = call(model, batch, batch.null), call(model, batch, batch.captioned)
    snr = diffusers.training_utils.compute_snr(diffusers.DDPMScheduler(), batch.timesteps)
    per_sample = snr.clamp(max=5.0) / snr

    def weighted(error: torch.Tensor) -> float:
        return float((error.square().mean((1, 2, 3)) * per_sample).mean())

    guided = unconditional + 4 * (conditional - unconditional)
    wanted = teacher_pair[0] + 4 * (teacher_pair[1] - teacher_pair[0])
    features = [
        sum(
            float((answer - wanted).square().sum() / wanted.square().sum())
            for answer, wanted in zip(student_features.outputs[name], output, strict=True)
        )
        / len(output)
        for name, output in teacher_features.outputs.items()
    ]
    expected = {
        "teacher": weighted(student - teacher),
        "target": weighted(student - batch.target),
        "features": sum(features) / len(features),
        "guided": weighted(guided - wanted) / 16,
    }
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected, rel=1e-4)
    total = expected["teacher"] + 0.25 * expected["target"] + 0.5 * expected["features"] + 2 * expected["guided"]
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_a_learned_variance_has_a_teacher_but_no_target() -> None:
    model, adapter, diffusion, batch = case("dit")
    objective = Objective(adapter, model, diffusion, LossWeights(teacher=1.0, target=1.0, features=0.0))
    teacher, student = objective.teacher(batch), objective.student(batch)
    assert student.shape[1] == 2 * batch.target.shape[1]
    _, parts = objective.loss(batch)
    assert parts["teacher"].item() == pytest.approx(float((student - teacher).square().mean()), rel=1e-4)
    assert parts["target"].item() == pytest.approx(float((student[:, :4] - batch.target).square().mean()), rel=1e-4)


def test_the_teacher_is_the_original() -> None:
    tiny = build("sd15")
    _, adapter, diffusion, batch = case()
    original = call(tiny.model, batch)
    objective = Objective(adapter, adapter.model, diffusion, LossWeights())
    assert torch.equal(objective.teacher(batch), original)
    assert not torch.equal(objective.student(batch), original)


def test_unused_parts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter, diffusion, batch = case()
    objective = Objective(adapter, model, diffusion, LossWeights(teacher=0.0, target=1.0, features=0.0))
    monkeypatch.setattr(objective, "teacher", lambda batch: pytest.fail("the teacher ran"))
    assert set(objective.loss(batch)[1]) == {"target"}


@pytest.mark.parametrize("features", [0.0, 0.5])
def test_gradients_under_checkpointing_are_the_same(features: float) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, adapter, diffusion, batch = case()
        if checkpointing:
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        Objective(adapter, model, diffusion, LossWeights(features=features)).loss(batch)[0].backward()
        gradients.append({name: parameter.grad for name, parameter in adapter.named_parameters()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None and other is not None and gradient.abs().sum() > 0, name
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-7), name


def test_gap() -> None:
    model, adapter, diffusion, batch = case()
    objective = Objective(adapter, model, diffusion, LossWeights())
    gap = measure_gap(objective, [batch, batch])
    with torch.no_grad():
        teacher, student = objective.teacher(batch), objective.student(batch)
    assert gap.teacher == pytest.approx(float((teacher - batch.target).square().mean()), rel=1e-6)
    assert gap.student == pytest.approx(float((student - batch.target).square().mean()), rel=1e-6)
    assert gap.distance == pytest.approx(float((student - teacher).square().mean()), rel=1e-6)
    assert Gap(1.0, 1.5, 0.1).closed(Gap(1.0, 3.0, 0.5)) == pytest.approx(0.75)
    assert Gap(1.0, 0.9, 0.1).closed(Gap(1.0, 3.0, 0.5)) == pytest.approx(1.05)
