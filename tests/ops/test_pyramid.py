"""The pyramid against its float64 reference, its limits, and what it must never read."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flatten_diffusion.ops.pyramid import Cells, keys_per_query, pyramid_attention, pyramid_attention_reference
from flatten_diffusion.ops.pyramid import operator as operator_module
from flatten_diffusion.ops.pyramid.layout import cell_sides

CASES = {
    "odd": (((1, 11, 9),), Cells(window=4, budget=16, opened=())),
    "fixed-far": (((1, 16, 12),), Cells(window=4, far=4, budget=0, opened=())),
    "frames-and-images": (((2, 7, 10), (1, 5, 3)), Cells(window=4, budget=20, opened=())),
    "far-beyond-window": (((1, 20, 17),), Cells(window=2, budget=16, opened=())),
    "far-twice-halved": (((1, 19, 14),), Cells(window=2, far=8, budget=0, opened=())),
    "window-6": (((1, 13, 17),), Cells(window=6, ring=3, budget=12, opened=())),
    "narrow": (((1, 3, 29),), Cells(window=4, budget=6, opened=())),
    "opened": (((2, 7, 10), (1, 5, 3)), Cells(window=4, budget=20, opened=(3,))),
    "opened-twice": (((1, 13, 22),), Cells(window=4, far=4, opened=(4, 5))),
    "opened-beyond-window": (((1, 17, 10), (1, 3, 2)), Cells(window=2, far=8, budget=0, opened=(2, 3, 4))),
    "ring-opened": (((1, 13, 14),), Cells(window=4, ring=4, far=4, budget=0, opened=(5, 7))),
    "ring-between-sides": (((1, 26, 15),), Cells(window=12, ring=3, far=4, budget=0, opened=(2, 3))),
    "all-opened": (((1, 9, 16),), Cells(window=4, far=4, budget=0, opened=(99,))),
}
EXACT = {
    "one-window": (((1, 7, 5),), Cells(window=8, ring=4, opened=())),
    "within-budget": (((2, 9, 6), (1, 4, 4)), Cells(window=4, budget=124, opened=())),
    "cells-of-1": (((1, 14, 11),), Cells(window=4, ring=1, far=1, budget=0, opened=())),
    "all-opened": (((1, 12, 10), (1, 6, 9)), Cells(window=4, ring=1, far=4, budget=0, opened=(99, 99))),
}


def cases(table):
    return pytest.mark.parametrize(("images", "cells"), table.values(), ids=table.keys())


def tensors(images, dtype=torch.float64, batch=2, heads=2, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(math.prod(image) for image in images)
    x = 1.5 * torch.randn(batch, tokens, 3, heads, head_dim, generator=generator, dtype=torch.float64)
    return x.to(dtype).unbind(2), torch.rand(batch, tokens, generator=generator) > 0.4


def poisoned(x, mask):
    return x.masked_fill(~mask[..., None, None], math.nan)


# --- against the reference -----------------------------------------------------------------


@cases(CASES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_agrees_with_the_reference(images, cells, masked):
    (query, key, value), mask = tensors(images)
    if masked:
        key, value = poisoned(key, mask), poisoned(value, mask)
    mask = mask if masked else None
    output, mass = pyramid_attention(query, key, value, images, cells, key_mask=mask, scale=0.3)
    wanted, wanted_mass = pyramid_attention_reference(query, key, value, images, cells, key_mask=mask, scale=0.3)
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mass, wanted_mass, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_lower_precision(dtype, tolerance):
    images, cells = CASES["opened-twice"]
    (query, key, value), mask = tensors(images, dtype)
    output, mass = pyramid_attention(query, key, value, images, cells, key_mask=mask)
    wanted, wanted_mass = pyramid_attention_reference(query, key, value, images, cells, key_mask=mask)
    assert output.dtype == dtype and mass.dtype == torch.float32
    assert (output.double() - wanted).norm() < tolerance * wanted.norm()  # no more than rounding the output
    torch.testing.assert_close(mass.double(), wanted_mass, rtol=0, atol=1e-5)


def test_small_blocks_and_large_ones_give_the_same(monkeypatch):
    images, cells = CASES["opened"]
    (query, key, value), _ = tensors(images, heads=3)
    results = []
    for elements in (1, 4000, 1 << 30):
        monkeypatch.setattr(operator_module, "block_elements", lambda x, elements=elements: elements)
        results.append(pyramid_attention(query, key, value, images, cells))
    for output, mass in results[1:]:
        torch.testing.assert_close(output, results[0][0])
        torch.testing.assert_close(mass, results[0][1])


def test_without_the_fused_kernel(monkeypatch):
    """What devices without one run, and a float64 tensor on CUDA."""
    images, cells = CASES["odd"]
    (query, key, value), mask = tensors(images)
    fused = pyramid_attention(query, key, value, images, cells, key_mask=mask)
    monkeypatch.setattr(operator_module, "_attend", operator_module.attend_plainly)
    for got, wanted in zip(pyramid_attention(query, key, value, images, cells, key_mask=mask), fused, strict=True):
        torch.testing.assert_close(got, wanted)


# --- limits -----------------------------------------------------------------


@cases(EXACT)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_becomes_the_softmax(images, cells, masked):
    (query, key, value), mask = tensors(images)
    given = mask if masked else torch.ones_like(mask)
    output, mass = pyramid_attention(
        query, poisoned(key, given), poisoned(value, given), images, cells, key_mask=mask if masked else None
    )
    scores = torch.einsum("bnhd,bmhd->bnhm", query, key) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~given[:, None, None], -math.inf)
    torch.testing.assert_close(output, torch.einsum("bnhm,bmhd->bnhd", scores.softmax(dim=-1), value))
    torch.testing.assert_close(mass, scores.logsumexp(dim=-1))


@cases(CASES)
def test_every_key_counts_once(images, cells):
    """Where all keys are alike, the weights are the counts: the output is the mean of the values."""
    (query, key, value), mask = tensors(images)
    output, mass = pyramid_attention(query, key * 0, value, images, cells, key_mask=mask)
    mean = (value * mask[..., None, None]).sum(dim=1) / mask.sum(dim=1)[:, None, None]
    torch.testing.assert_close(output, mean[:, None].expand_as(output))
    torch.testing.assert_close(mass, mask.sum(dim=1).double().log()[:, None, None].expand_as(mass))


def test_a_sample_without_keys_gives_zeros():
    images, cells = CASES["opened"]
    (query, key, value), mask = tensors(images)
    mask[1] = False
    query.requires_grad_()
    output, mass = pyramid_attention(query, poisoned(key, mask), poisoned(value, mask), images, cells, key_mask=mask)
    assert not output[1].any() and (mass[1] < -1e4).all() and mass[0].abs().max() < 100
    output.sum().backward()
    assert query.grad.isfinite().all()


def test_opens_the_cell_that_holds_what_is_looked_for():
    """One far key that all queries match is lost in the mean of its cell, and found once that is opened."""
    images, cells = ((1, 24, 24),), Cells(window=4, far=4, budget=0, opened=())
    (query, key, value), _ = tensors(images)
    key, query, value = key * 0.1, query * 0.1, value * 0.1
    query[..., 0], key[:, 130, :, 0], value[:, 130] = 5.0, 6.0, 1.0
    softmax = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    def error(opened):
        output, _ = pyramid_attention(query, key, value, images, replace(cells, opened=opened))
        return (output - softmax)[:, 16 * 24 :].norm()  # of windows to which it is far

    assert error((1, 1)) < 0.05 * error(())


# --- cost -----------------------------------------------------------------


@pytest.mark.parametrize(("side", "keys"), [(8, 64), (32, 364), (64, 391), (128, 403), (256, 415)])
def test_keys_per_query_stay_bounded(side, keys):
    assert keys_per_query([(1, side, side)], Cells()) <= keys


def test_without_a_budget_every_key_is_seen():
    assert keys_per_query([(1, 16, 12)], Cells(budget=0, opened=())) == 16 * 12


def test_the_budget_is_for_all_frames_and_images():
    cells = Cells(budget=256)
    assert cell_sides([(1, 64, 64)], cells).far == (4,)
    assert cell_sides([(4, 64, 64)], cells).far == (8,)
    assert cell_sides([(1, 64, 64), (1, 9, 9)], cells).far == (8,)
    assert cell_sides([(300, 4, 4)], cells).far == (4,)  # a cell per frame is the least there is
    assert cell_sides([(1, 64, 64)], Cells(far=2, budget=0)).far == (2,)


# --- gradients -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd", "frames-and-images", "opened-twice"])
def test_gradients(name):
    images, cells = CASES[name]
    if name == "opened-twice":
        images = ((1, 12, 9),)
        cells = Cells(window=2, ring=2, far=4, budget=0, opened=(2, 3))
    inputs, mask = tensors(images, batch=1, heads=2, head_dim=2)
    inputs = [x.clone().requires_grad_() for x in inputs]

    def run(query, key, value):
        return pyramid_attention(query, key, value, images, cells, key_mask=mask)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_masked_keys_get_no_gradient():
    images, cells = CASES["frames-and-images"]
    inputs, mask = tensors(images, torch.float32)
    query, key, value = (x.clone().requires_grad_() for x in inputs)
    output, mass = pyramid_attention(query, poisoned(key, mask), poisoned(value, mask), images, cells, key_mask=mask)
    (output.square().sum() + mass.sum()).backward()
    assert query.grad.isfinite().all()
    for grad in (key.grad, value.grad):
        assert not grad[~mask].any() and grad[mask].any(dim=-1).all()


def test_the_operator_is_a_good_citizen():
    inputs, _ = tensors(((1, 6, 5),), torch.float32, batch=1)
    query = inputs[0].clone().requires_grad_()
    keys, values = (x.transpose(1, 2).contiguous().requires_grad_() for x in inputs[1:])
    pad = [F.pad(x.detach(), (0, 0, 0, 1)).requires_grad_() for x in (keys, values)]
    bias = F.pad(torch.zeros(1, 30), (0, 1), value=-1e30)
    torch.library.opcheck(
        operator_module.pyramid, (query, *pad, bias, torch.zeros(1, 2, 0), [1, 6, 5], [4, 1, 1, 0], 0.3)
    )


# --- how it is called -----------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_compiles_whole(train):
    images, cells = CASES["opened"]
    inputs, mask = tensors(images, torch.float32)
    inputs = [x.clone().requires_grad_(train) for x in inputs]

    def run(query, key, value):
        return pyramid_attention(query, key, value, images, cells, key_mask=mask)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    wanted, got = run(*inputs), compiled(*inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    if train:
        grads = [torch.autograd.grad(x[0].square().sum() + x[1].sum(), inputs) for x in (got, wanted)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast():
    images, cells = CASES["odd"]
    (query, key, value), _ = tensors(images, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, mass = pyramid_attention(query, key, value, images, cells)
    wanted = pyramid_attention(*(x.bfloat16() for x in (query, key, value)), images, cells)
    assert output.dtype == torch.bfloat16 and torch.equal(output, wanted[0]) and torch.equal(mass, wanted[1])


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"window": 0}, "window"), ({"ring": 3}, "ring"), ({"far": 12}, "far"), ({"opened": 3}, "opened"),
     ({"budget": -1}, "budget"), ({"opened": (2, 1.5)}, "opened"), ({"window": True}, "window")],
)  # fmt: skip
def test_refuses_cells_that_do_not_fit(settings, named):
    with pytest.raises(ValueError, match=f"^{named} is"):
        Cells(**settings)


@pytest.mark.parametrize("images", [(), ((1, 4, 5),), ((1, 0, 4),), ((1, 4, 4), (1, 1, 1))])
def test_refuses_images_that_do_not_hold_the_tokens(images):
    query = torch.zeros(1, 16, 1, 8)
    with pytest.raises(ValueError, match="make them equal"):
        pyramid_attention(query, query, query, images)


def test_refuses_a_mask_of_another_length():
    query = torch.zeros(1, 16, 1, 8)
    with pytest.raises(ValueError, match="key_mask"):
        pyramid_attention(query, query, query, ((1, 4, 4),), key_mask=torch.ones(1, 15, dtype=torch.bool))
