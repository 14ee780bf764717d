"""Focused linear attention (Han et al., "FLatten Transformer", ICCV 2023): one public function, several backends."""

from .dispatch import BACKENDS, available_backends, call_dtype, focused_linear_attention, resolve_backend
from .distributed import even_rows, split_focused_linear_attention
from .reference import focused_feature_map

__all__ = [
    "BACKENDS",
    "available_backends",
    "call_dtype",
    "even_rows",
    "focused_feature_map",
    "focused_linear_attention",
    "resolve_backend",
    "split_focused_linear_attention",
]
