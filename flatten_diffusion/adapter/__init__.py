"""The whole life of a conversion: linearize, disabled, report, save, load, restore."""

from .config import AdapterConfig
from .convert import linearize, restore
from .files import load_adapter
from .handle import Adapter
from .report import LayerReport, Report

__all__ = ["Adapter", "AdapterConfig", "LayerReport", "Report", "linearize", "load_adapter", "restore"]
