"""The operator against the paper's own outputs, a plain loop, and itself at every shape and dtype it claims."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from flatten_diffusion.ops import focused_feature_map, focused_linear_attention, resolve_backend
from flatten_diffusion.ops.focused_linear.arguments import FocusedArguments

from .focused_cases import (
    MAPS,
    SHAPES,
    attend,
    loop_focused_attention,
    make_inputs,
    relative_error,
    run_plain_with_gradients,
    run_with_gradients,
    shape_id,
)

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
BACKENDS = ("reference", "eager")

# --- against the authors and against the loop -------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden, the authors' outputs, is not here")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.safetensors")), ids=lambda p: p.stem)
def test_agrees_with_the_authors(path, backend):
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata, stored = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    x = stored["x"].clone().requires_grad_()
    params = {k[6:]: v.clone().requires_grad_() for k, v in stored.items() if k.startswith("param.")}
    query, key, value = F.linear(x, params["qkv.weight"], params["qkv.bias"]).chunk(3, dim=-1)
    key = key + params["positional_encoding"]
    heads = int(metadata["heads"])
    side = math.isqrt(x.shape[1])
    attended = focused_linear_attention(
        *(t.unflatten(-1, (heads, -1)) for t in (query, key, value)),
        focusing_factor=float(metadata["focusing_factor"]),
        scale=F.softplus(params["scale"]).flatten(),
        conv_weight=params["dwc.weight"],
        conv_bias=params["dwc.bias"],
        grid=(side, side),
        backend=backend,
    )
    output = F.linear(attended.flatten(2), params["proj.weight"], params["proj.bias"])
    output.backward(stored["grad_out"])
    assert relative_error(output, stored["out"]) < 1e-9
    assert relative_error(x.grad, stored["grad_x"]) < 1e-9
    for name, param in params.items():
        assert relative_error(param.grad, stored[f"grad.{name}"]) < 1e-9, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 5.0])
@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
def test_agrees_with_the_loop(backend, factor, maps):
    inputs = make_inputs((2, (3, 5), 2, 6), maps=maps)
    expected = loop_focused_attention(**inputs, focusing_factor=factor)
    assert relative_error(attend(**inputs, focusing_factor=factor, backend=backend), expected) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_masked_convolution_agrees_with_the_loop(backend, kernel):
    inputs = make_inputs((3, (4, 3), 2, 5), kernel=kernel)
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[2] = False
    expected = loop_focused_attention(**inputs, key_mask=mask)
    actual = focused_linear_attention(**inputs, key_mask=mask, backend=backend)
    assert relative_error(actual, expected) < 1e-12
    assert (actual[2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_kernel_for_every_head(backend):
    """The paper's own form: as if every head had that kernel, and the gradients are the sums over the heads."""
    inputs = make_inputs((2, (4, 3), 3, 5))
    shared = {**inputs, "conv_weight": inputs["conv_weight"][:5], "conv_bias": inputs["conv_bias"][:5]}
    repeated = {name: shared[name].repeat(3, *[1] * (shared[name].dim() - 1)) for name in ("conv_weight", "conv_bias")}
    output, gradients = run_with_gradients(shared, backend=backend)
    assert relative_error(output, loop_focused_attention(**shared)) < 1e-12
    expected, expected_gradients = run_with_gradients({**inputs, **repeated}, backend=backend)
    assert relative_error(output, expected) < 1e-12
    for name in ("conv_weight", "conv_bias"):
        total = expected_gradients[name].unflatten(0, (3, 5)).sum(0)
        assert relative_error(gradients[name], total) < 1e-12, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_lengths_agree_with_the_loop(backend):
    inputs = make_inputs((2, (5, 3), 2, 6))
    call = {"query": inputs["query"], "key": inputs["key"][:, :7], "value": inputs["value"][:, :7]}
    assert relative_error(focused_linear_attention(**call, backend=backend), loop_focused_attention(**call)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_map_alone(backend):
    """Of the query or of the key, without a scale, across lengths: as if the tokens had come mapped."""
    inputs = make_inputs((2, (5, 3), 2, 6), maps=True)
    call = {"query": inputs["query"], "key": inputs["key"][:, :7], "value": inputs["value"][:, :7]}
    for name in ("query", "key"):
        pair = inputs[f"{name}_map_weight"], inputs[f"{name}_map_bias"]
        mapped = torch.einsum("bnhd,hde->bnhe", call[name], pair[0]) + pair[1]
        expected = loop_focused_attention(**{**call, name: mapped})
        assert relative_error(focused_linear_attention(**call, **{f"{name}_map": pair}, backend=backend), expected) < (
            1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_maps_that_change_nothing(dtype):
    inputs = make_inputs((2, (5, 3), 2, 8), dtype=dtype)
    del inputs["scale"]  # with one, the last bit of a product may differ
    unit = torch.eye(8).expand(2, 8, 8), torch.zeros(2, 8)
    output = focused_linear_attention(**inputs, query_map=unit, key_map=unit, backend="eager")
    assert torch.equal(output, focused_linear_attention(**inputs, backend="eager"))


# --- the fast path against the reference ------------------------------------------------------------------------------


@pytest.fixture(params=[1 << 18, 700], ids=["one-block", "many-blocks"])
def block_elements(request, monkeypatch):
    """Both one block and blocks that end in the middle of everything."""
    from flatten_diffusion.ops.focused_linear import eager

    monkeypatch.setattr(eager, "CPU_BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_eager_matches_reference_forward_and_backward(shape, masked, maps, block_elements):
    inputs = make_inputs(shape, kernel=5, maps=maps)
    if masked:
        inputs["key_mask"] = torch.rand(shape[0], math.prod(shape[1]), generator=torch.Generator().manual_seed(5)) > 0.3
    output, gradients = run_with_gradients(inputs, backend="eager")
    expected, expected_gradients = run_with_gradients(inputs, backend="reference")
    assert relative_error(output, expected) < 1e-12
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-11, name


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 3.5, 4.0, 6.0])
def test_eager_gradients_at_every_focusing_factor(factor):
    inputs = make_inputs((2, (3, 5), 3, 8))
    output, gradients = run_with_gradients(inputs, backend="eager", focusing_factor=factor)
    expected, expected_gradients = run_with_gradients(inputs, backend="reference", focusing_factor=factor)
    assert relative_error(output, expected) < 1e-12
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-11, name


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
def test_gradcheck(maps):
    inputs = make_inputs((1, (2, 3), 2, 3), maps=maps)
    mask = torch.tensor([[True, False, True, True, True, False]])
    names = [name for name in inputs if name != "grid"]

    def call(*tensors):
        return attend(**dict(zip(names, tensors, strict=True)), grid=(2, 3), key_mask=mask, backend="eager")

    assert torch.autograd.gradcheck(call, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
def test_operator_registration(maps):
    """Schema, fake tensors and AOT dispatch of the registered operator agree with what it does."""
    from flatten_diffusion.ops.focused_linear.operator import focused_linear

    inputs = make_inputs((2, (3, 5), 2, 8), dtype=torch.float32, maps=maps)
    names = ("query", "key", "value", "scale", *MAPS, "conv_weight", "conv_bias")
    tensors = [inputs[name].requires_grad_() if name in inputs else None for name in names]
    torch.library.opcheck(focused_linear, (*tensors, None, 3.0, [3, 5], "eager"))


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
@pytest.mark.parametrize("layout", ["sliced_qkv", "heads_first", "odd_strides"])
def test_any_strides(layout, maps, block_elements):
    batch, tokens, heads, head_dim = 2, 15, 3, 8
    if layout == "sliced_qkv":
        fused = torch.randn(batch, tokens, 3 * heads * head_dim, dtype=torch.float64)
        query, key, value = (t.unflatten(-1, (heads, head_dim)) for t in fused.chunk(3, dim=-1))
    elif layout == "heads_first":
        query, key, value = torch.randn(3, batch, heads, tokens, head_dim, dtype=torch.float64).transpose(2, 3)
    else:
        query, key, value = torch.randn(3, batch, head_dim, heads, 2 * tokens, dtype=torch.float64).permute(
            0, 1, 4, 3, 2
        )[:, :, ::2]
    weight = torch.randn(head_dim, 1, 3, 3, dtype=torch.float64)
    strided = {"query": query, "key": key, "value": value, "conv_weight": weight, "grid": (3, 5)}
    if maps:
        drawn = make_inputs((batch, (3, 5), heads, head_dim), maps=True)
        strided |= {name: drawn[name].transpose(-1, -2).contiguous().transpose(-1, -2) for name in MAPS}
    expected, expected_gradients = run_with_gradients({k: v.contiguous() if torch.is_tensor(v) else v
                                                       for k, v in strided.items()}, backend="reference")  # fmt: skip
    leaves = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in strided.items()}
    output = attend(**leaves, backend="eager")
    assert relative_error(output, expected) < 1e-12
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    # An expanded gradient, as a sum or a broadcast hands it back, is not contiguous either.
    gradients = torch.autograd.grad(output, [query, key, value], direction)
    for name, gradient in zip(("query", "key", "value"), gradients, strict=True):
        assert relative_error(gradient, expected_gradients[name]) < 1e-11, name
    torch.autograd.grad(attend(**leaves, backend="eager").sum(), [query])


# --- numbers that break naive versions --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=shape_id)
@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
def test_error_in_the_inputs_dtype(shape, dtype, backend, maps):
    """Against float64 on the same rounded inputs: at most twice what plain code in that dtype loses."""
    inputs = make_inputs(shape, dtype=dtype, maps=maps)
    exact_inputs = {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}
    output, gradients = run_with_gradients(inputs, backend=backend)
    exact, exact_gradients = run_with_gradients(exact_inputs, backend="reference")
    plain, plain_gradients = run_plain_with_gradients(inputs)
    assert output.dtype == dtype
    assert relative_error(output, exact) <= 2 * relative_error(plain, exact)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        # Plain fp16 gradients are often NaN (1e-6 is subnormal there); then, rounding the result is the only yardstick.
        plain_error = relative_error(plain_gradients[name], exact_gradients[name])
        bound = torch.finfo(dtype).eps if math.isnan(plain_error) else max(2 * plain_error, torch.finfo(dtype).eps)
        assert relative_error(gradient, exact_gradients[name]) <= bound, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [3.0, 4.0])
