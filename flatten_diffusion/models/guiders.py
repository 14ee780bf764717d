"""Guiders of diffusers that skip attention (layer skip, perturbed attention) look processors up by their class."""

from __future__ import annotations

try:
    from diffusers.hooks._helpers import AttentionProcessorRegistry
except ImportError:  # diffusers before 0.34 has no such guiders
    AttentionProcessorRegistry = None


def register_like(processor: type, native: type) -> None:
    """Let guiders treat a processor class of ours as they treat the native one; does nothing where they know none."""
    if AttentionProcessorRegistry is None:
        return
    try:
        metadata = AttentionProcessorRegistry.get(native)
    except (ValueError, ImportError):
        return
    AttentionProcessorRegistry.register(processor, metadata)
