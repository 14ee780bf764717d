"""Softmax within windows of an image, and what it takes to join it with linear attention beyond them."""

from .join import NO_KEY, join_far, join_windows
from .moments import KeyMoments, key_moments, score_moments, spread_of
from .partition import ImageSize, fits, from_windows, window_indices, windows_of

__all__ = [
    "NO_KEY",
    "ImageSize",
    "KeyMoments",
    "fits",
    "from_windows",
    "join_far",
    "join_windows",
    "key_moments",
    "score_moments",
    "spread_of",
    "window_indices",
    "windows_of",
]
