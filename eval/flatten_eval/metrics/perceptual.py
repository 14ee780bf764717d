"""LPIPS (Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018), version
0.1 on AlexNet, from a file of weights: neither torchvision nor a download."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from flatten_diffusion.files import sha256_of

from ..errors import InputError
from ..features.state_dict import read_state_dict, require_tensors
from ..images import Pixels

SMALLEST = 31
"""Pixels: what the third convolution needs to see anything."""
_CHANNELS = (64, 192, 384, 256, 256)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10


class Lpips(nn.Module):
    """Weighted squared differences of AlexNet's activations of unit length over channels, averaged over places and
    summed over its five rectified layers (eq. 1)."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        # Numbered as in torchvision's alexnet, whose weights these are.
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.lin = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in _CHANNELS)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """[N] of two batches [N, 3, H, W] in -1 to 1, sides of at least SMALLEST."""
        total = first.new_zeros(len(first))
        for weight, one, other in zip(self.lin, self._activations(first), self._activations(second), strict=True):
            total = total + weight((one - other).square()).mean(dim=(1, 2, 3))
        return total

    def _activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        hidden, found = (images - self.shift) / self.scale, []
        for layer in self.features:
            hidden = layer(hidden)
            if isinstance(layer, nn.ReLU):
                found.append(hidden / (hidden.norm(dim=1, keepdim=True) + _EPSILON))
        return found


class LpipsMeasure:
    """LPIPS of two pictures.

    Args:
        weights: .pth or .safetensors: the whole state of the package `lpips` (net.slice..., lin...), or torchvision's
            alexnet (features...), whose linear layers then come from the file of torchmetrics.

    Attributes:
        weights_sha256: of that file.

    Raises:
        InputError: no such file, damaged, or of another network.
    """

    def __init__(self, weights: Path, device: torch.device) -> None:
        if not weights.is_file():
            raise InputError(f"{weights}: no such weights file; see --lpips-weights")
        self.weights_sha256 = sha256_of(weights)
        network, state = Lpips(), _renamed(read_state_dict(weights))
        if not any(key.startswith("lin.") for key in state):
            state |= _renamed(read_state_dict(_linear_layers(weights)))
        expected = network.state_dict()
        require_tensors(weights, state, expected, "LPIPS on AlexNet")
        network.load_state_dict({key: state[key] for key in expected})
        self._network, self._device = network.to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, first: Pixels, second: Pixels) -> float:
        """Of two uint8 images [H, W, 3] of one size. Raises InputError where a side is shorter than SMALLEST."""
        if min(first.shape[:2]) < SMALLEST:
            shown = f"{first.shape[1]}x{first.shape[0]}"
            raise InputError(f"LPIPS needs images of at least {SMALLEST}x{SMALLEST}, got {shown}")
        x, y = (
            torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()).to(self._device).float() / 127.5 - 1
            for pixels in (first, second)
        )
        return float(self._network(x, y))


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`net.slice3.6.weight` and `lin2.model.1.weight` of the package lpips as they are called here."""
    renamed = {re.sub(r"^net\.slice\d\.", "features.", key): tensor for key, tensor in state.items()}
    return {re.sub(r"^lin(\d)\.model\.1\.", r"lin.\1.", key): tensor for key, tensor in renamed.items()}


def _linear_layers(weights: Path) -> Path:
    package = find_spec("torchmetrics")
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        file = Path(folder) / "functional" / "image" / "lpips_models" / "alex.pth"
        if file.is_file():
            return file
    raise InputError(
        f"{weights}: has no linear layers (lin0 to lin4), and torchmetrics, which brings them, is not installed; "
        "install the eval extra"
    )
