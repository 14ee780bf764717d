"""Large pictures: the native size first, then stage by stage upsampled, noised part of the way, denoised again."""

from .memory import OneByOne, chunked_feed_forward, tiled_vae
from .pipelines import check_pipeline
from .rotary import ntk_rotary
from .settings import HighRes, staged_sizes
from .stages import Stage, generate_large, generate_stages

__all__ = [
    "HighRes",
    "OneByOne",
    "Stage",
    "check_pipeline",
    "chunked_feed_forward",
    "generate_large",
    "generate_stages",
    "ntk_rotary",
    "staged_sizes",
    "tiled_vae",
]
