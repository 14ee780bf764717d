"""Windows against loops that spell the formula out, and against softmax where it must be softmax."""

from __future__ import annotations

import math

import pytest
import torch

from flatten_diffusion.mixers import (
    Context,
    FocusedLinearConfig,
    LayerMixer,
    LayerShape,
    WindowAttention,
    count_tokens,
    create_mixer,
    images_of,
)
from flatten_diffusion.mixers.parts.text import estimate_log_partition
from flatten_diffusion.ops.windows import from_windows, window_indices, windows_of

GRIDS = [((8, 8), 4), ((5, 7), 4), ((3, 10), 4), ((2, 5, 7), 3), (((1, 5, 7), (1, 3, 9)), 4), ((3, 4), 8)]


def _tensors(grid, batch=2, heads=2, dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = (batch, count_tokens(grid), heads, dim)
    return [torch.randn(sizes, generator=generator, dtype=dtype) * 1.3 for _ in range(4)]


def _places(grid):
    """(image, frame, row, column) of each token."""
    return [
        (index, frame, row, column)
        for index, (frames, height, width) in enumerate(images_of(grid))
        for frame in range(frames)
        for row in range(height)
        for column in range(width)
    ]


def _share_window(one, other, size):
    return one[:2] == other[:2] and one[2] // size == other[2] // size and one[3] // size == other[3] // size


def _naive(mixed, query, key, value, grid, size, mask, scale, gain, bias):
    """One query at a time, as the docstring has it."""
    places = _places(grid)
    _, average, spread = estimate_log_partition(query, key, mask, scale)
    out, log_mass = torch.zeros_like(mixed), torch.zeros(mixed.shape[:3], dtype=mixed.dtype)
    for b in range(len(query)):
        live = [m for m in range(len(places)) if mask is None or mask[b, m]]
        for i, place in enumerate(places):
            near = [m for m in live if _share_window(place, places[m], size)]
            far = max(len(live) - len(near), 1e-4)
            for h in range(query.shape[2]):
                a, s = float(average[b, i, h]), float(spread[b, i, h])
                z_far = math.exp(bias[h] + math.log(far) + (1 + gain[h][0]) * a + (1 + gain[h][1]) * s)
                weights = [math.exp(scale * float(query[b, i, h] @ key[b, m, h])) for m in near]
                total = z_far + sum(weights)
                exact = sum((w * value[b, m, h] for w, m in zip(weights, near, strict=True)), torch.zeros(()))
                out[b, i, h] = (exact + z_far * mixed[b, i, h]) / total
                log_mass[b, i, h] = math.log(total)
    return out, log_mass


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_against_the_formula_spelled_out(grid, size, masked, trained):
    """In blocks, as without gradients, and as differentiable torch."""
    query, key, value, mixed = _tensors(grid)
    mask = None
    if masked:
        mask = torch.rand(key.shape[:2], generator=torch.Generator().manual_seed(1)) > 0.3
        mask[1, : size * 2] = False  # a window with few keys left
        mask[1, -1] = True
    window = WindowAttention(2, size).double()
    gain, bias = [[-0.4, 0.2], [0.1, -0.5]], [0.3, -0.7]
    with torch.no_grad():
        window.gain.copy_(torch.tensor(gain))
        window.bias.copy_(torch.tensor(bias))
        gain, bias = window.gain.tolist(), window.bias.tolist()
        with torch.set_grad_enabled(trained):
            ours = window(mixed, query, key, value, Context(grid, mask, 0.5))
        assert ours[0].requires_grad == trained
        expected = _naive(mixed, query, key, value, grid, size, mask, 0.5, gain, bias)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_windows_hold_what_lies_side_by_side(grid, size):
    places = _places(grid)
    tokens = torch.arange(len(places))[None, :, None] + 1.0
    windows = windows_of(tokens, images_of(grid), size)
    assert torch.equal(from_windows(windows, images_of(grid), size), tokens)
    indices = window_indices(images_of(grid), size, tokens.device)
    for i, place in enumerate(places):
        for m, other in enumerate(places):
            assert (indices[i] == indices[m]) == _share_window(place, other, size)
    filled = sorted(int(token) for part in windows for token in part.flatten() if token > 0)
    assert filled == list(range(1, len(places) + 1))


def test_small_blocks_are_the_same_as_large_ones(monkeypatch):
    grid = ((2, 11, 9), (1, 6, 20))
    query, key, value, mixed = (x.float() for x in _tensors(grid))
    mask = torch.rand(key.shape[:2], generator=torch.Generator().manual_seed(1)) > 0.3
    window = WindowAttention(2, 4)
    with torch.no_grad():
        expected = window(mixed, query, key, value, Context(grid, mask, None))
        for elements in (1, 300, 1000):
            monkeypatch.setattr("flatten_diffusion.ops.focused_linear.eager.CPU_BLOCK_ELEMENTS", elements)
            for ours, whole in zip(window(mixed, query, key, value, Context(grid, mask, None)), expected, strict=True):
                torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_moments_in_blocks_are_those_of_plain_torch(masked, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, n, 3, 7, generator=generator, dtype=torch.float64) * 2 + 1 for n in (37, 53))
    mask = torch.rand(2, 53, generator=generator) > 0.4 if masked else None
    poisoned = key if mask is None else key.masked_fill(~mask[:, :, None, None], float("nan"))
    monkeypatch.setattr("flatten_diffusion.ops.focused_linear.eager.CPU_BLOCK_ELEMENTS", 200)
    expected = estimate_log_partition(query, key, mask, 0.4)  # with gradients enabled: plain torch
    with torch.no_grad():
        ours = estimate_log_partition(query, poisoned, mask, 0.4)
    for part, whole in zip(ours, expected, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-9)


