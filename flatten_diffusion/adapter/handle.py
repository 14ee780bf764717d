"""The small handle that saving, merging, splitting and reporting work on: a converted model and its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..mixers import (
    PROJECTIONS,
    LayerMixer,
    LayerShape,
    Mixer,
    MixerConfig,
    ProjectionDelta,
    create_mixer,
    mixer_config,
    seeded,
)
from ..models import (
    LAYER,
    MIXER,
    ConvertedLayer,
    FocusedLinearAttnProcessor,
    WrappedProcessor,
    find_projection,
    heads_of,
    inner_dim_of,
)
from .config import AdapterConfig

ADAPTER = "flatten_adapter"
"""Attribute of a converted model: its `Adapter`. A deep copy of the model carries its own."""

OURS = (FocusedLinearAttnProcessor, WrappedProcessor)
"""The processors that a conversion puts on layers."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class AdapterHandle:
    """A converted model, its config, and the parts that the conversion added to its layers.

    It belongs to one model and is usable until `restore`. Layers are named by the path of their attention module.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, layers: Iterable[str]) -> None:
        self._config = config
        self._model: nn.Module | None = model
        self._layers = list(layers)

    @property
    def model(self) -> nn.Module:
        """The converted model. Raises RuntimeError after `restore`."""
        if self._model is None:
            raise RuntimeError("restore() took this adapter off its model: call linearize or load_adapter again.")
        return self._model

    @property
    def config(self) -> AdapterConfig:
        """The settings as they are now: layers whose mixer differs from the common one stand in `overrides`."""
        if self._model is None:
            return self._config
        common = mixer_config(self._config.mixer)
        own = {name: mixer.config for name, mixer in self.mixers() if mixer.config != common}
        return replace(self._config, overrides=own)

    @property
    def layers(self) -> list[str]:
        """Paths of the converted attention modules."""
        return list(self._layers)

    def attention_modules(self) -> Iterator[tuple[str, Any]]:
        """(path, attention module) of every converted layer."""
        for name in self._layers:
            yield name, self.model.get_submodule(name)

    def converted_layers(self) -> Iterator[tuple[Any, ConvertedLayer, LayerMixer]]:
        """(attention module, its state, what it carries) of every converted layer."""
        for _, attn in self.attention_modules():
            yield attn, getattr(attn, LAYER), getattr(attn, MIXER)

    def layer_mixers(self) -> Iterator[tuple[str, LayerMixer]]:
        """(path of the attention module, what the conversion added to it) of every converted layer."""
        for name, attn in self.attention_modules():
            yield name, getattr(attn, MIXER)

    def mixers(self) -> Iterator[tuple[str, Mixer]]:
        """(path of the attention module, its mechanism) of every converted layer."""
        for name, layer in self.layer_mixers():
            yield name, layer.mixer

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The learned parameters, named by attention path and parameter: the keys of the saved file."""
        for layer, mixer in self.layer_mixers():
            for name, parameter in mixer.named_parameters():
                yield f"{layer}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The learned parameters; none of the base model's."""
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Detached parameters and buffers by the keys of the saved file, sharing memory with the model."""
        return {
            f"{layer}.{name}": tensor
            for layer, mixer in self.layer_mixers()
            for name, tensor in mixer.state_dict().items()
        }

    def add_deltas(self, names: Iterable[str], rank: int | None = None) -> None:
        """Let the projections `names` (out of "q", "k", "v", "out") of every layer learn an addition.

        New ones add nothing yet; those already there are kept. `rank`: of LoRA factors, None for full matrices; it
        must be the one in use where the adapter has deltas. The config says so from then on.

        Raises:
            ValueError: an unknown projection, or another rank than the adapter's.
        """
        if self._config.deltas and rank != self._config.delta_rank:
            raise ValueError(f"The adapter's deltas have rank {self._config.delta_rank}, not {rank}: keep one rank.")
        self._config = replace(self._config, deltas=(*self._config.deltas, *names), delta_rank=rank)
        for name, attn in self.attention_modules():
            add_deltas(name, attn, getattr(attn, MIXER), self._config)

    def reconfigure(self, config: AdapterConfig) -> None:
        """Give every layer a fresh mixer, and fresh deltas, of `config`, which converts the same layers as this one."""
        self._config = config
        for name, attn in self.attention_modules():
            training, grads = attn.training, next((p.requires_grad for p in getattr(attn, MIXER).parameters()), True)
            text = getattr(attn, LAYER).place != "alone"
            setattr(attn, MIXER, build_layer(name, attn, text, config).train(training).requires_grad_(grads))


def build_layer(name: str, attn: Any, text: bool, config: AdapterConfig) -> LayerMixer:
    """What a layer is to carry, fresh: on the layer's device and in its dtype; nothing is attached yet."""
    weight, dtype = place_of(attn)
    mixer: MixerConfig = config.mixer_of(name)
    layer = LayerMixer(create_mixer(mixer, shape_of(attn), seed=name), shape_of(attn), window=config.window, text=text)
    layer.to(device=weight, dtype=dtype)
    add_deltas(name, attn, layer, config)
    return layer


def add_deltas(name: str, attn: Any, layer: LayerMixer, config: AdapterConfig) -> None:
    """Give a layer the projection deltas of `config` that it lacks; they add nothing yet.

    A layer without such a projection of its own (Flux's single streams leave "out" to the block) goes without.
    """
    like = next(layer.parameters(), None)
    device, dtype = place_of(attn) if like is None else (like.device, like.dtype)
    for key in config.deltas:
        projection = find_projection(attn, key)
        if key in layer.deltas or projection is None:
            continue
        with seeded(f"{name}.{key}"):
            delta = ProjectionDelta(projection.in_features(attn), projection.out_features(attn), config.delta_rank)
        layer.deltas[key] = delta.to(device=device, dtype=dtype)
    # Always in this order, whatever came first: parameter order decides rounding in sums over all of them.
    layer.deltas = nn.ModuleDict({key: layer.deltas[key] for key in PROJECTIONS if key in layer.deltas})


def place_of(attn: Any) -> tuple[torch.device, torch.dtype]:
    """Where a layer computes, and in which dtype."""
    query = find_projection(attn, "q")
    assert query is not None, "every layer of a known family has a query projection"
    weight = query.module(attn).weight
    # Quantised and float8-stored weights do not tell the dtype that the layer computes in.
    dtype = weight.dtype if weight.dtype in _FLOATS else None
    if dtype is None:
        dtype = next((p.dtype for p in attn.parameters() if p.dtype in _FLOATS), torch.float32)
    return weight.device, dtype


def shape_of(attn: Any) -> LayerShape:
    """Heads, their size, and the width of the layer's input."""
    query = find_projection(attn, "q")
    assert query is not None, "every layer of a known family has a query projection"
    heads = heads_of(attn)
    return LayerShape(heads, inner_dim_of(attn) // heads, query.in_features(attn))
