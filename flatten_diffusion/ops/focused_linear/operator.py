"""The operator as torch sees it: one node with a fake and a backward, whichever kernel computes it.

torch.compile, AOT autograd, checkpointing and fake tensors never look inside, so a graph stays whole and the blocks of
`eager` are not unrolled into it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from ..transforms import backward_needs_plain_torch, differentiable_gradients, needs_plain_torch
from . import eager, reference
from .arguments import DIFFERENTIABLE, FLAT_SCHEMA, FocusedArguments


@torch.library.custom_op(
    "flatten_diffusion::focused_linear",
    mutates_args=(),
    schema=f"({FLAT_SCHEMA}, str kernel) -> (Tensor, Tensor, Tensor)",
)
def focused_linear(*flat: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, N, H, D], state [B, H, D, D] and mean key [B, H, D]; the last two are what the backward reuses."""
    *arguments, kernel = flat
    if forward_ad._current_level >= 0:  # `run` never comes here then, but a graph that was exported before may
        raise RuntimeError("flatten_diffusion::focused_linear has no forward-mode derivative: use backend='reference'.")
    output, state, mean_key, _ = kernels_of(kernel).forward(FocusedArguments.from_flat(arguments))
    return output, state, mean_key


@focused_linear.register_fake
def _(*flat: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, kernel = flat[0], flat[-1]
    batch, _, heads, head_dim = query.shape
    dtype = reference.compute_dtype(query.dtype)
    return (
        query.new_empty(query.shape),
        # The fused kernels keep the state as bounded means, which fit the input's own dtype.
        query.new_empty((batch, heads, head_dim, head_dim), dtype=query.dtype if kernel == "triton" else dtype),
        query.new_empty((batch, heads, head_dim), dtype=dtype),
    )


@torch.library.custom_op(
    "flatten_diffusion::focused_linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor state, Tensor mean_key, bool weight_needs_grad, {FLAT_SCHEMA}, str kernel)"
    " -> Tensor[]",
)
def focused_linear_backward(
    grad_output: torch.Tensor, state: torch.Tensor, mean_key: torch.Tensor, weight_needs_grad: bool, *flat: Any
) -> list[torch.Tensor]:
    """Gradients of the flat tensors before the mask; an empty tensor where there is none."""
    *arguments, kernel = flat
    # Called under autocast too, which would undo the float32 accumulation.
    with torch.autocast(grad_output.device.type, enabled=False):
        grads = kernels_of(kernel).backward(
            FocusedArguments.from_flat(arguments), grad_output, state, mean_key, weight_needs_grad=weight_needs_grad
        )
    return [grad_output.new_empty(0) if grad is None else grad for grad in grads]


@focused_linear_backward.register_fake
def _(
    grad_output: torch.Tensor, state: torch.Tensor, mean_key: torch.Tensor, weight_needs_grad: bool, *flat: Any
) -> list[torch.Tensor]:
    return [grad_output.new_empty(0) if t is None else t.new_empty(t.shape) for t in flat[:DIFFERENTIABLE]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    *tensors, focusing_factor, grid, kernel = inputs
    ctx.save_for_backward(*tensors, output[1], output[2])
    ctx.settings = focusing_factor, grid, kernel
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad_output: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    *tensors, state, mean_key = ctx.saved_tensors
    if backward_needs_plain_torch():
        rest = tensors[DIFFERENTIABLE:], ctx.settings[:-1]

        def plain(*views: torch.Tensor | None) -> torch.Tensor:
            return reference.forward(FocusedArguments.from_flat((*views, *rest[0], *rest[1])))

        needed = ctx.needs_input_grad[:DIFFERENTIABLE]
        return (*differentiable_gradients(plain, tensors[:DIFFERENTIABLE], needed, grad_output), *[None] * 4)
    weight_needs_grad = ctx.needs_input_grad[FocusedArguments._fields.index("conv_weight") + 2]  # each map is a pair
    grads = focused_linear_backward(grad_output, state, mean_key, weight_needs_grad, *tensors, *ctx.settings)
    return (*(None if t is None else g for t, g in zip(tensors, grads, strict=False)), *[None] * 4)


focused_linear.register_autograd(_backward, setup_context=_setup_context)


def kernels_of(backend: str) -> ModuleType:
    """The module of a backend, imported where first used: a machine without triton never needs it."""
    if backend != "triton":
        return eager
    from . import triton

    return triton


def run(call: FocusedArguments, backend: str) -> torch.Tensor:
    """See `focused_linear_attention`; arguments are already checked."""
    if backend == "reference" or needs_plain_torch():
        return reference.forward(call)
    output: torch.Tensor = focused_linear(*call.flat(), backend)[0]
    return output
