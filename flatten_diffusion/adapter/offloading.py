"""Whether accelerate or diffusers keeps a module's tensors elsewhere between passes."""

from __future__ import annotations

from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate or diffusers keeps the module's tensors elsewhere (on another device, on disk)."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False)) or is_group_offloaded(module)


def is_group_offloaded(module: nn.Module) -> bool:
    """Whether diffusers' group offloading moves the module's tensors, and those below it, in and out."""
    return "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
