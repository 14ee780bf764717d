"""What ties an adapter to the models it fits: a digest of the base model's parameter names and shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from torch import nn

from ..mixers import LayerMixer

# Added beside a base model's own parameters by peft (LoRA), fused projections and IP-Adapters.
_ADDED_PARTS = frozenset({"to_qkv", "to_kv", "to_added_qkv", "processor"})
_ADDED_CLASSES = frozenset({"MultiIPAdapterImageProjection"})


def fingerprint(model: nn.Module) -> str:
    """Hexadecimal sha256 over the class and the sorted (name, shape) of the base model's parameters.

    Values, dtype, device and configuration do not enter, so every fine-tune of a model has its fingerprint. Neither do
    adapters, LoRA layers, fused projections or IP-Adapters that are loaded at the moment.
    """
    lines = sorted(f"{name} {list(shape)}" for name, shape in _parameters(model))
    return hashlib.sha256("\n".join([class_name(model), *lines]).encode()).hexdigest()


def class_name(model: nn.Module) -> str:
    """Of the model as its author wrote it: sharding (FSDP2) derives classes of its own."""
    return next(cls.__name__ for cls in type(model).__mro__ if not cls.__module__.startswith("torch.distributed"))


def _parameters(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    skipped: list[str] = []
    for path, module in model.named_modules():
        parts = path.split(".")
        inside_skipped = any(path.startswith(prefix) for prefix in skipped)
        if inside_skipped or isinstance(module, LayerMixer) or type(module).__name__ in _ADDED_CLASSES:
            skipped.append(f"{path}.")
            continue
        added = _ADDED_PARTS.intersection(parts)
        if "to_qkv" in added and not hasattr(model.get_submodule(path.partition(".to_qkv")[0]), "to_q"):
            added = added - {"to_qkv"}  # the layer's only projection, not a fused copy
        if added or any(part.startswith("lora_") for part in parts):
            continue
        name = ".".join(part for part in parts if part != "base_layer")
        for parameter_name, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{parameter_name}", _shape(module, parameter_name, parameter)


def _shape(module: nn.Module, name: str, parameter: nn.Parameter) -> tuple[int, ...]:
    out_features, in_features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if name == "weight" and isinstance(out_features, int) and isinstance(in_features, int):
        return out_features, in_features  # quantised weights are packed into another shape
    return tuple(parameter.shape)
