"""DINO, DINOv2 and CLIP image features, and CLIP text features, through transformers; a local folder or a hub id."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from flatten_diffusion.files import sha256_of

from ..errors import InputError, first_line
from ..images import Pixels
from .base import ExtractorIdentity
from .crops import Crops
from .resize import ResizeMode, resize

DINOV2_MODEL = "facebook/dinov2-large"
CLIP_MODEL = "openai/clip-vit-large-patch14-336"
Kind = Literal["dinov2", "clip", "dino"]
_MODEL_TYPES = {"dinov2": ("dinov2",), "clip": ("clip",), "dino": ("dinov2", "vit")}
# Published FD-DINOv2 runs the network at 224, not at the 518 of its position table.
_DINOV2_SIZE = 224
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class TransformerExtractor:
    """DINOv2 class-token features (Stein et al., "Exposing flaws of generative model evaluation metrics", NeurIPS
    2023), the same of DINO's ViT, or CLIP image embeddings of unit length (Jayasumana et al., "Rethinking FID", CVPR
    2024).

    Args:
        kind: `dinov2`, `clip`, or `dino` for whichever of DINO (a ViTModel) and DINOv2 the model is.
        model: local folder or hub id; None for ViT-L/14 (DINOv2) or ViT-L/14-336 (CLIP).
        resize: resizer to the network's square input; the whole image is kept, no crop.

    Raises:
        InputError: the model is not there, is not of this kind, or has no safetensors weights.
    """

    needs_one_size = False
    crops: Crops | None = None

    def __init__(
        self,
        kind: Kind,
        model: str | None,
        resize: ResizeMode,
        device: torch.device,
        offline: bool,
    ) -> None:
        if resize == "none":
            raise InputError(f"--resize none: the {kind} extractor needs its own square input; choose clean or legacy")
        self.kind = kind
        source = model or (CLIP_MODEL if kind == "clip" else DINOV2_MODEL)
        folder = local_folder(source, offline)
        self._network, self._size = _load(kind, folder, source)
        self.input_size: int | None = self._size
        self._network.to(device)
        self._device = device
        self._mode: ResizeMode = resize
        self._folder = folder
        mean, deviation = _CLIP if kind == "clip" else _IMAGENET
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._deviation = torch.tensor(deviation, device=device).view(1, 3, 1, 1)
        variant = "embedding-unit-length" if kind == "clip" else "class-token"
        name = self._network.config.model_type
        self.identity = ExtractorIdentity(name, _digest(folder), f"{resize}-{self._size}", variant)

    def prepare(self, pixels: Pixels) -> torch.Tensor:
        return resize(pixels, self._size, self._size, self._mode)

    @torch.inference_mode()
    def extract(self, batch: torch.Tensor) -> torch.Tensor:
        images = (batch.to(self._device) / 255 - self._mean) / self._deviation
        if self.kind == "clip":
            hidden = self._network.vision_model(pixel_values=images).pooler_output
            features = F.normalize(self._network.visual_projection(hidden), dim=-1)
        else:
            features = self._network(pixel_values=images).last_hidden_state[:, 0]
        result: torch.Tensor = features.float().cpu()
        return result

    @torch.inference_mode()
    def extract_text(self, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """CLIP text embeddings of unit length, [N, d], on the CPU; longer captions are cut at 77 tokens."""
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(self._folder, local_files_only=True)
        limit = self._network.config.text_config.max_position_embeddings
        rows: list[torch.Tensor] = []
        for start in range(0, len(texts), batch_size):
            chunk = list(texts[start : start + batch_size])
            tokens = tokenizer(chunk, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            hidden = self._network.text_model(**tokens.to(self._device)).pooler_output
            rows.append(F.normalize(self._network.text_projection(hidden), dim=-1).float().cpu())
        return torch.cat(rows)


def _digest(folder: Path) -> str | None:
    """One sha256 over the weights, in name order; None where there are none."""
    digests = [sha256_of(file) for file in sorted(folder.glob("*.safetensors"))]
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest() if digests else None
    )


def local_folder(source: str, offline: bool) -> Path:
    """The local folder of a model: itself, or its snapshot in the hub cache (downloaded unless offline).

    Raises:
        InputError: neither there nor to be had.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "model*.safetensors"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns, local_files_only=offline))
    except HFValidationError as error:
        raise InputError(f"{source}: neither a folder nor a hub id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = "not in the hub cache and --offline is set" if offline else f"cannot be downloaded ({error})"
        raise InputError(f"{source}: {' '.join(reason.split())}; give a local folder") from error


def _load(kind: str, folder: Path, source: str) -> tuple[Any, int]:
    from transformers import AutoConfig, CLIPModel, Dinov2Model, ViTModel

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type not in _MODEL_TYPES[kind]:
            needed = " or ".join(_MODEL_TYPES[kind])
            raise InputError(f"{source}: a {config.model_type} model, the {kind} extractor needs a {needed} model")
        local: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        network: Any
        if config.model_type == "dinov2":
            network, size = Dinov2Model.from_pretrained(folder, **local), _DINOV2_SIZE
        elif config.model_type == "vit":
            network, size = ViTModel.from_pretrained(folder, add_pooling_layer=False, **local), config.image_size
        else:
            network, size = CLIPModel.from_pretrained(folder, **local), config.vision_config.image_size
        return network.eval(), int(size)
    except InputError:
        raise
    except Exception as error:  # a damaged folder raises many kinds
        raise InputError(f"{source}: cannot be loaded as a {kind} model ({first_line(error)})") from error
