"""Transfer: each converted layer learns the teacher's answer to the teacher's input, all layers in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..adapter import Adapter
from .capture import LayerCapture, capture_teacher
from .objective import relative_error


def transfer_step(
    adapter: Adapter,
    run_teacher: Callable[[], Any],
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
) -> dict[str, torch.Tensor]:
    """Add one batch's gradients to the adapter's parameters.

    While the teacher runs (without gradients), each converted layer is asked the same question, and the gradient of
    its own relative squared error is taken at once: no backward pass through the network, no activations kept beyond
    one layer's. A layer's error counts relative to the variance of what the attention adds, so that none dominates.

    Args:
        adapter: of the model.
        run_teacher: one forward pass of the model.
        backward: takes the gradient of a loss; `Accelerator.backward`, for instance.

    Returns:
        Each layer's relative error, detached. Layers that stayed softmax in this pass are absent.
    """
    losses: dict[str, torch.Tensor] = {}

    def consume(call: LayerCapture) -> None:
        with torch.enable_grad():
            answer = call.student()
            if not answer.requires_grad:  # softmax in this pass
                return
            residual = call.hidden_states if getattr(call.attn, "residual_connection", False) else None
            wanted = call.output if residual is None else call.output - residual / call.attn.rescale_output_factor
            answer = answer if residual is None else answer - residual / call.attn.rescale_output_factor
            loss = relative_error(answer, wanted)
            backward(loss)
        losses[call.name] = loss.detach()

    with torch.no_grad(), capture_teacher(adapter, consume):
        run_teacher()
    return losses
