"""Every derivative torch knows, of every operator that has a backward of its own: against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd import forward_ad

from flatten_diffusion.ops import focused_linear_attention, split_focused_linear_attention
from flatten_diffusion.ops.focused_linear.operator import focused_linear
from flatten_diffusion.ops.pyramid import Cells, pyramid_attention
from flatten_diffusion.ops.windows import join_far, join_windows, key_moments, score_moments

from .focused_cases import attend, make_inputs, relative_error, run_with_gradients

IMAGES = ((1, 3, 5),)
MASK = torch.arange(15)[None] % 4 > 0
STEP = 1e-5


def focused(masked: bool, maps: bool):
    """(function of all tensors of a call, those tensors)."""
    inputs = make_inputs((1, (3, 5), 2, 4), maps=maps)
    names = [name for name in inputs if name != "grid"]

    def function(*tensors):
        named = dict(zip(names, tensors, strict=True))
        return attend(**named, grid=(3, 5), key_mask=MASK if masked else None, backend="eager")

    return function, [inputs[name] for name in names]


def pyramid(cells: Cells):
    tokens = torch.randn(3, 1, 54, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(54)[None] % 4 > 0
    return lambda *x: pyramid_attention(*x, ((1, 6, 9),), cells, key_mask=mask, scale=0.3), [*tokens]


def windows(kind: str):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 1, 15, 2, 4, generator=generator, dtype=torch.float64)
    far, gain, bias = (torch.randn(*shape, generator=generator).double() for shape in ((1, 15, 2), (2, 2), (2,)))
    if kind == "join_far":
        return lambda *x: join_far(*x, IMAGES, 2, MASK, 0.3), [*tokens, far]
    if kind == "join_windows":
        return lambda *x: join_windows(*x[:4], IMAGES, 2, MASK, 0.3, *x[4:]), [*tokens, gain, bias]
    return lambda query, key: score_moments(query, key_moments(key, MASK), 0.3)[1:], [*tokens[:2]]


CASES = {
    "focused": lambda: focused(False, False),
    "focused-masked-maps": lambda: focused(True, True),
    "join_far": lambda: windows("join_far"),
    "join_windows": lambda: windows("join_windows"),
    "pyramid": lambda: pyramid(Cells(window=2, ring=2, far=2, budget=0, opened=())),
    "pyramid-opened": lambda: pyramid(Cells(window=2, far=4, budget=0, opened=(2, 3))),
    "moments": lambda: windows("moments"),
}


def joined(output):
    """One vector of whatever a function returns."""
    return torch.cat([part.flatten() for part in (output if isinstance(output, (tuple, list)) else [output])])


def directions(tensors):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors]


def slope(function, tensors, tangents):
    """The directional derivative, by central differences."""
    up, down = (joined(function(*(t + sign * STEP * d for t, d in zip(tensors, tangents, strict=True))))
                for sign in (1, -1))  # fmt: skip
    return (up - down) / (2 * STEP)


def dual_tangent(function, tensors, tangents):
    with forward_ad.dual_level():
        output = function(*(forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)))
        parts = output if isinstance(output, tuple) else [output]
        return joined([forward_ad.unpack_dual(part).tangent for part in parts])


@pytest.mark.compatibility("torch.func, forward-mode", "works", "right values through the reference")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("case", CASES)
def test_forward_mode(case, grad):
    function, tensors = CASES[case]()
    tangents = directions(tensors)
    expected = slope(function, tensors, tangents)
    with torch.set_grad_enabled(grad):
        _, tangent = torch.func.jvp(lambda *x: joined(function(*x)), tuple(tensors), tuple(tangents))
        assert relative_error(tangent, expected) < 1e-6
        assert relative_error(dual_tangent(function, tensors, tangents), expected) < 1e-6
        # A student that trains by it: parameters that require gradients among what is differentiated forwards.
        leaves = [tensor.clone().requires_grad_(grad) for tensor in tensors]
        assert relative_error(dual_tangent(function, leaves, tangents), expected) < 1e-6


@pytest.mark.parametrize("case", ["focused", "focused-masked-maps", "join_far", "pyramid", "pyramid-opened"])
def test_second_derivatives(case):
    """By create_graph, of all tensors and of what the gradient was multiplied with."""
    function, tensors = CASES[case]()
    tangents, weights = directions(tensors), torch.randn(joined(function(*tensors)).shape).double()

    def gradient(*tensors):
        leaves = [tensor if tensor.requires_grad else tensor.clone().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(joined(function(*leaves)), leaves, weights, create_graph=True)

    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    first = gradient(*leaves)
    expected_first = torch.autograd.grad(joined(function(*leaves)), leaves, weights)
    assert relative_error(joined(first), joined(expected_first)) < 1e-9
    along = sum((g * d).sum() for g, d in zip(first, tangents, strict=True))
    second = torch.autograd.grad(along, leaves, materialize_grads=True)  # of the bias nothing depends on the bias
    # The Hessian is symmetric: its product with the directions is how the gradient changes along them.
    expected = slope(gradient, tensors, tangents).detach()
    assert relative_error(joined(second), expected) < 1e-6


def test_a_tensor_given_twice():
    x = make_inputs((1, (3, 5), 2, 4))["query"].requires_grad_()
    plain, fused = (
        torch.autograd.grad(focused_linear_attention(x, x, x, backend=backend).square().sum(), x, create_graph=True)[0]
        for backend in ("reference", "eager")
    )
    assert relative_error(fused, plain) < 1e-12
    assert relative_error(*(torch.autograd.grad(g.square().sum(), x)[0] for g in (fused, plain))) < 1e-12


@pytest.mark.parametrize("case", ["focused", "focused-masked-maps", "join_far", "pyramid", "pyramid-opened"])
def test_torch_func_grad_and_vmap(case):
    function, tensors = CASES[case]()
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(joined(function(*leaves)).square().sum(), leaves)
    places = tuple(range(len(tensors)))
    actual = torch.func.grad(lambda *x: joined(function(*x)).square().sum(), argnums=places)(*tensors)
    assert relative_error(joined(actual), joined(expected)) < 1e-12
    others = [tensor.flip(-1) for tensor in tensors]
    stacked = torch.func.vmap(lambda *x: joined(function(*x)))(*map(torch.stack, zip(tensors, others, strict=True)))
    for row, one in zip(stacked, (tensors, others), strict=True):
        assert relative_error(row, joined(function(*one))) < 1e-12
    _, pull = torch.func.vjp(lambda *x: joined(function(*x)), *tensors)
    jacobian = torch.func.vmap(pull)(torch.eye(len(row), dtype=torch.float64)[:2])
    for index in range(2):
        single = torch.autograd.grad(joined(function(*leaves))[index], leaves)
        assert relative_error(joined([part[index] for part in jacobian]), joined(single)) < 1e-12


def test_forward_mode_in_a_compiled_function():
    function, tensors = CASES["focused"]()
    tangents = directions(tensors)
    expected = slope(function, tensors, tangents)
    torch._dynamo.reset()
    inside = torch.compile(lambda x, d: torch.func.jvp(function, x, d)[1], fullgraph=True, backend="aot_eager")
    assert relative_error(joined(inside(tuple(tensors), tuple(directions(tensors)))), expected) < 1e-6
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*tensors), function(*tensors)) < 1e-12
    assert relative_error(dual_tangent(compiled, tensors, tangents), expected) < 1e-6  # recompiled for it


def test_the_fused_operator_stays_in_a_compiled_training_step():
    """create_graph is what goes another way: an ordinary backward pass must not."""
    found = []

    def count(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes if "focused_linear" in str(node.target))
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    function, tensors = CASES["focused"]()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=count))(*leaves).sum().backward()
    assert sorted(name.split(".")[1] for name in found) == ["focused_linear", "focused_linear_backward"]


def test_the_operator_itself_refuses_what_it_cannot():
    """As it stands in a graph exported before: below the function that goes another way."""
    query, key, value = (make_inputs((1, (3, 5), 2, 4))[name] for name in ("query", "key", "value"))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="backend='reference'") as error:
        focused_linear(forward_ad.make_dual(query, query), key, value, *[None] * 8, 3.0, [], "eager")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_split_over_processes_refuses_it(tmp_path):
    inputs = make_inputs((1, (3, 5), 2, 4))
    del inputs["grid"]
    tensors = inputs.pop("query"), inputs.pop("key"), inputs.pop("value")

    def call(*tokens):
        return split_focused_linear_attention(*tokens, **inputs, rows=(3,))

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        attempts = [
            lambda: torch.func.jvp(call, tensors, tensors),
            lambda: dual_tangent(call, tensors, tensors),
            lambda: torch.func.grad(lambda query: call(query, *tensors[1:]).sum())(tensors[0]),
            lambda: torch.func.vmap(call)(*(tensor[None] for tensor in tensors)),
            lambda: run_with_gradients(
                {"query": tensors[0]},
                function=lambda query: torch.autograd.grad(call(query, *tensors[1:]).sum(), query, create_graph=True)[
                    0
                ],
            ),
        ]
        for attempt in attempts:
            with pytest.raises(RuntimeError, match="pass whole images to focused_linear_attention") as error:
                attempt()
            assert "\n" not in str(error.value)
    finally:
        dist.destroy_process_group()


def test_loss_of_a_mean_flow():
    """A training step as mean-flow and consistency models take it: gradients of a loss with a tangent in it."""
    inputs = make_inputs((1, (3, 5), 2, 4))

    def loss(weight, backend):
        def field(x):
            tokens = F.linear(x, weight)
            return focused_linear_attention(tokens, tokens, x, backend=backend)

        output, tangent = torch.func.jvp(field, (inputs["query"],), (inputs["key"],))
        return (output - tangent).square().mean()

    gradients = []
    for backend in ("reference", "eager"):
        weight = torch.eye(4, dtype=torch.float64).requires_grad_()
        gradients += torch.autograd.grad(loss(weight, backend), weight)
    assert gradients[0].norm() > 0
    assert relative_error(gradients[1], gradients[0]) < 1e-12
