"""Attention operators: pure functions on query, key and value of shape [B, N, H, D]. Nothing here knows diffusers."""

from .focused_linear import BACKENDS, available_backends, focused_feature_map, focused_linear_attention, resolve_backend

__all__ = [
    "BACKENDS",
    "available_backends",
    "focused_feature_map",
    "focused_linear_attention",
    "resolve_backend",
]
