"""The Triton kernels on a CUDA device: the interpreter's cases at real sizes, and what only a GPU can show."""

from __future__ import annotations

import math

import pytest
import torch

from flatten_diffusion.ops import focused_linear_attention, resolve_backend
from tests.ops.focused_cases import (
    attend,
    make_inputs,
    relative_error,
    run_plain_with_gradients,
    run_with_gradients,
    shape_id,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SHAPES = [
    (2, (64, 64), 8, 40),
    (1, (63, 65), 5, 64),
    (2, (20, 25), 3, 60),
    (1, (48, 80), 16, 72),
    (1, (33, 31), 4, 128),
    (2, (9, 7), 8, 160),
    (1, (1, 63), 2, 32),
    (1, (17, 19), 2, 256),
]


def setup_module() -> None:
    pytest.importorskip("triton", reason="triton is not installed")


def exact(inputs, **options):
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    return run_with_gradients(wide, backend="reference", **options)


def mask_for(shape):
    keep = torch.rand(shape[0], math.prod(shape[1]), generator=torch.Generator().manual_seed(5)) > 0.3
    return keep.cuda()


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_float32(shape, masked, maps):
    inputs = make_inputs(shape, dtype=torch.float32, device="cuda", kernel=5, maps=maps)
    if masked:
        inputs["key_mask"] = mask_for(shape)
    output, gradients = run_with_gradients(inputs, backend="triton")
    expected, expected_gradients = exact(inputs)
    assert relative_error(output, expected) < 5e-6  # tf32 would be near 3e-4
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
def test_half_precision_error(shape, dtype, maps):
    """Against float64 on the same rounded inputs: at most twice what plain code in that dtype loses."""
    inputs = make_inputs(shape, dtype=dtype, device="cuda", maps=maps)
    output, gradients = run_with_gradients(inputs, backend="triton")
    expected, expected_gradients = exact(inputs)
    plain, plain_gradients = run_plain_with_gradients(inputs)
    plain_error = relative_error(plain, expected)
    assert math.isnan(plain_error) or relative_error(output, expected) <= 2 * plain_error
    assert relative_error(output, expected) < 4 * torch.finfo(dtype).eps
    for name, gradient in gradients.items():
        plain_error = relative_error(plain_gradients[name], expected_gradients[name])
        floor = 2 * torch.finfo(dtype).eps
        bound = floor if math.isnan(plain_error) else max(2 * plain_error, floor)
        assert relative_error(gradient, expected_gradients[name]) <= bound, name


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
def test_more_tokens_than_one_wave(maps):
    """Many chunks and programs that take every head; the state is summed in a fixed order, so runs are bit-equal."""
    inputs = make_inputs((2, (250, 262), 8, 40), dtype=torch.float32, device="cuda", maps=maps)
    output = attend(**inputs, backend="triton")
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}
    assert relative_error(output, attend(**wide, backend="eager")) < 5e-6
    assert torch.equal(output, attend(**inputs, backend="triton"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_large_magnitudes_and_negative_tokens(dtype):
    inputs = make_inputs((2, (15, 13), 3, 40), dtype=dtype, device="cuda", magnitude=1e4)
    inputs["value"] = inputs["value"].clamp(-3, 3) * 1e4
    inputs["conv_weight"], inputs["conv_bias"] = inputs["conv_weight"].float() * 0.1, inputs["conv_bias"].float()
    inputs.pop("scale")
    inputs["key"][:, 3:20] = -inputs["key"][:, 3:20].abs()
    inputs["query"][:, 9:30] = -inputs["query"][:, 9:30].abs()
    output, gradients = run_with_gradients(inputs, backend="triton")
    expected, _ = exact(inputs)
    assert relative_error(output, expected) < 4 * torch.finfo(dtype).eps + 1e-5
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_slots_and_new_memory_may_hold_anything(poison, maps):
    shape = (2, (14, 15), 2, 40)
    inputs = make_inputs(shape, dtype=torch.bfloat16, device="cuda", maps=maps)
    inputs["key_mask"] = mask = mask_for(shape)
    mask[1] = False
    expected, expected_gradients = run_with_gradients(inputs, backend="triton")
    for name in ("key", "value"):
        inputs[name] = inputs[name].masked_fill(~mask[:, :, None, None], poison)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills new memory with NaN
    try:
        output, gradients = run_with_gradients(inputs, backend="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(output, expected) and (output[1] == 0).all()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
def test_auto_takes_the_kernels_without_copies(maps):
    """From a fused projection's output: the call allocates its output and small states, nothing of an input's size."""
    assert resolve_backend("auto", "cuda", torch.bfloat16, 40) == "triton"
    assert resolve_backend("auto", "cuda", torch.float64, 40) == "eager"
    fused = torch.randn(2, 128 * 128, 3 * 320, device="cuda", dtype=torch.bfloat16)
    query, key, value = (t.unflatten(-1, (8, 40)) for t in fused.chunk(3, dim=-1))
    weight = torch.randn(8 * 40, 1, 5, 5, device="cuda")
    pair = torch.eye(40, device="cuda").repeat(8, 1, 1), torch.randn(8, 40, device="cuda")
    extra = {"query_map": pair, "key_map": pair} if maps else {}
    with torch.inference_mode():
        focused_linear_attention(query, key, value, conv_weight=weight, grid=(128, 128), **extra)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = focused_linear_attention(query, key, value, conv_weight=weight, grid=(128, 128), **extra)
        scratch = torch.cuda.max_memory_allocated() - before - output.nbytes
    assert scratch < 0.5 * output.nbytes


def test_no_host_synchronisation():
    inputs = make_inputs((2, (15, 13), 3, 40), dtype=torch.bfloat16, device="cuda", maps=True)
    inputs["key_mask"] = mask_for((2, (15, 13), 3, 40))
    run_with_gradients(inputs, backend="triton")
    leaves = {k: v.clone().requires_grad_(v.is_floating_point()) if torch.is_tensor(v) else v
              for k, v in inputs.items()}  # fmt: skip
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = attend(**leaves, backend="triton")
        output.backward(torch.ones_like(output))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_on_new_inputs():
    inputs = make_inputs((2, (15, 13), 3, 40), dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            focused_linear_attention(**inputs, backend="triton")
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = focused_linear_attention(**inputs, backend="triton")
        fresh = make_inputs((2, (15, 13), 3, 40), dtype=torch.bfloat16, device="cuda", seed=1)
        for name in ("query", "key", "value"):
            inputs[name].copy_(fresh[name])
        graph.replay()
        expected = focused_linear_attention(**inputs, backend="triton")
    assert torch.equal(output, expected)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiles_to_one_graph(mode):
    torch._dynamo.reset()
    inputs = make_inputs((2, (15, 13), 3, 40), dtype=torch.bfloat16, device="cuda")
    compiled = torch.compile(focused_linear_attention, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            output = compiled(**inputs).clone()
        assert torch.equal(output, focused_linear_attention(**inputs))
    leaves = {k: v.clone().requires_grad_() if torch.is_tensor(v) else v for k, v in inputs.items()}
    compiled(**leaves).float().square().sum().backward()
    assert all(v.grad.isfinite().all() for v in leaves.values() if torch.is_tensor(v))


def test_derivatives_that_the_kernels_lack():
    inputs = make_inputs((1, (15, 13), 3, 40), dtype=torch.float32, device="cuda")
    direction = torch.ones_like(inputs["query"])
    tangents = [
        torch.func.jvp(
            lambda query, b=b: attend(**{**inputs, "query": query}, backend=b), (inputs["query"],), (direction,)
        )
        for b in ("reference", "triton")
    ]
    assert tangents[0][1].norm() > 0
    assert relative_error(tangents[1][1], tangents[0][1]) < 1e-5


def test_autocast_and_second_device():
    inputs = make_inputs((1, (15, 13), 3, 40), dtype=torch.float32, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert focused_linear_attention(**inputs).dtype == torch.bfloat16
    if torch.cuda.device_count() > 1:
        moved = {k: v.to("cuda:1") if torch.is_tensor(v) else v for k, v in inputs.items()}
        assert relative_error(focused_linear_attention(**moved).cpu(), focused_linear_attention(**inputs).cpu()) < 1e-6
