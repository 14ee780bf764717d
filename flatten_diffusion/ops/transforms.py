"""When plain torch runs in the place of an operator of ours, so that no derivative is silently lost.

A fused operator, and a backward pass written out by hand, have one derivative: the gradient, once. All else is taken
from the operator's reference, which torch can differentiate in any mode and as often as one likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad


def needs_plain_torch() -> bool:
    """Whether derivatives are forward-mode, a transform of torch.func is under way, or torch.jit traces."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()


def backward_needs_plain_torch() -> bool:
    """The same of a backward pass; torch records it for a second derivative under create_graph."""
    return torch.is_grad_enabled() or needs_plain_torch()


def differentiable_gradients(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    tensors: Sequence[torch.Tensor | None],
    needed: Sequence[bool],
    grad_outputs: torch.Tensor | Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """Gradients of `function(*tensors)` that have gradients in turn, for such a backward pass."""
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    with torch.enable_grad(), torch.autocast(device_type, enabled=False):
        # Views, so that a tensor passed twice has the gradient of each place.
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        wanted = [view for view, need in zip(views, needed, strict=True) if view is not None and need]
        grads = iter(
            torch.autograd.grad(function(*views), wanted, grad_outputs, create_graph=True, materialize_grads=True)
        )
    return [next(grads) if view is not None and need else None for view, need in zip(views, needed, strict=True)]
