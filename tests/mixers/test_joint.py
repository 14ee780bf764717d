"""The joint formulas against loops that spell them out, and against each other on structured data."""

from __future__ import annotations

import math

import pytest
import torch

from flatten_diffusion.mixers import MixerSpec, create_mixer, list_joints
from flatten_diffusion.mixers.joint import create_joint, estimate_log_mass


def _tensors(batch=2, picture=12, text=5, heads=2, dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = {"query": picture, "picture_key": picture, "key": text, "value": text, "image": picture}
    return {
        name: torch.randn(batch, n, heads, dim, generator=generator, dtype=dtype) * 1.5 for name, n in sizes.items()
    }


def _naive(form, x, picture_mask, mask, scale, bias, gain):
    """One query at a time, as the docstrings have it."""
    batch, picture, heads, dim = x["query"].shape
    out = torch.zeros_like(x["image"])
    for b in range(batch):
        ours = [m for m in range(picture) if picture_mask is None or picture_mask[b, m]]
        others = [m for m in range(x["key"].shape[1]) if mask is None or mask[b, m]]
        for h in range(heads):
            keys = torch.stack([x["picture_key"][b, m, h] for m in ours])
            mean = keys.mean(0)
            covariance = (keys - mean).T @ (keys - mean) / len(ours)
            for i in range(picture):
                q = x["query"][b, i, h]
                weights = [math.exp(scale * float(q @ x["key"][b, m, h])) for m in others]
                z_text = sum(weights)
                text = sum((w * x["value"][b, m, h] for w, m in zip(weights, others, strict=True)), torch.zeros(dim))
                if form == "shared_normalizer":
                    a, v = scale * float(q @ mean), scale**2 * float(q @ covariance @ q)
                    log_n = math.log(len(ours))
                    spread = v / 2 if v < 2 * log_n else math.sqrt(2 * v * log_n) - log_n
                    log_z = bias[h] + log_n + (1 + gain[h][0]) * a + (1 + gain[h][1]) * spread
                    z_picture = math.exp(log_z)
                    share = z_picture / (z_picture + z_text)
                elif others:
                    odds = len(ours) / len(others) * math.exp(bias[h])
                    share = odds / (1 + odds)
                else:
                    share = 1.0
                softmax = text / z_text if others else text
                out[b, i, h] = share * x["image"][b, i, h] + (1 - share) * softmax
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.9])
@pytest.mark.parametrize("form", list_joints())
def test_against_the_formula_spelled_out(form, scale, masked):
    x = _tensors()
    picture_mask, mask = None, None
    if masked:
        picture_mask = torch.ones(2, 12, dtype=torch.bool)
        picture_mask[1, 9:] = False
        mask = torch.tensor([[True, True, False, True, True], [False] * 5])
        for name, keep in (("picture_key", picture_mask), ("key", mask)):
            x[name] = x[name].masked_fill(~keep[:, :, None, None], 7.0)  # whatever stands there
    joint = create_joint(form, 2).double()
    bias, gain = [0.3, -0.7], [[-0.4, 0.2], [0.1, -0.5]]
    with torch.no_grad():
        joint.bias.copy_(torch.tensor(bias, dtype=torch.float64))
        if form == "shared_normalizer":
            joint.gain.copy_(torch.tensor(gain, dtype=torch.float64))
        ours = joint(x["image"], x["query"], x["picture_key"], x["key"], x["value"], picture_mask, mask, scale)
        expected = _naive(form, x, picture_mask, mask, scale or 6**-0.5, bias, gain)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", list_joints())
def test_a_sample_without_any_other_key_is_all_picture_and_has_gradients(form):
    x = {name: tensor.requires_grad_() for name, tensor in _tensors(dtype=torch.float32).items()}
    joint = create_joint(form, 2)
    mask = torch.tensor([[False] * 5, [True] * 5])
    out = joint(x["image"], x["query"], x["picture_key"], x["key"], x["value"], None, mask, None)
    torch.testing.assert_close(out[0], x["image"][0])
    out.square().sum().backward()
    for name, tensor in {**x, **dict(joint.named_parameters())}.items():
        assert tensor.grad is not None or name == "picture_key" and form == "gated_branches"
        assert tensor.grad is None or tensor.grad.isfinite().all(), name
    assert all(parameter.grad.abs().sum() > 0 for parameter in joint.parameters())