def test_large_magnitudes_in_fp16_stay_finite_and_right(backend, factor):
    inputs = make_inputs((2, (5, 3), 2, 40), dtype=torch.float16, magnitude=1e4)
    inputs["value"] = inputs["value"].clamp(-3, 3) * 1e4
    # Smaller, or the exact result itself leaves fp16; parameters in float32, as when training: so do their gradients.
    inputs["conv_weight"], inputs["conv_bias"] = inputs["conv_weight"].float() * 0.1, inputs["conv_bias"].float()
    inputs.pop("scale")
    output, gradients = run_with_gradients(inputs, backend=backend, focusing_factor=factor)
    exact, _ = run_with_gradients(
        {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}, focusing_factor=factor
    )
    assert relative_error(output, exact) < 1e-3
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_float32_far_beyond_its_cube_root():
    inputs = make_inputs((1, (3, 5), 2, 8), dtype=torch.float32, magnitude=1e17)
    output, gradients = run_with_gradients(inputs, backend="eager")
    exact, _ = run_with_gradients({k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()})
    assert relative_error(output, exact) < 1e-5
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0, 8.0])
def test_all_negative_tokens(backend, dtype, factor):
    inputs = make_inputs((1, (3, 5), 2, 40), dtype=dtype)
    inputs["query"][:, 4:9] = -inputs["query"][:, 4:9].abs() - 1
    inputs["key"][:, 7:] = -inputs["key"][:, 7:].abs() - 1
    output, gradients = run_with_gradients(inputs, backend=backend, focusing_factor=factor)
    exact, _ = run_with_gradients(
        {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}, focusing_factor=factor
    )
    assert relative_error(output, exact) < 8 * torch.finfo(dtype).eps
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert (gradients["query"][:, 4:9] == 0).all() and (gradients["key"][:, 7:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_key_negative(backend):
    inputs = make_inputs((1, (3, 5), 2, 8), dtype=torch.float32)
    inputs["key"] = -inputs["key"].abs()
    output, gradients = run_with_gradients(inputs, backend=backend)
    assert relative_error(output, loop_focused_attention(**inputs)) < 1e-5
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_masked_slots_may_hold_anything(backend, poison, maps, dtype):
    inputs = make_inputs((2, (4, 5), 2, 8), dtype=dtype, maps=maps)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) > 0.5
    expected, expected_gradients = run_with_gradients({**inputs, "key_mask": mask}, backend=backend)
    poisoned = dict(inputs, key_mask=mask)
    for name in ("key", "value"):
        poisoned[name] = inputs[name].masked_fill(~mask[:, :, None, None], poison)
    output, gradients = run_with_gradients(poisoned, backend=backend)
    assert torch.equal(output, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name
    assert (gradients["key"][~mask] == 0).all() and (gradients["value"][~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_read_before_it_is_written(backend, monkeypatch):
    """torch's own poison: new memory is NaN, so an unwritten entry shows."""
    inputs = make_inputs((2, (5, 3), 2, 8), maps=True)
    expected, expected_gradients = run_with_gradients(inputs, backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(2).isnan().all()
        output, gradients = run_with_gradients(inputs, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(output, expected)
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)


def test_feature_map_keeps_length_and_sharpens():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    mapped = focused_feature_map(x, 3.0)
    before = (F.relu(x) + 1e-6).flatten(2)
    torch.testing.assert_close(mapped.flatten(2).norm(dim=-1), before.norm(dim=-1))
    assert (mapped.flatten(2).amax(-1) >= before.amax(-1)).all()
    torch.testing.assert_close(focused_feature_map(x, 1.0).flatten(2), before)


# --- inside torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
def test_compiles_to_one_graph(backend, maps):
    """Forward and backward, two grids, one of them masked."""
    torch._dynamo.reset()
    inputs = make_inputs((2, (4, 5), 2, 8), dtype=torch.float32, maps=maps)
    names = [name for name in inputs if name != "grid"]

    def loss(*arguments):
        *tensors, grid, key_mask = arguments
        named = dict(zip(names, tensors, strict=True))
        return attend(**named, grid=grid, key_mask=key_mask, backend=backend).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for grid, mask in (((4, 5), None), ((2, 10), torch.arange(40).view(2, 20) % 3 > 0)):
        results = []
        for function in (loss, compiled):
            leaves = [inputs[name].clone().requires_grad_() for name in names]
            value = function(*leaves, grid, mask)
            results.append([value, *torch.autograd.grad(value, leaves)])
        for expected, actual in zip(*results, strict=True):
            assert relative_error(actual, expected) < 1e-5


def test_inductor_compiles_it():
    torch._dynamo.reset()
    inputs = make_inputs((1, (4, 5), 2, 8), dtype=torch.float32)
    compiled = torch.compile(focused_linear_attention, fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(**inputs), focused_linear_attention(**inputs)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_traces_to_nodes_of_torch(backend):
    """Also with a grid of sizes that the trace holds as tensors; torch.onnx's older exporter traces like this."""
    images = torch.randn(1, 16, 3, 5)
    weight = torch.randn(16, 1, 3, 3)

    def call(images):
        tokens = images.flatten(2).transpose(1, 2).unflatten(-1, (2, 8))
        return focused_linear_attention(
            tokens, tokens, tokens, conv_weight=weight, grid=images.shape[2:], backend=backend
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes become constants, and that tracing is old
        traced = torch.jit.trace(call, images)
    assert "flatten_diffusion::" not in str(traced.graph)
    other = torch.randn(1, 16, 3, 5)
    assert relative_error(traced(other), call(other)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports_with_sizes_left_open(backend):
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return focused_linear_attention(query, key, value, backend=backend)

    inputs = make_inputs((3, (3, 5), 2, 8), dtype=torch.float32)
    query, key, value = inputs["query"], *(inputs[name][:, :9].contiguous() for name in ("key", "value"))
    batch, tokens, keys = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "tokens", "keys"))
    shapes = [{0: batch, 1: tokens}, {0: batch, 1: keys}, {0: batch, 1: keys}]
    program = torch.export.export(Attention(), (query, key, value), dynamic_shapes=shapes)
    own = [node for node in program.graph.nodes if "flatten_diffusion" in str(node.target)]
    assert len(own) == (backend != "reference")
    call = [tensor[:2, 2:].contiguous() for tensor in (query, key, value)]
    assert relative_error(program.module()(*call), Attention()(*call)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_runs_in_the_autocast_dtype(backend):
    inputs = make_inputs((2, (3, 5), 2, 8), dtype=torch.float32, maps=True)
    halves = {k: v.bfloat16() if k in ("query", "key", "value") else v for k, v in inputs.items()}
    expected = attend(**halves, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the backward runs under it too
        output, gradients = run_with_gradients(inputs, backend=backend)
        mixed = attend(
            **{**inputs, "value": inputs["value"].bfloat16()}, backend=backend
        )  # queries that went through a norm arrive wider than values
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected) and torch.equal(mixed, expected)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    if backend == "eager":  # autograd's own backward is cast operation by operation; the operator's stays as it is
        _, expected_gradients = run_with_gradients(halves, backend=backend)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected_gradients[name].float()), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(backend, use_reentrant):
    inputs = make_inputs((2, (3, 5), 2, 8), dtype=torch.float32)
    names = ("query", "key", "value", "scale", "conv_weight", "conv_bias")

    def call(*tensors):
        return focused_linear_attention(**dict(zip(names, tensors, strict=True)), grid=(3, 5), backend=backend)

    results = []
    for function in (call, lambda *tensors: checkpoint(call, *tensors, use_reentrant=use_reentrant)):
        leaves = [inputs[name].clone().requires_grad_() for name in names]
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)]
                       if not use_reentrant else _backward(output, leaves))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _backward(output, leaves):
    output.square().sum().backward()
    return [output, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend):
    inputs = make_inputs((1, (3, 5), 2, 8), dtype=torch.float32)
    expected = focused_linear_attention(**inputs, backend=backend)
    with torch.inference_mode():
        assert torch.equal(focused_linear_attention(**inputs, backend=backend), expected)


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
def test_half_precision_never_holds_a_wide_copy(monkeypatch, maps):
    """Every new float32 tensor of a bfloat16 call, forward and backward, is a block, a state or a statistic."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    self.entries = max(self.entries, tensor.untyped_storage().nbytes() // 4)
            return result

    from flatten_diffusion.ops.focused_linear import eager

    monkeypatch.setattr(eager, "CPU_BLOCK_ELEMENTS", 2000 // torch.get_num_threads())
    inputs = make_inputs((1, (50, 20), 2, 32), dtype=torch.bfloat16, maps=maps)
    pairs = [(inputs[f"{name}_weight"], inputs[f"{name}_bias"]) if maps else None for name in ("query_map", "key_map")]
    tokens = [inputs[k] for k in ("query", "key", "value")]
    convolution = inputs["conv_weight"], inputs["conv_bias"]
    call = FocusedArguments(*tokens, inputs["scale"], *pairs, *convolution, None, 3.0, inputs["grid"])
    with Largest() as largest:
        output, state, mean_key, _ = eager.forward(call)
        eager.backward(call, output, state, mean_key)
    assert 0 < largest.entries < inputs["query"].numel() // 8


# --- at the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 15, 16)}, "query has 3 dimensions"),
        ({"query": torch.zeros(2, 15, 2, 8, dtype=torch.int64)}, "query is torch.int64"),
        ({"query": torch.zeros(2, 15, 4, 8)}, "differ in batch, heads or head_dim"),
        ({"key": torch.zeros(2, 14, 2, 8)}, "key .* and value .* differ"),
        ({"key": torch.zeros(2, 0, 2, 8), "value": torch.zeros(2, 0, 2, 8)}, "key of shape .* is empty"),
        ({"value": torch.zeros(2, 15, 2, 8, dtype=torch.float16)}, "cast them to one dtype"),
        ({"value": torch.zeros(2, 15, 2, 8, device="meta")}, "value is on meta"),
        ({"scale": torch.ones(8)}, r"scale has shape \(8,\): pass \[16\]"),
        ({"scale": torch.ones(16, device="meta")}, "scale is on meta"),
        ({"query_map": torch.zeros(2, 8, 8)}, "query_map is no pair"),
        ({"key_map": (torch.zeros(8, 8), torch.zeros(2, 8))}, r"key_map's weight has shape \(8, 8\): pass \[2, 8, 8\]"),
        ({"key_map": (torch.zeros(2, 8, 8), torch.zeros(16))}, r"key_map's bias has shape \(16,\): pass \[2, 8\]"),
        ({"query_map": (torch.zeros(2, 8, 8).int(), torch.zeros(2, 8))}, "query_map's weight is torch.int32"),
        ({"query_map": (torch.zeros(2, 8, 8), torch.zeros(2, 8, device="meta"))}, "query_map's bias is on meta"),
        ({"conv_weight": torch.zeros(24, 1, 3, 3)}, r"conv_weight has shape .*: pass \[16, 1, K, K\].* or \[8,"),
        ({"conv_weight": torch.zeros(8, 1, 4, 4)}, "K odd"),
        ({"conv_weight": torch.zeros(8, 1, 3, 5)}, "conv_weight has shape"),
        ({"conv_bias": torch.zeros(8)}, r"conv_bias has shape \(8,\): pass \[16\]"),
        ({"conv_weight": None}, "conv_bias is given without conv_weight"),
        ({"grid": None}, "conv_weight is given without grid"),
        ({"grid": (4, 4)}, "grid .* holds 16 tokens"),
        ({"grid": (-3, -5)}, "grid is"),
        ({"key": torch.zeros(2, 7, 2, 8), "value": torch.zeros(2, 7, 2, 8)}, "value has 7 tokens and query 15"),
        ({"key_mask": torch.ones(2, 15)}, "key_mask is torch.float32"),
        ({"key_mask": torch.ones(2, 14, dtype=torch.bool)}, "key_mask is"),
        ({"focusing_factor": 0.0}, "focusing_factor is 0.0"),
        ({"focusing_factor": float("nan")}, "focusing_factor is nan"),
        ({"backend": "flash"}, "Unknown backend 'flash'"),
        ({"backend": "triton"}, "'triton' cannot run on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named_in_one_line(change, message):
    inputs = make_inputs((2, (3, 5), 2, 8), dtype=torch.float32)
    with pytest.raises(ValueError, match=message) as error:
        focused_linear_attention(**{**inputs, **change})
    assert "\n" not in str(error.value)


def test_resolve_backend():
    assert resolve_backend("auto", "cpu") == "eager"
    assert resolve_backend("reference", "cpu") == "reference"
