"""The Triton kernels, number by number, under triton's interpreter. `test_triton_interpreter.py` runs this file."""

from __future__ import annotations

import math
import os

import pytest
import torch

from flatten_diffusion.ops import available_backends, focused_linear_attention, resolve_backend
from flatten_diffusion.ops.focused_linear import triton as launcher
from flatten_diffusion.ops.focused_linear.operator import focused_linear

from .focused_cases import (
    MAPS,
    attend,
    loop_focused_attention,
    make_inputs,
    relative_error,
    run_plain_with_gradients,
    run_with_gradients,
    shape_id,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_interpreter.py, which sets the environment"

FLOAT32_ERROR = 2e-6


@pytest.fixture(params=[0, 64], ids=["few-programs", "many-programs"])
def processors(request, monkeypatch):
    """None: one chunk, and programs that take every head. Many: chunks to add up, one head per program."""
    monkeypatch.setattr(launcher, "_processors", lambda device: request.param)


def exact(inputs):
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    return run_with_gradients(wide, backend="reference")


def mask_for(shape, keep=0.7, seed=5):
    return torch.rand(shape[0], math.prod(shape[1]), generator=torch.Generator().manual_seed(seed)) < keep


SHAPES = [(1, (9, 11), 3, 40), (2, (5, 3), 2, 32), (1, (7, 9), 1, 60), (1, (3, 13), 1, 160), (1, (9, 7), 2, 72)]


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_float32(shape, maps, processors):
    """Maps inside the kernels at head_dim 32, 40 and 60, before them at 72 and 160."""
    inputs = make_inputs(shape, dtype=torch.float32, kernel=3, maps=maps)
    if shape[3] in (40, 160):
        inputs["key_mask"] = mask_for(shape)
    output, gradients = run_with_gradients(inputs, backend="triton")
    expected, expected_gradients = exact(inputs)
    assert relative_error(output, expected) < FLOAT32_ERROR
    for name, gradient in gradients.items():
        # A bias moves every token alike, and the tokens' shares in its gradient cancel.
        bound = FLOAT32_ERROR * (4 if name in MAPS else 1)
        assert relative_error(gradient, expected_gradients[name]) < bound, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("maps", [None, "half", "float32"])
@pytest.mark.parametrize("shape", [(1, (9, 11), 2, 40), (1, (3, 5), 1, 160)], ids=shape_id)
def test_half_precision_error(shape, dtype, maps):
    """Against float64 on the same rounded inputs: at most twice what plain code in that dtype loses."""
    inputs = make_inputs(shape, dtype=dtype, maps=maps is not None)
    if maps == "float32":  # as when training
        inputs |= {name: inputs[name].float() for name in MAPS}
    output, gradients = run_with_gradients(inputs, backend="triton")
    expected, expected_gradients = exact(inputs)
    plain, plain_gradients = run_plain_with_gradients(inputs)
    assert output.dtype == dtype
    assert relative_error(output, expected) <= 2 * relative_error(plain, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        # Plain fp16 gradients are often NaN (1e-6 is subnormal there): then two roundings are the yardstick.
        plain_error = relative_error(plain_gradients[name], expected_gradients[name])
        floor = 2 * torch.finfo(dtype).eps
        bound = floor if math.isnan(plain_error) else max(2 * plain_error, floor)
        assert relative_error(gradient, expected_gradients[name]) <= bound, name


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5, 4.0])
def test_focusing_factors(factor):
    inputs = make_inputs((1, (3, 5), 2, 20), dtype=torch.float32, kernel=1)
    output, gradients = run_with_gradients(inputs, backend="triton", focusing_factor=factor)
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}
    expected, expected_gradients = run_with_gradients(wide, backend="reference", focusing_factor=factor)
    assert relative_error(output, expected) < 1e-5
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < 2e-5, name


