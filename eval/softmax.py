"""The softmax backends of PyTorch that a device can have."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend


def sdpa_backends(device: torch.device) -> dict[str, SDPBackend]:
    """Backends of scaled_dot_product_attention by name; one that does not run at a shape says so when it is tried."""
    found = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if device.type == "cuda":
        found |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return found