@pytest.mark.parametrize("dim", [6, 7, 8, 10, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", list_joints())
def test_half_precision_stays_close(form, dtype, dim):
    x = _tensors(dim=dim)
    joint = create_joint(form, 2)
    half = {name: tensor.to(dtype) for name, tensor in x.items()}
    exact = {name: tensor.double() for name, tensor in half.items()}
    names = ("image", "query", "picture_key", "key", "value")
    with torch.no_grad():
        ours = joint.to(dtype)(*(half[name] for name in names), None, None, None)
        expected = joint.double()(*(exact[name] for name in names), None, None, None)
    assert ours.dtype == dtype
    assert (ours.double() - expected).norm() / expected.norm() < (0.01 if dtype == torch.bfloat16 else 0.002)


def test_the_estimate_is_exact_for_normal_scores():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 64, 1, 16, generator=generator, dtype=torch.float64)
    key = torch.randn(1, 4096, 1, 16, generator=generator, dtype=torch.float64) + 0.5
    scores = torch.einsum("bnhd,bmhd->bnhm", query, key) * 0.3
    error = sum(estimate_log_mass(query, key, None, 0.3)) - scores.logsumexp(-1)
    assert error.abs().max() < 0.1


def _field(tokens, dim, seed, smooth=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, dim, *tokens, generator=generator)
    for _ in range(smooth):
        x = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    return (x / x.std()).flatten(2).transpose(1, 2).unsqueeze(2)


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("kind", ["plain", "key means", "text sink"])
def test_the_default_leaves_less_than_the_other_form(kind, sharpness):
    """Why "shared_normalizer" is the default: smooth pictures, related queries and keys, with what makes the share of
    the text vary: means that differ, and one text key that draws all queries."""
    dim, text = 32, 40
    query = _field((16, 20), dim, 0) * sharpness**0.5
    key = (_field((16, 20), dim, 0) * 0.5 + _field((16, 20), dim, 1)) * sharpness**0.5
    value = _field((16, 20), dim, 2)
    generator = torch.Generator().manual_seed(3)
    text_key, text_value = (torch.randn(1, text, 1, dim, generator=generator) for _ in range(2))
    if kind != "plain":
        mean = torch.randn(1, 1, 1, dim, generator=generator)
        query, text_key = query + mean, text_key - 0.3 * mean
        key = key + 0.5 * mean
    if kind == "text sink":
        text_key[:, 0] = 2 * mean[:, 0]
    scores = torch.einsum("bnhd,bmhd->bnhm", query, torch.cat([key, text_key], 1)) * dim**-0.5
    exact = torch.einsum("bnhm,bmhd->bnhd", scores.softmax(-1), torch.cat([value, text_value], 1))
    picture = torch.einsum("bnhm,bmhd->bnhd", scores[..., : key.shape[1]].softmax(-1), value)
    left = {}
    for form in list_joints():
        with torch.no_grad():
            out = create_joint(form, 1)(picture, query, key, text_key, text_value, None, None, None)
        left[form] = float((out - exact).square().sum() / exact.square().sum())
    assert left["shared_normalizer"] < left["gated_branches"], left


def _conv_only(mixer, value, grid):
    """What the convolution adds to a mixer's output."""
    query = torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        whole = mixer(query, query, value, grid)
        kept = mixer.conv_weight.clone(), mixer.conv_bias.clone()
        mixer.conv_weight.zero_(), mixer.conv_bias.zero_()
        rest = mixer(query, query, value, grid)
        mixer.conv_weight.copy_(kept[0]), mixer.conv_bias.copy_(kept[1])
    return whole - rest


@pytest.mark.parametrize(
    ("grid", "pictures"),
    [
        ((3, 4, 5), [(4, 5)] * 3),
        (((1, 4, 6), (1, 3, 3)), [(4, 6), (3, 3)]),
        (((2, 4, 3), (1, 2, 5)), [(4, 3), (4, 3), (2, 5)]),
    ],
)
def test_the_convolution_never_leaves_a_frame_or_a_picture(grid, pictures):
    torch.manual_seed(0)
    mixer = create_mixer("focused_linear", MixerSpec(2, 4, kernel_size=5))
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    value = torch.randn(2, sum(h * w for h, w in pictures), 2, 4)
    ours = _conv_only(mixer, value, grid)
    parts = value.split([h * w for h, w in pictures], dim=1)
    expected = torch.cat([_conv_only(mixer, part, size) for part, size in zip(parts, pictures, strict=True)], dim=1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_masked_tokens_of_a_video_weigh_nothing():
    torch.manual_seed(0)
    mixer = create_mixer("focused_linear", MixerSpec(2, 4, kernel_size=3))
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, value = torch.randn(2, 40, 2, 4), torch.randn(2, 40, 2, 4)
    mask = torch.rand(2, 40) > 0.3
    mask[1] = False
    poisoned = value.masked_fill(~mask[:, :, None, None], float("nan"))
    with torch.no_grad():
        out = mixer(query, query, poisoned, (2, 4, 5), mask)
        assert out[0].isfinite().all() and not out[1].any()
        torch.testing.assert_close(out, mixer(query, query, value, (2, 4, 5), mask))


def test_an_unknown_form_raises():
    with pytest.raises(ValueError, match="Unknown joint 'x': choose one of shared_normalizer, gated_branches"):
        create_joint("x", 2)
