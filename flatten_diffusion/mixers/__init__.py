"""Mixers: one module per mechanism, holding what one attention layer learns. Found by name in the registry."""

from .base import Mixer, MixerSpec, create_mixer, list_mixers, register_mixer
from .deltas import PROJECTIONS, ProjectionDelta
from .focused import FocusedLinearAttention

__all__ = [
    "PROJECTIONS",
    "FocusedLinearAttention",
    "Mixer",
    "MixerSpec",
    "ProjectionDelta",
    "create_mixer",
    "list_mixers",
    "register_mixer",
]
