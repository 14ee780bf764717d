"""Attention operators: pure functions on query, key and value of shape [B, N, H, D]. Nothing here knows diffusers."""

from .focused_linear import (
    BACKENDS,
    available_backends,
    call_dtype,
    even_rows,
    focused_feature_map,
    focused_linear_attention,
    resolve_backend,
    split_focused_linear_attention,
)

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
