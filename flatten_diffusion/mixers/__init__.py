"""Mixers: one module per mechanism, holding what one attention layer learns. Found by name in the registry."""

from .base import (
    Grid,
    Mixer,
    MixerSpec,
    count_tokens,
    create_mixer,
    describe_grid,
    list_mixers,
    pictures_of,
    register_mixer,
)
from .deltas import PROJECTIONS, ProjectionDelta
from .focused import FeatureMap, FocusedLinearAttention
from .joint import GatedBranches, JointAttention, SharedNormalizer, list_joints

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
    "count_tokens",
    "create_mixer",
    "describe_grid",
    "list_joints",
    "list_mixers",
    "pictures_of",
    "register_mixer",
]
