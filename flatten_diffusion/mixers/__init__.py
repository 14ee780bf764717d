"""Mixers: one file per mechanism, holding what one attention layer learns. Found by name in the registry."""

from .agent import AgentAttention, AgentCalibration, AgentConfig
from .angular import AngularAttention, AngularConfig
from .base import Calibration, Context, LayerShape, Mixed, Mixer, MixerConfig
from .block_grid import BlockGridAttention, BlockGridConfig
from .calibration import CalibratedLayer, LayerCall, MixerInputs, Reduce, Statistic, Weights
from .elu import EluAttention, EluConfig
from .focused import FocusedCalibration, FocusedLinearAttention, FocusedLinearConfig
from .global_query import GlobalQueryAttention, GlobalQueryConfig
from .grid import Grid, count_tokens, describe_grid, images_of
from .hedgehog import HedgehogAttention, HedgehogConfig
from .inline import InLineAttention, InLineConfig
from .inward_window import InwardWindowAttention, InwardWindowConfig
from .layer import LayerMixer
from .linfusion import LinFusionAttention, LinFusionConfig
from .long_short import LongShortAttention, LongShortConfig
from .lookup import LookupAttention, LookupConfig
from .mala import MalaAttention, MalaConfig
from .multi_scale import MultiScaleAttention, MultiScaleConfig
from .neighborhood import NeighborhoodAttention, NeighborhoodConfig
from .outlook import OutlookAttention, OutlookConfig
from .parts.deltas import PROJECTIONS, ProjectionDelta
from .parts.feature_maps import FeatureMap, LayerChoice
from .parts.shares import JoinInputs
from .parts.text import OtherTokens, TextJoin
from .parts.window import WindowAttention
from .polarity import PolarityAttention, PolarityConfig
from .positional import PositionalAttention, PositionalConfig
from .pyramid import PyramidAttention, PyramidConfig
from .rala import RalaAttention, RalaConfig
from .registry import create_mixer, list_mixers, mixer_class, mixer_config, register_mixer, seeded
from .relu import ReluAttention, ReluConfig
from .routing import RoutingAttention, RoutingConfig
from .self_guided import SelfGuidedAttention, SelfGuidedConfig
from .semantic_token import SemanticTokenAttention, SemanticTokenConfig
from .soft import SoftAttention, SoftConfig
from .super_token import SuperTokenAttention, SuperTokenConfig
from .taylor import TaylorAttention, TaylorConfig
from .token_merge import TokenMergeAttention, TokenMergeConfig
from .vicinity import VicinityAttention, VicinityConfig
from .window import ShiftedWindowAttention, WindowConfig

__all__ = [
    "PROJECTIONS",
    "AgentAttention",
    "AgentCalibration",
    "AgentConfig",
    "AngularAttention",
    "AngularConfig",
    "BlockGridAttention",
    "BlockGridConfig",
    "CalibratedLayer",
    "Calibration",
    "Context",
    "EluAttention",
    "EluConfig",
    "FeatureMap",
    "FocusedCalibration",
    "FocusedLinearAttention",
    "FocusedLinearConfig",
    "GlobalQueryAttention",
    "GlobalQueryConfig",
    "Grid",
    "HedgehogAttention",
    "HedgehogConfig",
    "InLineAttention",
    "InLineConfig",
    "InwardWindowAttention",
    "InwardWindowConfig",
    "JoinInputs",
    "LayerCall",
    "LayerChoice",
    "LayerMixer",
    "LayerShape",
    "LinFusionAttention",
    "LinFusionConfig",
    "LongShortAttention",
    "LongShortConfig",
    "LookupAttention",
    "LookupConfig",
    "MalaAttention",
    "MalaConfig",
    "Mixed",
    "Mixer",
    "MixerConfig",
    "MixerInputs",
    "MultiScaleAttention",
    "MultiScaleConfig",
    "NeighborhoodAttention",
    "NeighborhoodConfig",
    "OtherTokens",
    "OutlookAttention",
    "OutlookConfig",
    "PolarityAttention",
    "PolarityConfig",
    "PositionalAttention",
    "PositionalConfig",
    "ProjectionDelta",
    "PyramidAttention",
    "PyramidConfig",
    "RalaAttention",
    "RalaConfig",
    "Reduce",
    "ReluAttention",
    "ReluConfig",
    "RoutingAttention",
    "RoutingConfig",
    "SelfGuidedAttention",
    "SelfGuidedConfig",
    "SemanticTokenAttention",
    "SemanticTokenConfig",
    "ShiftedWindowAttention",
    "SoftAttention",
    "SoftConfig",
    "Statistic",
    "SuperTokenAttention",
    "SuperTokenConfig",
    "TaylorAttention",
    "TaylorConfig",
    "TextJoin",
    "TokenMergeAttention",
    "TokenMergeConfig",
    "VicinityAttention",
    "VicinityConfig",
    "Weights",
    "WindowAttention",
    "WindowConfig",
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