@pytest.mark.parametrize("kernel", [1, 5])
def test_agrees_with_the_loop(kernel):
    inputs = make_inputs((2, (4, 3), 2, 16), dtype=torch.float32, kernel=kernel)
    mask = mask_for((2, (4, 3)))
    mask[1] = False
    output, gradients = run_with_gradients({**inputs, "key_mask": mask}, backend="triton")
    assert relative_error(output, loop_focused_attention(**inputs, key_mask=mask)) < FLOAT32_ERROR
    assert (output[1] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert (gradients["key"][1] == 0).all() and (gradients["value"][1] == 0).all()


def test_without_parameters_and_across_lengths(processors):
    inputs = make_inputs((2, (5, 13), 2, 40), dtype=torch.float32)
    call = {"query": inputs["query"], "key": inputs["key"][:, :21], "value": inputs["value"][:, :21]}
    output, gradients = run_with_gradients(call, backend="triton")
    expected, expected_gradients = exact(call)
    assert relative_error(output, expected) < FLOAT32_ERROR
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < FLOAT32_ERROR, name


@pytest.mark.parametrize("name", ["query_map", "key_map"])
def test_one_map_alone(name, processors):
    inputs = make_inputs((1, (5, 13), 2, 24), dtype=torch.float32, maps=True)
    call = {part: inputs[part] for part in ("query", "key", "value", f"{name}_weight", f"{name}_bias")}
    output, gradients = run_with_gradients(call, backend="triton")
    expected, expected_gradients = exact(call)
    assert relative_error(output, expected) < FLOAT32_ERROR
    for part, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[part]) < 4 * FLOAT32_ERROR, part


@pytest.mark.parametrize("layout", ["sliced_qkv", "heads_first", "odd_strides"])
def test_any_strides_without_copies(layout, monkeypatch):
    batch, tokens, heads, head_dim = 2, 15, 3, 20
    if layout == "sliced_qkv":
        fused = torch.randn(batch, tokens, 3 * heads * head_dim)
        views = [t.unflatten(-1, (heads, head_dim)) for t in fused.chunk(3, dim=-1)]
    elif layout == "heads_first":
        views = list(torch.randn(3, batch, heads, tokens, head_dim).transpose(2, 3))
    else:
        views = list(torch.randn(3, batch, head_dim, heads, 2 * tokens).permute(0, 1, 4, 3, 2)[:, :, ::2])
    weight = torch.randn(head_dim, 1, 3, 3)
    expected, expected_gradients = run_with_gradients(
        dict(zip(("query", "key", "value"), (v.double() for v in views), strict=True))
        | {"conv_weight": weight.double(), "grid": (3, 5)}
    )
    leaves = [view.detach().requires_grad_() for view in views]
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self, *_: pytest.fail("copied") if self.dim() == 4 and
                        self.shape[1] == tokens else self)  # fmt: skip
    output = focused_linear_attention(*leaves, conv_weight=weight, grid=(3, 5), backend="triton")
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    # A gradient with strides of its own, as a transposed consumer hands it back.
    strided = direction.float().transpose(1, 2).clone().transpose(1, 2)
    gradients = torch.autograd.grad(output, leaves, strided, retain_graph=True)
    assert relative_error(output, expected) < FLOAT32_ERROR
    for name, gradient in zip(("query", "key", "value"), gradients, strict=True):
        assert relative_error(gradient, expected_gradients[name]) < FLOAT32_ERROR, name
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), leaves))  # strides of zero


