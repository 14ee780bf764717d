"""What `focused_linear_attention` and the joins of windows promise of numbers, at random shapes, strides and sizes."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatten_diffusion.ops.windows import join_far, join_windows

from .focused_cases import attend

FAST = settings(max_examples=20, deadline=None, derandomize=True, database=None)
LARGEST = 1e8
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
SIZES = st.one_of(st.sampled_from([0.0, LARGEST]), st.floats(-12, 8).map(lambda exponent: 10**exponent), st.just(1.0))


def draw_tokens(data, shape, dtype):
    """[B, N, H, D] of a drawn size, and laid out as one of several views."""
    largest = min(data.draw(SIZES), torch.finfo(dtype).max)
    batch, tokens, heads, head_dim = shape
    x = torch.randn(batch, heads, tokens, head_dim).clamp(-3, 3) / 3 * largest
    x = x.to(dtype)
    layout = data.draw(st.sampled_from(["heads first", "dense", "every second"]))
    if layout == "every second":
        return x.repeat_interleave(2, dim=2)[:, :, ::2].transpose(1, 2)
    return x.transpose(1, 2) if layout == "heads first" else x.transpose(1, 2).contiguous()


def assert_finite_where_exact_is(function, tensors, exact_function):
    """Output and gradients, of one random direction; nothing is asked where float64's do not fit the dtype."""
    results = []
    for convert, run in ((lambda t: t.double(), exact_function), (lambda t: t, function)):
        leaves = [convert(tensor).detach().requires_grad_() for tensor in tensors]
        output = run(*leaves)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        results.append([output, *torch.autograd.grad(output, leaves, weight)])
    for index, (exact, actual) in enumerate(zip(*results, strict=True)):
        if exact.abs().max() < torch.finfo(actual.dtype).max / 2:
            assert actual.isfinite().all(), index


@FAST
@given(data=st.data())
def test_focused_linear_attention(data):
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dtype = data.draw(DTYPES)
    grid = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    batch, heads, head_dim = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    shape = (batch, math.prod(grid), heads, head_dim)
    names = ["query", "key", "value"]
    tensors = [draw_tokens(data, shape, dtype) for _ in names]
    if data.draw(st.booleans()):
        names.append("scale")
        tensors.append(10 ** (torch.rand(heads * head_dim) * 4 - 2))
    if data.draw(st.booleans()):
        names += ["conv_weight", "conv_bias"]
        tensors += [torch.randn(heads * head_dim, 1, 3, 3) / 9, torch.randn(heads * head_dim)]
    if data.draw(st.booleans()):
        names += ["query_map_weight", "query_map_bias", "key_map_weight", "key_map_bias"]
        tensors += [torch.randn(heads, head_dim, head_dim) / 4, torch.randn(heads, head_dim)] * 2
    options = {
        "grid": grid if "conv_weight" in names else None,
        "key_mask": torch.rand(shape[:2]) > 0.5 if data.draw(st.booleans()) else None,
        "focusing_factor": data.draw(st.sampled_from([0.5, 1.0, 2.0, 3.0, 3.5, 8.0])),
    }

    def run(backend):
        return lambda *x: attend(**dict(zip(names, x, strict=True)), **options, backend=backend)

    for backend in ("reference", "eager"):
        assert_finite_where_exact_is(run(backend), tensors, run("reference"))


@FAST
@given(data=st.data())
def test_windows(data):
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dtype = data.draw(DTYPES)
    pictures = [tuple(data.draw(st.integers(1, 7)) for _ in range(2)) for _ in range(data.draw(st.integers(1, 2)))]
    pictures = [(1, *picture) for picture in pictures]
    tokens, size = sum(math.prod(picture) for picture in pictures), data.draw(st.integers(1, 4))
    shape = (data.draw(st.integers(1, 2)), tokens, data.draw(st.integers(1, 2)), data.draw(st.integers(1, 20)))
    tensors = [draw_tokens(data, shape, dtype) for _ in range(4)]
    mask = torch.rand(shape[:2]) > 0.5 if data.draw(st.booleans()) else None
    far = torch.randn(shape[:3]) * 10 ** data.draw(st.floats(-2, 3))
    gain, bias = torch.randn(shape[2], 2) / 3, torch.randn(shape[2])
    scale = shape[3] ** -0.5

    def joined(*tensors):
        return join_far(*tensors, pictures, size, mask, scale)[0]

    assert_finite_where_exact_is(joined, [*tensors, far], joined)
    output, log_mass = join_windows(*tensors, pictures, size, mask, scale, gain, bias)
    assert output.isfinite().all() and log_mass.isfinite().all()


def test_weights_of_windows_sum_to_one_in_the_gradient_of_large_scores():
    """Equal ones of about 1e7: beside them, float32 does not hold the logarithm of how many they are."""
    tokens = torch.randn(5, 1, 48, 2, 16, generator=torch.Generator().manual_seed(0))
    query, key, value, mixed = (tokens[:4] * 3e3).unbind()
    leaves = [x.detach().requires_grad_() for x in (mixed, query, key[:, :1].expand_as(key), value, tokens[4, ..., 0])]
    output, _ = join_far(*leaves, [(1, 6, 8)], 4, None, 0.25)
    grad_mixed, _, _, grad_value, _ = torch.autograd.grad(output, leaves, torch.ones_like(output))
    total = (grad_mixed + grad_value).double().sum()
    assert abs(total / output.numel() - 1) < 1e-6
