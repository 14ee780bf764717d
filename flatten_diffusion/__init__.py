"""Focused linear attention in place of the softmax self-attention of diffusers models, in one reversible step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Where each public name lives: loaded at first use, so that `import flatten_diffusion` does not pay for diffusers.
_PUBLIC = {
    "AdapterConfig": "adapter",
    "AgentConfig": "mixers",
    "FocusedLinearAttnProcessor": "models",
    "FocusedLinearConfig": "mixers",
    "PyramidConfig": "mixers",
    "focused_linear_attention": "ops",
    "linearize": "adapter",
    "list_mixers": "mixers",
    "load_adapter": "adapter",
    "restore": "adapter",
}

__all__ = [
    "AdapterConfig",
    "AgentConfig",
    "FocusedLinearAttnProcessor",
    "FocusedLinearConfig",
    "PyramidConfig",
    "__version__",
    "focused_linear_attention",
    "linearize",
    "list_mixers",
    "load_adapter",
    "restore",
]

if TYPE_CHECKING:
    from .adapter import AdapterConfig, linearize, load_adapter, restore
    from .mixers import AgentConfig, FocusedLinearConfig, PyramidConfig, list_mixers
    from .models import FocusedLinearAttnProcessor
    from .ops import focused_linear_attention


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
