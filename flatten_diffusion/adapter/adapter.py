"""What a conversion returns: the learned part of a model, and the verbs of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from ..mixers import Grid, count_tokens
from ..models import LAYER, MIXER
from ..models.token_layout import PINNED
from ..ops import BACKENDS
from .config import AdapterConfig
from .fingerprint import fingerprint
from .handle import AdapterHandle
from .merge import Merged, merge, unmerge
from .parallel import token_parallel
from .report import Report, report
from .saving import save_adapter


class Adapter(AdapterHandle):
    """What `linearize` and `load_adapter` return: the learned part of a converted model and the switch for it.

    It belongs to one model and is usable until `restore`. Layers are named by the path of their attention module.

    Attributes:
        kept: path -> processor of the attention layers that the conversion left alone.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, layers: Iterable[str]) -> None:
        super().__init__(model, config, layers)
        self.kept: dict[str, Any] = {}
        self._merged: list[Merged] = []
        self._base_fingerprint = ""

    def requires_grad_(self, requires_grad: bool = True) -> Adapter:
        """Let gradients reach the learned parameters or not; the base model is left as it is."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def merge(self) -> None:
        """Fold the projection deltas into the base weights: the same outputs up to rounding, without their cost.

        Until `unmerge`, the model carries no bit-exact original, so `disabled` refuses; `restore` unmerges first. The
        weights replaced stay in memory. `save_pretrained` saves the adapter as before; the model's own
        `save_pretrained` then writes the merged weights: save one or the other.

        Raises:
            RuntimeError: merged already, or inside `disabled`.
            ValueError: nothing to merge, fused, quantised, offloaded or sharded projections, or `min_tokens` is set
                (smaller calls stay softmax and need the base weights). Nothing is changed then.
        """
        if self._merged:
            raise RuntimeError("The adapter is merged already.")
        if self._is_disabled():
            raise RuntimeError("The adapter is disabled: call merge() outside disabled().")
        self._base_fingerprint = fingerprint(self.model)
        merge(self, self._merged)

    @property
    def is_merged(self) -> bool:
        """Whether the deltas are inside the base weights at the moment."""
        return bool(self._merged)

    def base_fingerprint(self) -> str:
        """`fingerprint` of the model without this adapter; a merge may add biases, which are left out."""
        return self._base_fingerprint if self._merged else fingerprint(self.model)

    def unmerge(self) -> None:
        """Take the deltas out again. Does nothing when not merged.

        The very base weights come back, bit for bit, in the dtype that the model has by now; where something else
        changed a weight since (a fused LoRA, fine-tuning, `load_state_dict`), the deltas are subtracted from it, with a
        warning.

        Raises:
            ValueError: a weight is offloaded, quantised or sharded by now, or its delta changed too. Nothing is changed
                then.
        """
        if self._merged:
            unmerge(self, self._merged)

    def set_backend(self, backend: str) -> None:
        """Compute with this backend of `focused_linear_attention` from now on. Raises ValueError for an unknown one."""
        if backend not in BACKENDS:
            raise ValueError(f"Unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
        for _, layer in self.layer_mixers():
            layer.mixer.backend = backend
            if layer.window is not None:
                layer.window.backend = backend

    def pin_grid(self, grid: Grid | None) -> None:
        """Tell graphs that are compiled whole (`fullgraph=True`) the size of the image, where they cannot see it.

        Flux and its kin (Flux2, Flux3, Chroma, Krea2, Ideogram4, MiniMaxH3) are told an image's shape only as numbers
        on the device, which a graph cannot turn into sizes; uncompiled code and graphs that may break read them there
        and ignore this. Other models need no pin.

        Args:
            grid: (height, width) in tokens of the passes to come, or one (1, height, width) per image where
                reference images follow; None takes the pin away. A pass of another grid fails on the device.
        """
        if grid is not None:
            count_tokens(grid)
        whole = self.model  # or both denoisers of a pipeline
        for owner in whole.values() if isinstance(whole, nn.ModuleDict) else [whole]:
            owner.__dict__.pop(PINNED, None)
            if grid is not None:
                owner.__dict__[PINNED] = grid

    def token_parallel(self, group: Any = None) -> AbstractContextManager[nn.Module]:
        """Inside, the tokens of each image are split by rows over the processes of a `torch.distributed` group.

        For one image beyond one device's memory: every process calls the model with the same, whole inputs and gets
        the same, whole output, but between patch embedding and output projection it holds its own rows only. All that
        travels per layer is the sum of one [D, D] state per head, and the rows next to a cut for the convolution; the
        output is that of one process up to rounding.

            with adapter.token_parallel(), torch.inference_mode():  # under torchrun, one process per device
                image = pipe(prompt, height=8192, width=8192).images[0]

        For inference, and for models that are transformers over one image's patches (PixArt, DiT): elsewhere other
        layers look across rows as well. Not for torch.compile.

        Args:
            group: the processes; None means all.

        Yields:
            The model.

        Raises:
            ValueError: another class of model, self-attention that was left softmax, or a mixer or windows that cannot
                be split.
            RuntimeError: torch.distributed is not initialised; at a pass, gradients are wanted. `disabled` raises
                inside.
        """
        return token_parallel(self, group)

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Inside, the model is the original, bit for bit, with the same weights in memory; yields the model.

        The processors that the conversion replaced do the work, for the passes of this thread. Nests; leaves the
        adapter enabled again also when an exception passes. A backward pass under the model's gradient checkpointing
        recomputes as its forward pass ran.

        Raises:
            RuntimeError: the adapter is merged into the base weights, or inside `token_parallel`.
        """
        if self._merged:
            raise RuntimeError("The adapter is merged into the base weights: call unmerge() first.")
        layers = [layer for _, layer, _ in self.converted_layers()]
        if any(layer.group is not None for layer in layers):
            raise RuntimeError("Inside token_parallel() each process holds a share of the tokens: softmax needs all.")
        before = [(layer, layer.state.disabled) for layer in layers]

        def switch(more: int) -> None:
            for layer, disabled in before:
                layer.switch(disabled + more)

        try:
            try:
                switch(1)
                yield self.model
            finally:
                switch(0)
        except BaseException:  # which Ctrl-C may be, within the switching
            switch(0)
            raise

    def report(self) -> Report:
        """Every attention layer of the model: converted, or why not. Printable."""
        return report(self)

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
            ValueError: a parameter without data (on the meta device, or offloaded to disk) or with values that are not
                finite, or a bad `repo_id`.
            NotADirectoryError: `save_directory` is a file.
        """
        save_adapter(
            self,
            save_directory,
            base_fingerprint=self.base_fingerprint(),
            push_to_hub=push_to_hub,
            repo_id=repo_id,
            token=token,
            private=private,
            commit_message=commit_message,
        )

    def settle(self) -> None:
        """Keep what the layers say of the config; called by `restore` before anything is taken off."""
        if all(hasattr(attn, MIXER) for _, attn in self.attention_modules()):
            self._config = self.config

    def forget(self) -> None:
        """Cut the tie to the model; called by `restore` when all is taken off."""
        self.pin_grid(None)
        self._model = None

    def _is_disabled(self) -> bool:
        return any(not getattr(attn, LAYER).enabled for _, attn in self.attention_modules())

    def __repr__(self) -> str:
        if self._model is None:
            return "Adapter(restored)"
        size = sum(parameter.numel() for parameter in self.parameters())
        names = ", ".join(dict.fromkeys(mixer.config.name for _, mixer in self.mixers()))
        return f"Adapter({type(self._model).__name__}, {names}, {len(self._layers)} layers, {size:,} parameters)"
