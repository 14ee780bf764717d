"""What a large picture depends on: the request, the settings, and what the pipeline computes with."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..adapter.handle import ADAPTER, AdapterHandle
from ..distill.identity import component_digest, pipeline_settings
from ..models import LAYER, find_attention_layers
from .pipelines import denoisers
from .settings import HighRes, Size


@dataclass(frozen=True)
class Request:
    """What is drawn: prompt, negative prompt, guidance scale (None for the pipeline's own) and seed."""

    prompt: str
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    seed: int = 0

    def generator(self, stage: int) -> torch.Generator:
        """The stage's own noise, on the CPU: a stage that is drawn after a resume gets what it would have got."""
        digest = hashlib.sha256(f"{self.seed}/{stage}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:6], "big"))


def record_of(pipeline: Any, settings: HighRes, request: Request, sizes: tuple[Size, ...]) -> dict[str, Any]:
    """Everything that the pictures depend on but the machine, as JSON types: names to values.

    Parts of the pipeline are told apart by their classes, configurations and samples of their values.

    Raises:
        ValueError: weights that are offloaded to the meta device and cannot be read.
    """
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    return {
        **asdict(request),
        "sizes": [list(size) for size in sizes],
        "settings": {name: value for name, value in settings.to_dict().items() if name not in ("sizes", "target")},
        "pipeline": {name: str(value) for name, value in pipeline_settings(pipeline).items()},
        "dtype": str(pipeline.dtype),
        "parts": {name: component_digest(part) for name, part in sorted(parts.items())},
        "attention": {name: _attention(model) for name, model in denoisers(pipeline).items()},
    }


def _attention(model: Any) -> dict[str, Any]:
    """How a denoiser attends: its adapter's settings and whether they hold, and its processors."""
    handle: AdapterHandle | None = model.__dict__.get(ADAPTER)
    layers = find_attention_layers(model)
    states = [getattr(info.attn, LAYER, None) for info in layers]
    processors: list[Any] = [info.attn.processor for info in layers]
    return {
        "adapter": None if handle is None else handle.config.to_dict(),
        "disabled": any(state is not None and not state.enabled for state in states),
        "processors": sorted({f"{type(p).__name__} {getattr(p, 'settings', '')}".strip() for p in processors}),
    }
