"""The handle of a conversion."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..mixers import FocusedLinearAttention, Grid, Mixer, count_tokens
from ..models import (
    AUTO,
    LAYER,
    MIXER,
    ConvertedLayer,
    Finding,
    FocusedLinearAttnProcessor,
    ReboundProcessor,
    known_ratio,
    place_of,
    survey,
)
from ..models.readings import PINNED
from ..ops import BACKENDS
from .config import AdapterConfig
from .fingerprint import fingerprint
from .report import LayerReport, Report

ADAPTER = "flatten_adapter"
"""Attribute of a converted model: its `Adapter`. A deep copy of the model carries its own."""

OURS = (FocusedLinearAttnProcessor, ReboundProcessor)
"""The processors that a conversion puts on layers."""


class Adapter:
    """What `linearize` and `load_adapter` return: the learned part of a converted model and the switch for it.

    It belongs to one model and is usable until `restore`. Layers are named by the path of their attention module.
    """

    def __init__(
        self, model: nn.Module, config: AdapterConfig, mixers: Mapping[str, Mixer], originals: Mapping[str, Any]
    ) -> None:
        self.config = config
        self.originals = dict(originals)
        self._model: nn.Module | None = model
        self._layers = list(mixers)
        self._disabled = 0
        self._merged: list[Any] = []
        self._base_fingerprint = ""

    @property
    def model(self) -> nn.Module:
        """The converted model. Raises RuntimeError after `restore`."""
        if self._model is None:
            raise RuntimeError("restore() took this adapter off its model: call linearize or load_adapter again.")
        return self._model

    @property
    def layers(self) -> list[str]:
        """Paths of the converted attention modules."""
        return list(self._layers)

    def attention_modules(self) -> Iterator[tuple[str, Any]]:
        """(path, attention module) of every converted layer."""
        for name in self._layers:
            yield name, self.model.get_submodule(name)

    def mixers(self) -> Iterator[tuple[str, Mixer]]:
        """(path of the attention module, its mixer) of every converted layer."""
        for name, attn in self.attention_modules():
            yield name, getattr(attn, MIXER)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The learned parameters, named by attention path and parameter: the keys of the saved file."""
        for layer, mixer in self.mixers():
            for name, parameter in mixer.named_parameters():
                yield f"{layer}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The learned parameters; none of the base model's."""
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Detached parameters and buffers by the keys of the saved file, sharing memory with the model."""
        return {
            f"{layer}.{name}": tensor for layer, mixer in self.mixers() for name, tensor in mixer.state_dict().items()
        }

    def requires_grad_(self, requires_grad: bool = True) -> Adapter:
        """Let gradients reach the learned parameters or not; the base model is left as it is."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def add_deltas(self, names: Iterable[str], rank: int | None = None) -> None:
        """Let the projections `names` (out of "q", "k", "v", "out") of every layer learn an addition.

        New ones add nothing yet; those already there are kept. `rank`: of LoRA factors, None for full matrices; it
        must be the one in use where the adapter has deltas. The config says so from then on.

        Raises:
            ValueError: an unknown projection, or another rank than the adapter's.
        """
        from .convert import add_deltas  # convert makes adapters, and needs this module

        if self.config.deltas and rank != self.config.delta_rank:
            raise ValueError(f"The adapter's deltas have rank {self.config.delta_rank}, not {rank}: keep one rank.")
        self.config = replace(self.config, deltas=(*self.config.deltas, *names), delta_rank=rank)
        for _, attn in self.attention_modules():
            add_deltas(attn, getattr(attn, MIXER), self.config)

    def add_feature_maps(self, layers: Iterable[str]) -> None:
        """Let queries and keys of `layers` (attention paths) learn a map inside the mixer, see
        `flatten_diffusion.mixers.FeatureMap`.

        New ones change nothing yet; those already there are kept. The config says so from then on.

        Raises:
            ValueError: a layer that is not converted, or whose mixer has no such maps.
        """
        wanted, mixers = list(layers), dict(self.mixers())
        for name in wanted:
            mixer = mixers.get(name)
            if not isinstance(mixer, FocusedLinearAttention):
                raise ValueError(f"{name}: no layer converted to focused linear attention, so it has no feature maps.")
            mixer.add_feature_maps()
        kept = [name for name in self.config.feature_maps if name not in wanted]
        self.config = replace(self.config, feature_maps=(*kept, *wanted))

    def set_focusing_factor(self, layer: str, focusing_factor: float) -> None:
        """Give one converted layer its own power; the config says so from then on. Raises ValueError when not > 0."""
        powers = {**self.config.focusing_factors, layer: focusing_factor}
        config = replace(self.config, focusing_factors=powers)
        mixer = dict(self.mixers())[layer]
        mixer.spec = replace(mixer.spec, focusing_factor=focusing_factor)
        self.config = config

    def merge(self) -> None:
        """Fold the projection deltas into the base weights: the same outputs up to rounding, without their cost.

        Until `unmerge`, the model carries no bit-exact original, so `disabled` refuses; `restore` unmerges first. The
        weights replaced stay in memory. `save_pretrained` saves the adapter as before.

        Raises:
            RuntimeError: merged already, or inside `disabled`.
            ValueError: nothing to merge, fused or quantised projections, or `min_tokens` is set (smaller calls stay
                softmax and need the base weights). Nothing is changed then.
        """
        from .merge import merge  # merge needs this module

        if self._merged:
            raise RuntimeError("The adapter is merged already.")
        if self._disabled:
            raise RuntimeError("The adapter is disabled: call merge() outside disabled().")
        base = fingerprint(self.model)
        self._merged = merge(self)
        self._base_fingerprint = base

    def base_fingerprint(self) -> str:
        """`fingerprint` of the model without this adapter; a merge may add biases, which are left out."""
        return self._base_fingerprint if self._merged else fingerprint(self.model)

    def unmerge(self) -> None:
        """Take the deltas out again: the very base weights come back, bit for bit. Does nothing when not merged."""
        from .merge import unmerge  # merge needs this module

        unmerge(self, self._merged)
        self._merged = []

    def set_backend(self, backend: str) -> None:
        """Compute with this backend of `focused_linear_attention` from now on. Raises ValueError for an unknown one."""
        if backend not in BACKENDS:
            raise ValueError(f"Unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
        for _, mixer in self.mixers():
            mixer.backend = backend
            if mixer.window is not None:
                mixer.window.backend = backend

    def pin_grid(self, grid: Grid | None) -> None:
        """Tell graphs that are compiled whole (`fullgraph=True`) the size of the picture, where they cannot see it.

        Flux, Flux2 and Chroma are told a picture's shape only as numbers on the device, which a graph cannot turn into
        sizes; uncompiled code and graphs that may break read them there and ignore this. Other models need no pin.

        Args:
            grid: (height, width) in tokens of the passes to come, or one (1, height, width) per picture where
                reference images follow; None takes the pin away. A pass of another grid fails on the device.
        """
        if grid is None:
            self.model.__dict__.pop(PINNED, None)
        else:
            count_tokens(grid)
            self.model.__dict__[PINNED] = grid

    def token_parallel(self, group: Any = None) -> AbstractContextManager[nn.Module]:
        """Inside, the tokens of each picture are split by rows over the processes of a `torch.distributed` group.

        For one image beyond one device's memory: every process calls the model with the same, whole inputs and gets
        the same, whole output, but between patch embedding and output projection it holds its own rows only. All that
        travels per layer is the sum of one [D, D] state per head, and the rows next to a cut for the convolution; the
        output is that of one process up to rounding.

            with adapter.token_parallel(), torch.inference_mode():  # under torchrun, one process per device
                image = pipe(prompt, height=8192, width=8192).images[0]

        For inference, and for models that are transformers over one picture's patches (PixArt, DiT): elsewhere other
        layers look across rows as well. Not for torch.compile.

        Args:
            group: the processes; None means all.

        Yields:
            The model.

        Raises:
            ValueError: another class of model, or self-attention that was left softmax.
            RuntimeError: torch.distributed is not initialised; at a pass, gradients are wanted. `disabled` raises
                inside.
        """
        from .parallel import token_parallel  # it needs this module

        return token_parallel(self, group)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Inside, the model is the original, bit for bit, with the same weights in memory; yields the model.

        The processors that the conversion replaced do the work. Nests; leaves the adapter enabled again also when an
        exception passes. A backward pass under the model's gradient checkpointing recomputes as its forward pass ran.

        Raises:
            RuntimeError: the adapter is merged into the base weights, or inside `token_parallel`.
        """
        if self._merged:
            raise RuntimeError("The adapter is merged into the base weights: call unmerge() first.")
        layers = self._converted_layers()
        if any(layer.split for layer in layers):
            raise RuntimeError("Inside token_parallel() each process holds a share of the tokens: softmax needs all.")
        self._disabled += 1
        for layer in layers:
            layer.enabled = False
        try:
            yield self.model
        finally:
            self._disabled -= 1
            for layer in layers:
                layer.enabled = self._disabled == 0

    def report(self) -> Report:
        """Every attention layer of the model: converted, or why not. Printable."""
        rows = []
        for finding in survey(self.model):
            attn: Any = finding.attn
            layer: ConvertedLayer | None = getattr(attn, LAYER, None)
            rows.append(
                LayerReport(
                    name=finding.name,
                    converted=layer is not None and _runs(attn),
                    reason=self._reason(finding, attn, layer),
                    heads=getattr(attn, "heads", None),
                    head_dim=attn.inner_dim // attn.heads if hasattr(attn, "inner_dim") else None,
                    grid=None if layer is None else layer.grid,
                    time_ratio=None if layer is None else self._time_ratio(attn, layer),
                )
            )
        return Report(type(self.model).__name__, tuple(rows))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        push_to_hub: bool = False,
        *,
        repo_id: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> None:
        """Write adapter_config.json, adapter_model.safetensors and a model card (README.md) to a folder.

        Tensors keep their dtype. An interrupted save never leaves a mixture that loads: the earlier adapter or the
        new one. With `push_to_hub`, the three files are uploaded to `repo_id` (default: the folder's name), created
        if needed.

        Raises:
            RuntimeError: after `restore`.
            ValueError: a parameter without data (on the meta device), or a bad `repo_id`.
            NotADirectoryError: `save_directory` is a file.
        """
        from .files import save_adapter  # files also loads, and loading needs this module

        save_adapter(
            self,
            save_directory,
            push_to_hub=push_to_hub,
            repo_id=repo_id,
            token=token,
            private=private,
            commit_message=commit_message,
        )

    def forget(self) -> None:
        """Cut the tie to the model; called by `restore`."""
        self.pin_grid(None)
        self._model = None
        self.originals = {}

    def _converted_layers(self) -> list[ConvertedLayer]:
        return [getattr(attn, LAYER) for _, attn in self.attention_modules()]

    def _reason(self, finding: Finding, attn: Any, layer: ConvertedLayer | None) -> str:
        if layer is None:
            return finding.reason or finding.offered or "not selected by include and exclude"
        if not _runs(attn):
            return f"its processor was replaced by {type(attn.processor).__name__} after the conversion"
        text = self.config.mixer
        if self.config.window:
            text += f" beyond windows of {self.config.window}"
        if layer.place != "alone":
            text += f" within the picture, softmax to and from other tokens ({self.config.joint})"
        if getattr(attn, MIXER).uses_grid:
            text += f", grid from {finding.family.owner if finding.family else ''}"
        if layer.min_tokens:
            text += f", softmax below {layer.min_tokens} tokens" + (" (measured)" if layer.auto else "")
        elif self.config.min_tokens == AUTO and not layer.auto:
            text += ", linear at every size: its weights are trained for it"
        ratio = self._time_ratio(attn, layer)
        if ratio is not None and ratio > 1:
            text += f", {ratio:.2f} times softmax's time at this size"
        if layer.reading is not None and layer.reading.softmax is not None:
            text += f", softmax in the last pass: {layer.reading.softmax}"
        elif layer.masked:
            text += ", softmax in the last pass: its mask is no key padding"
        return text + (", disabled at the moment" if self._disabled else "")

    def _time_ratio(self, attn: Any, layer: ConvertedLayer) -> float | None:
        """Of the layer's linear product to softmax's, where the size of the last pass was linear and ever timed."""
        tokens = 0 if layer.grid is None else count_tokens(layer.grid)
        if tokens == 0 or tokens < layer.min_tokens:
            return None
        mixer: Mixer = getattr(attn, MIXER)
        return known_ratio(*place_of(mixer), self.config.mixer, mixer.spec, tokens)

    def __repr__(self) -> str:
        if self._model is None:
            return "Adapter(restored)"
        size = sum(parameter.numel() for parameter in self.parameters())
        model = type(self._model).__name__
        return f"Adapter({model}, {self.config.mixer}, {len(self._layers)} layers, {size:,} parameters)"


def _runs(attn: Any) -> bool:
    return isinstance(attn.processor, OURS)
