"""The join with other tokens against loops that spell it out, and against softmax on structured data."""

from __future__ import annotations

import math

import pytest
import torch

from flatten_diffusion.mixers import Context, OtherTokens, TextJoin
from flatten_diffusion.mixers.parts.text import estimate_log_partition


def _tensors(batch=2, picture=12, text=5, heads=2, dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = {"query": picture, "picture_key": picture, "key": text, "value": text, "image": picture}
    return {
        name: torch.randn(batch, n, heads, dim, generator=generator, dtype=dtype) * 1.5 for name, n in sizes.items()
    }


def _join(joint, x, image_mask=None, mask=None, scale=None, bias=None, log_partition=None):
    others = OtherTokens(x["key"], x["value"], mask, bias)
    return joint(x["image"], x["query"], x["picture_key"], Context(None, image_mask, scale), others, log_partition)


def _naive(x, image_mask, mask, scale, bias, gain):
    """One query at a time, as the docstrings have it."""
    batch, picture, heads, dim = x["query"].shape
    out = torch.zeros_like(x["image"])
    for b in range(batch):
        ours = [m for m in range(picture) if image_mask is None or image_mask[b, m]]
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
                a, v = scale * float(q @ mean), scale**2 * float(q @ covariance @ q)
                log_n = math.log(len(ours))
                spread = v / 2 if v < 2 * log_n else math.sqrt(2 * v * log_n) - log_n
                log_z = bias[h] + log_n + (1 + gain[h][0]) * a + (1 + gain[h][1]) * spread
                z_image = math.exp(log_z)
                share = z_image / (z_image + z_text)
                softmax = text / z_text if others else text
                out[b, i, h] = share * x["image"][b, i, h] + (1 - share) * softmax
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_against_the_formula_spelled_out(scale, masked):
    x = _tensors()
    image_mask, mask = None, None
    if masked:
        image_mask = torch.ones(2, 12, dtype=torch.bool)
        image_mask[1, 9:] = False
        mask = torch.tensor([[True, True, False, True, True], [False] * 5])
        for name, keep in (("picture_key", image_mask), ("key", mask)):
            x[name] = x[name].masked_fill(~keep[:, :, None, None], 7.0)  # whatever stands there
    joint = TextJoin(2).double()
    bias, gain = [0.3, -0.7], [[-0.4, 0.2], [0.1, -0.5]]
    with torch.no_grad():
        joint.bias.copy_(torch.tensor(bias, dtype=torch.float64))
        joint.gain.copy_(torch.tensor(gain, dtype=torch.float64))
        ours = _join(joint, x, image_mask, mask, scale)
        expected = _naive(x, image_mask, mask, scale or 6**-0.5, bias, gain)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_a_sample_without_any_other_key_is_all_image_and_has_gradients():
    x = {name: tensor.requires_grad_() for name, tensor in _tensors(dtype=torch.float32).items()}
    joint = TextJoin(2)
    mask = torch.tensor([[False] * 5, [True] * 5])
    out = _join(joint, x, None, mask)
    torch.testing.assert_close(out[0], x["image"][0])
    out.square().sum().backward()
    for name, tensor in {**x, **dict(joint.named_parameters())}.items():
        assert tensor.grad is not None and tensor.grad.isfinite().all(), name
    assert all(parameter.grad.abs().sum() > 0 for parameter in joint.parameters())


@pytest.mark.parametrize("dim", [6, 7, 8, 10, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, dim):
    x = _tensors(dim=dim)
    joint = TextJoin(2)
    half = {name: tensor.to(dtype) for name, tensor in x.items()}
    exact = {name: tensor.double() for name, tensor in half.items()}
    with torch.no_grad():
        ours = _join(joint.to(dtype), half)
        expected = _join(joint.double(), exact)
    assert ours.dtype == dtype
    assert (ours.double() - expected).norm() / expected.norm() < (0.01 if dtype == torch.bfloat16 else 0.002)


def test_the_estimate_is_exact_for_normal_scores():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 64, 1, 16, generator=generator, dtype=torch.float64)
    key = torch.randn(1, 4096, 1, 16, generator=generator, dtype=torch.float64) + 0.5
    scores = torch.einsum("bnhd,bmhd->bnhm", query, key) * 0.3
    error = sum(estimate_log_partition(query, key, None, 0.3)) - scores.logsumexp(-1)
    assert error.abs().max() < 0.1


def test_equal_tokens_count_as_often_as_they_stand_there():
    x = _tensors()
    joint = TextJoin(2).double()
    repeated = {
        **x,
        **{name: torch.cat([x[name], x[name][:, -1:].expand(-1, 3, -1, -1)], 1) for name in ("key", "value")},
    }
    bias = torch.zeros(2, 5, dtype=torch.float64)
    bias[:, -1] = math.log(4)
    with torch.no_grad():
        torch.testing.assert_close(_join(joint, x, bias=bias), _join(joint, repeated), rtol=1e-9, atol=1e-9)
        mask = torch.ones(2, 5, dtype=torch.bool)
        mask[:, 1] = False
        longer = torch.cat([mask, mask[:, -1:].expand(-1, 3)], 1)
        ours = _join(joint, x, mask=mask, bias=bias)
        torch.testing.assert_close(ours, _join(joint, repeated, mask=longer), rtol=1e-9, atol=1e-9)


def test_a_known_partition_is_used_as_it_is():
    x = _tensors()
    joint = TextJoin(2, estimates=False).double()
    scores = torch.einsum("bnhd,bmhd->bnhm", x["query"], torch.cat([x["picture_key"], x["key"]], 1)) * 0.4
    values = torch.cat([x["image"], x["value"]], 1)
    expected = torch.einsum("bnhm,bmhd->bnhd", scores.softmax(-1), values)
    ours, log_z = scores[..., :12], scores[..., :12].logsumexp(-1)
    picture = {**x, "image": torch.einsum("bnhm,bmhd->bnhd", ours.softmax(-1), x["image"])}
    with torch.no_grad():
        found = _join(joint, picture, scale=0.4, log_partition=log_z)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert [name for name, _ in joint.named_parameters()] == ["bias"]