def test_one_window_over_the_whole_image_is_softmax():
    grid = (5, 6)
    query, key, value, mixed = (x.float() for x in _tensors(grid))
    with torch.no_grad():
        ours, log_mass = WindowAttention(2, 8)(mixed, query, key, value, Context(grid))
        scores = torch.einsum("bnhd,bmhd->bnhm", query, key) * 6**-0.5
        softmax = torch.einsum("bnhm,bmhd->bnhd", scores.softmax(-1), value)
    torch.testing.assert_close(ours, softmax, rtol=0, atol=2e-3)
    torch.testing.assert_close(log_mass, scores.logsumexp(-1), rtol=0, atol=2e-3)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_tells_small_shares(dtype, trained):
    grid = (6, 9)
    half = [x.to(dtype) for x in _tensors(grid, dim=10)]
    half[0][:, :9] *= 4  # sharp queries: next to nothing is left for what lies beyond
    exact = [x.double() for x in half]
    window = WindowAttention(2, 4)
    with torch.no_grad():
        window.bias.fill_(-6.0)
        with torch.set_grad_enabled(trained):
            ours, mass = window.to(dtype)(half[3], *half[:3], Context(grid))
        expected, exact_mass = window.double()(exact[3], *exact[:3], Context(grid))
    assert ours.dtype == dtype and mass.dtype == torch.float32
    assert (ours.double() - expected).norm() / expected.norm() < (0.01 if dtype == torch.bfloat16 else 0.002)
    torch.testing.assert_close(mass.double(), exact_mass, rtol=0, atol=0.06 if dtype == torch.bfloat16 else 0.01)


def test_masked_keys_are_never_read_and_every_gradient_is_finite():
    grid = (5, 6)
    query, key, value, mixed = (x.float() for x in _tensors(grid))
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[1] = False
    keep = mask[:, :, None, None]
    window = WindowAttention(2, 4)
    clean, _ = window(mixed, query, key, value, Context(grid, mask, None))
    poisoned = [x.masked_fill(~keep, float("nan")).requires_grad_() for x in (key, value)]
    out, _ = window(mixed.requires_grad_(), query.requires_grad_(), *poisoned, Context(grid, mask, None))
    torch.testing.assert_close(out, clean)
    torch.testing.assert_close(out[1], mixed[1])  # without any key there is only the mixer's output
    out.square().sum().backward()
    for tensor in (query, mixed, *poisoned, *window.parameters()):
        assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0
    assert not any(x.grad[1].any() for x in poisoned)


@pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
def test_gradients_are_those_of_the_formula(grid):
    query, key, value, mixed = (x.requires_grad_() for x in _tensors(grid, batch=1, heads=1, dim=3))
    window = WindowAttention(1, 4).double()

    def run(*tensors):
        return window(tensors[3], *tensors[:3], Context(grid))

    assert torch.autograd.gradcheck(run, (query, key, value, mixed), nondet_tol=1e-9, fast_mode=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_the_written_out_gradient_is_that_of_plain_torch(grid, size, masked, monkeypatch):
    monkeypatch.setattr("flatten_diffusion.ops.focused_linear.eager.CPU_BLOCK_ELEMENTS", 500)
    tensors = [x.requires_grad_() for x in _tensors(grid)]
    query, key, value, mixed = tensors
    mask = torch.rand(key.shape[:2], generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    window = WindowAttention(2, size).double()
    leaves = [*tensors, *window.parameters()]
    out, log_mass = window(mixed, query, key, value, Context(grid, mask, 0.4))
    rest, share, expected_mass = window.parts(query, key, value, Context(grid, mask, 0.4))
    expected = rest + share * mixed
    torch.testing.assert_close(out, expected)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, log_mass)]
    ours = torch.autograd.grad([out, log_mass], leaves, directions)
    theirs = torch.autograd.grad([expected, expected_mass], leaves, directions)
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-9)


def test_a_layer_attends_through_its_windows():
    torch.manual_seed(0)
    shape = LayerShape(2, 6, 12)
    layer = LayerMixer(create_mixer(FocusedLinearConfig(kernel_size=0), shape), shape, window=4)
    assert layer.needs == {"grid"}
    query, key, value, _ = (x.float() for x in _tensors((5, 7)))
    with torch.no_grad():
        out = layer(query, key, value, Context((5, 7)))
        linear = layer.mixer(query, key, value, Context((5, 7))).output
        expected, _ = layer.window(linear, query, key, value, Context((5, 7)))
    assert torch.equal(out, expected) and not torch.allclose(out, linear)
    with pytest.raises(ValueError, match="Windows need the grid"):
        layer(query, key, value, Context())


def test_autocast_casts_before_the_score_is_split():
    grid = (6, 9)
    query, key, value, mixed = (x.float() for x in _tensors(grid, dim=10))
    window = WindowAttention(2, 4)
    with torch.no_grad():
        window.bias.fill_(4.0)
        expected, mass = window(mixed, query, key, value, Context(grid, None, None))
    for trained in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trained):
            out, log_mass = window(mixed.bfloat16(), query, key, value.bfloat16(), Context(grid))
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).norm() / expected.norm() < 0.01
        torch.testing.assert_close(log_mass.float(), mass, rtol=0, atol=0.06)
