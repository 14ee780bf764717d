"""The embedded default: a small trained text-to-image pipeline, the renderer it learned from, and its checker."""

from .check import Fact, check, fact_accuracy
from .grammar import is_held_out, parse, sample_captions
from .pipeline import ADAPTER_DIR, PIPELINE_DIR, load_scenes_pipeline
from .render import render

__all__ = [
    "ADAPTER_DIR",
    "PIPELINE_DIR",
    "Fact",
    "check",
    "fact_accuracy",
    "is_held_out",
    "load_scenes_pipeline",
    "parse",
    "render",
    "sample_captions",
]
