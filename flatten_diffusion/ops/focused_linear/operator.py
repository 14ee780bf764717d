"""The operator as torch sees it: one node with a fake and a backward, whichever kernel computes it.

torch.compile, AOT autograd, checkpointing and fake tensors never look inside, so a graph stays whole and the blocks of
`eager` are not unrolled into it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from . import eager
from .reference import HeadMap, head_map_of

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? scale, Tensor? query_weight, Tensor? query_bias, "
    "Tensor? key_weight, Tensor? key_bias, Tensor? conv_weight, Tensor? conv_bias, Tensor? key_mask"
)
_SETTINGS = "float power, int[] grid, str kernel"
_CONV_WEIGHT, _KEY_MASK = 8, 10  # their places among the tensors


@torch.library.custom_op(
    "flatten_diffusion::focused_linear",
    mutates_args=(),
    schema=f"({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def focused_linear(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    power: float,
    grid: list[int],
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [B, N, H, D], state [B, H, D, D] and mean key [B, H, D]; the last two are what the backward reuses."""
    run = _triton().forward if kernel == "triton" else eager.forward
    return run(
        query, key, value, _dense(scale), head_map_of(_dense(query_weight), _dense(query_bias)),
        head_map_of(_dense(key_weight), _dense(key_bias)), _dense(conv_weight), _dense(conv_bias), key_mask, power,
        _pair(grid),
    )  # fmt: skip


@focused_linear.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    power: float,
    grid: list[int],
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, _, heads, head_dim = query.shape
    dtype = eager.compute_dtype(query.dtype)
    return (
        query.new_empty(query.shape),
        # The fused kernels keep the state as bounded means, which fit the input's own dtype.
        query.new_empty((batch, heads, head_dim, head_dim), dtype=query.dtype if kernel == "triton" else dtype),
        query.new_empty((batch, heads, head_dim), dtype=dtype),
    )


@torch.library.custom_op(
    "flatten_diffusion::focused_linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, {_TENSORS}, Tensor state, Tensor mean_key, {_SETTINGS}, bool weight_needs_grad)"
    " -> Tensor[]",
)
def focused_linear_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    state: torch.Tensor,
    mean_key: torch.Tensor,
    power: float,
    grid: list[int],
    kernel: str,
    weight_needs_grad: bool,
) -> list[torch.Tensor]:
    """Gradients of the tensors before `key_mask`, in their order; an empty tensor where there is none."""
    run = _triton().backward if kernel == "triton" else eager.backward
    # Called under autocast too, which would undo the float32 accumulation.
    with torch.autocast(query.device.type, enabled=False):
        grads = run(
            grad_output, query, key, value, _dense(scale), head_map_of(_dense(query_weight), _dense(query_bias)),
            head_map_of(_dense(key_weight), _dense(key_bias)), _dense(conv_weight), _dense(conv_bias), key_mask, state,
            mean_key, power, _pair(grid), weight_needs_grad,
        )  # fmt: skip
    return [query.new_empty(0) if grad is None else grad for grad in grads]


@focused_linear_backward.register_fake
def _(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    state: torch.Tensor,
    mean_key: torch.Tensor,
    power: float,
    grid: list[int],
    kernel: str,
    weight_needs_grad: bool,
) -> list[torch.Tensor]:
    tensors = (query, key, value, scale, query_weight, query_bias, key_weight, key_bias, conv_weight, conv_bias)
    return [query.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    *tensors, power, grid, kernel = inputs
    ctx.save_for_backward(*tensors, output[1], output[2])
    ctx.power, ctx.grid, ctx.kernel = power, grid, kernel
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad_output: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = focused_linear_backward(
        grad_output, *tensors, ctx.power, ctx.grid, ctx.kernel, ctx.needs_input_grad[_CONV_WEIGHT]
    )  # fmt: skip
    return (*(None if t is None else g for t, g in zip(tensors[:_KEY_MASK], grads, strict=True)), *[None] * 4)


focused_linear.register_autograd(_backward, setup_context=_setup_context)


def _triton() -> ModuleType:
    """Imported where first used: a machine without triton never needs it."""
    from . import triton

    return triton


def _dense(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A small learned parameter as the kernels index it."""
    return None if parameter is None else parameter.contiguous()


def _pair(grid: list[int]) -> tuple[int, int]:
    """(height, width); (0, 0) where nothing needs a grid."""
    return (grid[0], grid[1]) if grid else (0, 0)


def focused_linear_attention_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    focusing_factor: float,
    scale: torch.Tensor | None,
    query_map: HeadMap | None,
    key_map: HeadMap | None,
    conv_weight: torch.Tensor | None,
    conv_bias: torch.Tensor | None,
    grid: tuple[int, int] | None,
    key_mask: torch.Tensor | None,
    kernel: str,
) -> torch.Tensor:
    """See `focused_linear_attention`; arguments are already checked. Differentiable once."""
    size = [] if grid is None or conv_weight is None else list(grid)
    return focused_linear(
        query, key, value, scale, *(query_map or (None, None)), *(key_map or (None, None)), conv_weight, conv_bias,
        key_mask, float(focusing_factor), size, kernel,
    )[0]  # fmt: skip
