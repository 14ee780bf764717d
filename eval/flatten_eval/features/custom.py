"""Any TorchScript file or Python function as an extractor: uint8 [N, 3, H, W] in, float [N, d] out."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from flatten_diffusion.files import sha256_of

from ..errors import InputError, first_line
from ..images import Pixels
from .base import ExtractorIdentity
from .crops import Crops
from .resize import ResizeMode, resize

Function = Callable[[torch.Tensor], torch.Tensor]


class CustomExtractor:
    """Wraps a function of uint8 images. Images go in as they are unless a size is asked for.

    Args:
        source: path of a TorchScript file, `module:function`, or `path/to/file.py:function`.
        resize: resizer, used only with `size`; the result is rounded back to uint8.
        size: square input size in pixels, or None.
        name: what statistics call it; None for the file's or function's own.

    Raises:
        InputError: nothing by that name, or it cannot be loaded.
    """

    crops: Crops | None = None

    def __init__(
        self, source: str, resize: ResizeMode, size: int | None, device: torch.device, name: str | None = None
    ) -> None:
        if size is not None and resize == "none":
            raise InputError("--resize none contradicts --resize-to; drop one of them")
        self.needs_one_size = size is None
        self.input_size = size
        self._function, digest, own_name = _load(source, device)
        self._mode: ResizeMode = resize
        self._size, self._device, self._source = size, device, source
        resized = "none" if size is None else f"{resize}-{size}-uint8"
        self.identity = ExtractorIdentity(name or own_name, digest, resized)

    def prepare(self, pixels: Pixels) -> torch.Tensor:
        if self._size is None:
            return torch.tensor(pixels).permute(2, 0, 1)
        return resize(pixels, self._size, self._size, self._mode).round().clamp(0, 255).to(torch.uint8)

    @torch.inference_mode()
    def extract(self, batch: torch.Tensor) -> torch.Tensor:
        try:
            features = self._function(batch.to(self._device))
        except Exception as error:  # foreign code may raise anything
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
            raise InputError(
                f"{self._source}: the extractor failed on uint8 {tuple(batch.shape)}: {reason[:300]}"
            ) from error
        shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(batch):
            raise InputError(f"{self._source}: returned {shape} for {len(batch)} images; needs float [{len(batch)}, d]")
        if not features.is_floating_point():
            raise InputError(f"{self._source}: returned {features.dtype}; needs float features")
        return features.cpu()


def _load(source: str, device: torch.device) -> tuple[Function, str | None, str]:
    path = Path(source)
    if path.is_file() and ":" not in path.name:
        try:
            script: Function = torch.jit.load(str(path), map_location=device).eval()
        except Exception as error:  # a damaged archive raises many kinds
            raise InputError(f"{source}: not a TorchScript file; export one with torch.jit.script or trace") from error
        return script, sha256_of(path), path.name
    module_name, _, function_name = source.rpartition(":")
    if not module_name:
        raise InputError(
            f"{source}: unknown extractor; use inception, dinov2, clip, pixels, a TorchScript file or module:function"
        )
    module = _import(module_name, source)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{source}: {module_name} has no function {function_name}")
    try:
        file = inspect.getsourcefile(module)
    except TypeError as error:
        raise InputError(f"{source}: {module_name} is built into Python; name a function of your own") from error
    if isinstance(function, torch.nn.Module):
        function = function.to(device).eval()
    return function, sha256_of(Path(file)) if file else None, f"{module.__name__}:{function_name}"


def _import(name: str, source: str) -> ModuleType:
    path = Path(name)
    if name.endswith(".py") and not path.is_file():
        raise InputError(f"{source}: {name} does not exist")
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None  # of a .py file there always is
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:  # importing runs foreign code
        raise InputError(f"{source}: cannot be imported ({type(error).__name__}: {first_line(error)})") from error
