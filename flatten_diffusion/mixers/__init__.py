"""Mixers: one file per mechanism, holding what one attention layer learns. Found by name in the registry."""

from .agent import AgentAttention, AgentCalibration, AgentConfig
from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .calibration import CalibratedLayer, LayerCall, MixerInputs, Reduce, Statistic, Weights
from .focused import FocusedCalibration, FocusedLinearAttention, FocusedLinearConfig
from .grid import Grid, count_tokens, describe_grid, images_of
from .layer import LayerMixer
from .parts.deltas import PROJECTIONS, ProjectionDelta
from .parts.feature_maps import FeatureMap, LayerChoice
from .parts.shares import JoinInputs
from .parts.text import OtherTokens, TextJoin
from .parts.window import WindowAttention
from .pyramid import PyramidAttention, PyramidConfig
from .registry import create_mixer, list_mixers, mixer_class, mixer_config, register_mixer, seeded

__all__ = [
    "PROJECTIONS",
    "AgentAttention",
    "AgentCalibration",
    "AgentConfig",
    "CalibratedLayer",
    "Calibration",
    "Context",
    "FeatureMap",
    "FocusedCalibration",
    "FocusedLinearAttention",
    "FocusedLinearConfig",
    "Grid",
    "JoinInputs",
    "LayerCall",
    "LayerChoice",
    "LayerMixer",
    "LayerShape",
    "Mixed",
    "Mixer",
    "MixerConfig",
    "MixerInputs",
    "OtherTokens",
    "ProjectionDelta",
    "PyramidAttention",
    "PyramidConfig",
    "Reduce",
    "Statistic",
    "TextJoin",
    "Weights",
    "WindowAttention",
    "count_tokens",
    "create_mixer",
    "describe_grid",
    "images_of",
    "list_mixers",
    "mixer_class",
    "mixer_config",
    "register_mixer",
    "seeded",
]
