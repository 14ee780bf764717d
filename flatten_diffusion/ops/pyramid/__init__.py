"""Softmax over near keys as they are and far ones as means: linear in the tokens, and exact as cells shrink."""

from .attention import pyramid_attention
from .layout import Cells, keys_per_query
from .reference import pyramid_attention_reference

__all__ = ["Cells", "keys_per_query", "pyramid_attention", "pyramid_attention_reference"]
