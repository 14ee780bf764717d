"""The whole life of a conversion: linearize, disabled, report, save, load, restore."""

from .adapter import Adapter
from .config import AdapterConfig
from .convert import linearize, resolve_model, restore
from .loading import load_adapter
from .report import LayerReport, Report

__all__ = [
    "Adapter",
    "AdapterConfig",
    "LayerReport",
    "Report",
    "linearize",
    "load_adapter",
    "resolve_model",
    "restore",
]
