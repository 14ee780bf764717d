"""What results depend on, as digests: the parts of a pipeline, their weights and their settings."""

from __future__ import annotations

import json
from collections.abc import Collection
from itertools import chain
from typing import Any

from torch import nn

from ..files import sha256_of_tensors

_SAMPLES = 2**16
# Where something comes from and how it was written; no part of what it computes.
_ORIGIN = ("_", "transformers_version", "architectures", "dtype", "torch_dtype")


def component_digest(component: Any, without: Collection[nn.Parameter] = ()) -> str:
    """Hexadecimal sha256 over what a part of a pipeline computes with.

    A module's class, configuration, switches and LoRA strengths, and of every parameter (but those `without`) and
    buffer the name, shape, dtype and up to 65,536 values; a tokenizer's vocabulary, rules and special tokens; a
    scheduler's class and configuration.

    Raises:
        ValueError: weights that are on the meta device (offloaded) and cannot be read.
    """
    described: dict[str, Any] = {
        "class": type(component).__name__,
        "config": _settings(getattr(component, "config", None)),
    }
    if not isinstance(component, nn.Module):
        return sha256_of_tensors({}, _text({**described, **_tokenizer(component)}))
    described["tiled"] = getattr(component, "use_tiling", False)
    for name, module in component.named_modules():
        if isinstance(getattr(module, "scaling", None), dict):  # a layer of peft's
            states = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
            described[name] = [str(getattr(module, state, None)) for state in states]
    skipped = {id(parameter) for parameter in without}
    samples = {}
    for name, tensor in chain(component.named_parameters(), component.named_buffers()):
        if id(tensor) in skipped:
            continue
        if tensor.is_meta:
            raise ValueError(f"{type(component).__name__} is offloaded and its weights cannot be read: load it whole.")
        values = tensor.detach().flatten()
        described[name] = list(tensor.shape)
        samples[name] = values[:: max(1, len(values) // _SAMPLES)]
    return sha256_of_tensors(samples, _text(described))


def pipeline_settings(pipeline: Any) -> dict[str, Any]:
    """What a pipeline itself is set to, beside its parts."""
    own = {name: value for name, value in _settings(pipeline.config).items() if name not in pipeline.components}
    return {"class": type(pipeline).__name__, "labels": getattr(pipeline, "labels", None), **own}


def _settings(config: Any) -> dict[str, Any]:
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    return {name: value for name, value in values.items() if not str(name).startswith(_ORIGIN)}


def _tokenizer(component: Any) -> dict[str, Any]:
    """What decides the tokens; nothing for what is no tokenizer (or a processor around one)."""
    tokenizer = getattr(component, "tokenizer", component)
    if not hasattr(tokenizer, "get_vocab"):
        return {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # What stands before the tokens in a backend's text is the state of its last call.
    rules = "" if backend is None else backend.to_str().partition('"added_tokens"')[2]
    names = ("model_max_length", "padding_side", "special_tokens_map")
    settings = {name: str(getattr(tokenizer, name, None)) for name in names}
    return {**settings, "rules": rules, "vocabulary": sorted(tokenizer.get_vocab().items())}


def _text(described: dict[str, Any]) -> str:
    return json.dumps(described, sort_keys=True, default=str)
