"""The extractor of published FID: finding, checking and loading its weights."""

from __future__ import annotations

import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from flatten_diffusion.files import sha256_of

from ..errors import InputError
from ..files import replacing
from ..images import Pixels
from .base import ExtractorIdentity
from .crops import Crops
from .inception_network import INPUT_SIZE, InceptionV3
from .resize import ResizeMode, resize
from .state_dict import read_state_dict, require_tensors


@dataclass(frozen=True)
class PublishedWeights:
    """One distribution of the 2015 network."""

    file: str
    sha256: str
    url: str


STATE_DICT = PublishedWeights(
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
TORCHSCRIPT = PublishedWeights(
    "inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
)
PUBLISHED_SHA256 = frozenset({STATE_DICT.sha256, TORCHSCRIPT.sha256})


def cache_folder() -> Path:
    """Where downloads and resumable state live: $FLATTEN_EVAL_CACHE, else flatten_eval in the user's cache folder."""
    if own := os.environ.get("FLATTEN_EVAL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatten_eval"


class InceptionExtractor:
    """Images to the 2048 pooled features of Inception-v3.

    Args:
        weights: `.pth` state dictionary, `.safetensors` with the same keys, or the TorchScript `.pt`; None takes the
            published state dictionary from the cache, downloading it when missing.
        resize: see `features.resize.resize`; the target is 299x299.
        expected_sha256: accepts a weights file that is not one of the two published ones. Its distance is then not
            called FID.

    Raises:
        InputError: weights missing, damaged, of another layout, or not matching their checksum.
    """

    needs_one_size = False
    input_size: int | None = INPUT_SIZE
    crops: Crops | None = None

    def __init__(
        self,
        weights: Path | None,
        resize: ResizeMode,
        device: torch.device,
        offline: bool,
        expected_sha256: str | None = None,
    ) -> None:
        if resize == "none":
            raise InputError("--resize none: the inception extractor needs 299x299; choose clean or legacy")
        path = weights if weights is not None else published_weights(offline)
        digest = checked_sha256(path, expected_sha256)
        self._network = load_network(path).to(device)
        self._device = device
        self._mode: ResizeMode = resize
        self.identity = ExtractorIdentity("inception", digest, f"{resize}-{INPUT_SIZE}", "pool3-2048")

    def prepare(self, pixels: Pixels) -> torch.Tensor:
        return resize(pixels, INPUT_SIZE, INPUT_SIZE, self._mode)

    @torch.inference_mode()
    def extract(self, batch: torch.Tensor) -> torch.Tensor:
        images = batch.to(self._device)
        # pytorch-fid maps 0..255 to -1..1; the TensorFlow graph subtracts 128 and divides by 128.
        scaled = images * (2 / 255) - 1 if self._mode == "legacy-pytorch" else (images - 128) / 128
        features: torch.Tensor = self._network(scaled)
        return features.reshape(len(batch), -1).float().cpu()


def checked_sha256(path: Path, expected: str | None) -> str:
    """The file's sha256 once it is known to be right.

    Raises:
        InputError: the file is missing, or its sha256 is neither `expected` nor (for None) a published one.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; see --weights")
    digest = sha256_of(path)
    allowed = {expected.lower()} if expected is not None else PUBLISHED_SHA256
    if digest not in allowed:
        wanted = expected or f"{STATE_DICT.sha256} ({STATE_DICT.file}) or {TORCHSCRIPT.sha256} ({TORCHSCRIPT.file})"
        raise InputError(
            f"{path}: sha256 is {digest}, expected {wanted}; download it again, or name this file's own with "
            "--weights-sha256 (its distance is then not called FID)"
        )
    return digest


def load_network(path: Path) -> nn.Module:
    """Loads the network, in evaluation mode, from a state dictionary or a TorchScript file."""
    if path.suffix == ".safetensors":
        return _from_state(path, read_state_dict(path))
    try:
        script: torch.jit.ScriptModule = torch.jit.load(str(path), map_location="cpu")
    except Exception:  # not a TorchScript archive
        return _from_state(path, read_state_dict(path))
    # The archive resizes inside; its `layers` take the resized, scaled image.
    network: nn.Module = getattr(script, "layers", script)
    return network.eval()


def _from_state(path: Path, state: dict[str, torch.Tensor]) -> InceptionV3:
    network = InceptionV3()
    expected, kind = network.state_dict(), "the FID Inception-v3"
    # Ports older than PyTorch 0.4.1 lack the batch counters; evaluation never reads them.
    needed = {key: one for key, one in expected.items() if key in state or not key.endswith("num_batches_tracked")}
    require_tensors(path, state, needed, kind)
    unknown = [key for key in state if key not in expected]
    if unknown:
        raise InputError(f"{path}: has unknown {unknown[0]} ({len(unknown)} keys); not the weights of {kind}")
    network.load_state_dict(state, strict=False)
    return network.eval()


def published_weights(offline: bool) -> Path:
    """Path of the published state dictionary, downloaded into the cache (sha256 checked) when it is not there.

    Raises:
        InputError: not in the cache and offline, or the download fails or does not match.
    """
    path = cache_folder() / STATE_DICT.file
    if path.is_file():
        return path
    if offline:
        raise InputError(
            f"inception weights are not in {path.parent} and --offline is set; "
            f"download {STATE_DICT.url} elsewhere and give --weights PATH"
        )
    with replacing(path) as temporary:
        _download(STATE_DICT.url, temporary)
        digest = sha256_of(temporary)
        if digest != STATE_DICT.sha256:
            raise InputError(f"{STATE_DICT.url}: downloaded file has sha256 {digest}, expected {STATE_DICT.sha256}")
    return path


def _download(url: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as response, target.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc="inception weights", disable=None) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (OSError, ValueError) as error:
        raise InputError(f"{url}: download failed ({error}); fetch it elsewhere and give --weights PATH") from error
