"""Whether accelerate or diffusers keeps a module's tensors elsewhere between passes."""

from __future__ import annotations

from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook on the module keeps its tensors elsewhere (on another device, on disk)."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False)) or _leads_a_group(module)


def is_offloaded_in_groups(model: nn.Module) -> bool:
    """Whether diffusers' group offloading moves parts of the model in and out; its hooks may sit on whole blocks."""
    return any(_leads_a_group(module) for module in model.modules())


def _leads_a_group(module: nn.Module) -> bool:
    return "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
