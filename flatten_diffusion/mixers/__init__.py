"""Mixers: one module per mechanism, holding what one attention layer learns. Found by name in the registry."""

from .base import Mixer, MixerSpec, create_mixer, list_mixers, register_mixer
from .deltas import PROJECTIONS, ProjectionDelta
from .focused import FeatureMap, FocusedLinearAttention
from .grid import Grid, count_tokens, describe_grid, pictures_of
from .joint import GatedBranches, JointAttention, SharedNormalizer, list_joints
from .window import WindowAttention

__all__ = [
    "PROJECTIONS",
    "FeatureMap",
    "FocusedLinearAttention",
    "Grid",
    "GatedBranches",
    "JointAttention",
    "Mixer",
    "MixerSpec",
    "ProjectionDelta",
    "SharedNormalizer",
    "WindowAttention",
    "count_tokens",
    "create_mixer",
    "describe_grid",
    "list_joints",
    "list_mixers",
    "pictures_of",
    "register_mixer",
]
