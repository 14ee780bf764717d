"""Mixers: one file per mechanism, holding what one attention layer learns. Found by name in the registry."""

from .agent import AgentAttention, AgentCalibration, AgentConfig
from .angular import AngularAttention, AngularConfig
from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .calibration import CalibratedLayer, LayerCall, MixerInputs, Reduce, Statistic, Weights
from .elu import EluAttention, EluConfig
from .focused import FocusedCalibration, FocusedLinearAttention, FocusedLinearConfig
from .grid import Grid, count_tokens, describe_grid, images_of
from .hedgehog import HedgehogAttention, HedgehogConfig
from .inline import InLineAttention, InLineConfig
from .layer import LayerMixer
from .linfusion import LinFusionAttention, LinFusionConfig
from .mala import MalaAttention, MalaConfig
from .multi_scale import MultiScaleAttention, MultiScaleConfig
from .parts.deltas import PROJECTIONS, ProjectionDelta
from .parts.feature_maps import FeatureMap, LayerChoice
from .parts.shares import JoinInputs
from .parts.text import OtherTokens, TextJoin
from .parts.window import WindowAttention
from .polarity import PolarityAttention, PolarityConfig
from .pyramid import PyramidAttention, PyramidConfig
from .rala import RalaAttention, RalaConfig
from .registry import create_mixer, list_mixers, mixer_class, mixer_config, register_mixer, seeded
from .relu import ReluAttention, ReluConfig
from .taylor import TaylorAttention, TaylorConfig
from .vicinity import VicinityAttention, VicinityConfig

__all__ = [
    "PROJECTIONS",
    "AgentAttention",
    "AgentCalibration",
    "AgentConfig",
    "AngularAttention",
    "AngularConfig",
    "CalibratedLayer",
    "Calibration",
    "Context",
    "EluAttention",
    "EluConfig",
    "FeatureMap",
    "FocusedCalibration",
    "FocusedLinearAttention",
    "FocusedLinearConfig",
    "Grid",
    "HedgehogAttention",
    "HedgehogConfig",
    "InLineAttention",
    "InLineConfig",
    "JoinInputs",
    "LayerCall",
    "LayerChoice",
    "LayerMixer",
    "LayerShape",
    "LinFusionAttention",
    "LinFusionConfig",
    "MalaAttention",
    "MalaConfig",
    "Mixed",
    "Mixer",
    "MixerConfig",
    "MixerInputs",
    "MultiScaleAttention",
    "MultiScaleConfig",
    "OtherTokens",
    "PolarityAttention",
    "PolarityConfig",
    "ProjectionDelta",
    "PyramidAttention",
    "PyramidConfig",
    "RalaAttention",
    "RalaConfig",
    "Reduce",
    "ReluAttention",
    "ReluConfig",
    "Statistic",
    "TaylorAttention",
    "TaylorConfig",
    "TextJoin",
    "VicinityAttention",
    "VicinityConfig",
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
