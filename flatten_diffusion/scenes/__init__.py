"""The embedded default: two small trained text-to-image pipelines, the renderer they learned from, and its checker."""

from .check import Fact, check, fact_accuracy
from .grammar import is_held_out, parse, sample_captions
from .pipeline import (
    ADAPTER_DIR,
    PIPELINE_DIR,
    PIPELINES,
    SD3_ADAPTER_DIR,
    SD3_PIPELINE_DIR,
    load_embedded,
    load_scenes_pipeline,
    load_sd3_scenes_pipeline,
)
from .render import render

__all__ = [
    "ADAPTER_DIR",
    "PIPELINES",
    "PIPELINE_DIR",
    "SD3_ADAPTER_DIR",
    "SD3_PIPELINE_DIR",
    "Fact",
    "check",
    "fact_accuracy",
    "is_held_out",
    "load_embedded",
    "load_scenes_pipeline",
    "load_sd3_scenes_pipeline",
    "parse",
    "render",
    "sample_captions",
]