@pytest.mark.parametrize("factor", [3.0, 4.0])
def test_large_magnitudes_in_fp16(factor):
    inputs = make_inputs((1, (5, 3), 2, 40), dtype=torch.float16, magnitude=1e4)
    inputs["value"] = inputs["value"].clamp(-3, 3) * 1e4
    inputs["conv_weight"], inputs["conv_bias"] = inputs["conv_weight"].float() * 0.1, inputs["conv_bias"].float()
    inputs.pop("scale")
    inputs["query"][:, :, 1] *= 1e-3  # a weak head beside a strong one: fp16 alone could not hold its powers
    inputs["key"][:, :, 1] *= 1e-3
    output, gradients = run_with_gradients(inputs, backend="triton", focusing_factor=factor)
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}
    expected, _ = run_with_gradients(wide, focusing_factor=factor)
    assert relative_error(output, expected) < 2e-3
    assert relative_error(output[:, :, 1], expected[:, :, 1]) < 2e-3
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float16, 3.0), (torch.bfloat16, 8.0), (torch.float32, 3.0)],
    ids=["fp16", "bf16", "fp32"],
)
def test_negative_tokens_and_heads(dtype, factor):
    inputs = make_inputs((1, (3, 5), 2, 20), dtype=dtype)
    inputs["query"][:, 4:9] = -inputs["query"][:, 4:9].abs() - 1
    inputs["key"][:, 7:] = -inputs["key"][:, 7:].abs() - 1
    inputs["key"][:, :, 1] = -inputs["key"][:, :, 1].abs() - 1  # one head without a single positive key
    output, gradients = run_with_gradients(inputs, backend="triton", focusing_factor=factor)
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}
    expected, _ = run_with_gradients(wide, focusing_factor=factor)
    assert relative_error(output, expected) < 8 * torch.finfo(dtype).eps
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert (gradients["query"][:, 4:9] == 0).all() and (gradients["key"][:, 7:] == 0).all()


@pytest.mark.parametrize(
    ("shape", "maps"), [((2, (4, 5), 2, 20), False), ((2, (4, 5), 2, 20), True), ((1, (3, 5), 1, 72), True)]
)
def test_masked_slots_and_new_memory_may_hold_anything(shape, maps, processors):
    inputs = make_inputs(shape, dtype=torch.float32, maps=maps)
    inputs["key_mask"] = mask = mask_for(shape, keep=0.5)
    expected, expected_gradients = run_with_gradients(inputs, backend="triton")
    for name in ("key", "value"):
        inputs[name] = inputs[name].masked_fill(~mask[:, :, None, None], float("nan"))
    torch.use_deterministic_algorithms(True)  # torch fills new memory with NaN
    try:
        assert torch.empty(2).isnan().all()
        output, gradients = run_with_gradients(inputs, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
def test_nan_in_a_live_token_is_not_hidden(maps):
    inputs = make_inputs((1, (3, 5), 1, 16), dtype=torch.float32, maps=maps)
    inputs["query"][0, 4] = float("nan")
    output = attend(**inputs, backend="triton")
    assert output[0, 4].isnan().all() and output[0, 5:].isfinite().all()


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
def test_registration_and_one_graph(maps):
    inputs = make_inputs((1, (2, 3), 1, 16), dtype=torch.float32, maps=maps)
    names = ("query", "key", "value", "scale", *MAPS, "conv_weight", "conv_bias")
    tensors = [inputs[name].requires_grad_() if name in inputs else None for name in names]
    torch.library.opcheck(focused_linear, (*tensors, None, 3.0, [2, 3], "triton"))

    names = [name for name in names if name in inputs]
    tensors = [inputs[name] for name in names]

    def loss(*tensors):
        return attend(**dict(zip(names, tensors, strict=True)), grid=(2, 3), backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*tensors), tensors)
    for gradient, other in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        assert relative_error(gradient, other) < 1e-6


def test_derivatives_that_the_kernels_lack():
    """Forward-mode and second ones are the reference's, and never zeros."""
    inputs = make_inputs((1, (2, 3), 1, 16), dtype=torch.float32)
    query, direction = inputs["query"], torch.ones_like(inputs["query"])
    found = []
    for backend in ("reference", "triton"):

        def call(query, backend=backend):
            return attend(**{**inputs, "query": query}, backend=backend)

        leaf = query.clone().requires_grad_()
        (first,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), leaf)[0]
        found.append((torch.func.jvp(call, (query,), (direction,))[1], second))
    for expected, actual in zip(*found, strict=True):
        assert expected.norm() > 0
        assert relative_error(actual, expected) < 1e-5


def test_what_the_kernels_do_not_take():
    assert "triton" in available_backends("cpu")
    assert resolve_backend("auto", "cpu") == "eager"
    with pytest.raises(ValueError, match="torch.float64"):
        resolve_backend("triton", "cpu", torch.float64, 40)
    with pytest.raises(ValueError, match="head_dim up to 256"):
        resolve_backend("triton", "cpu", torch.float16, 320)
