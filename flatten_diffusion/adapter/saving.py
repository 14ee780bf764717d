"""An adapter written to disk and to the Hub: adapter_config.json, adapter_model.safetensors, README.md."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save as safetensors_bytes
from torch import nn

from .. import __version__
from ..files import sha256_of_tensors, write_bytes, write_json, write_text
from .card import model_card
from .fingerprint import class_name
from .handle import AdapterHandle
from .offloading import is_offloaded, is_offloaded_in_groups

FORMAT_VERSION = 2
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
HEADER = "adapter_config"
DIGEST = "sha256"


def save_adapter(
    handle: AdapterHandle,
    save_directory: str | os.PathLike[str],
    *,
    base_fingerprint: str,
    push_to_hub: bool,
    repo_id: str | None,
    token: str | None,
    private: bool | None,
    commit_message: str | None,
) -> None:
    """See `Adapter.save_pretrained`."""
    folder = Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: save an adapter to a folder.")
    repo = repo_id if repo_id is not None else folder.resolve().name
    if push_to_hub:
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise ValueError(f"repo_id {repo!r} is not a Hub name such as 'user/name': {error}") from error
    tensors = _materialised(handle)
    description = _describe(handle, base_fingerprint)
    description[DIGEST] = signature(tensors, description)
    # The weights carry the whole description, so replacing this one file is the moment the new adapter counts.
    write_bytes(folder / WEIGHTS_NAME, safetensors_bytes(tensors, metadata={HEADER: json.dumps(description)}))
    write_json(folder / CONFIG_NAME, description)
    write_text(folder / CARD_NAME, model_card(handle, description))
    if push_to_hub:
        api = HfApi(token=token)
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, CARD_NAME],
            commit_message=commit_message or "Upload linear attention adapter",
        )


def signature(tensors: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> str:
    """One digest of tensors and description together, without the digest in it."""
    text = json.dumps({key: value for key, value in description.items() if key != DIGEST}, sort_keys=True)
    return sha256_of_tensors(tensors, text)


def _materialised(handle: AdapterHandle) -> dict[str, torch.Tensor]:
    grouped = is_offloaded_in_groups(handle.model)
    for name, layer in handle.layer_mixers():
        if grouped or any(is_offloaded(part) for part in layer.modules()):
            raise ValueError(f"{name} is offloaded: save the adapter before offloading, or remove the hooks first.")
    tensors = {}
    for name, tensor in handle.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no data: materialise the model before saving.")
        tensors[name] = _whole(tensor).detach().cpu().contiguous()
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} has values that are not finite: a diverged adapter is not saved.")
    return tensors


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered; others as they are."""
    gather = getattr(tensor, "full_tensor", None)
    whole: torch.Tensor = tensor if gather is None else gather()
    return whole


def _describe(handle: AdapterHandle, base_fingerprint: str) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "flatten_diffusion_version": __version__,
        "base_model": {
            "class": class_name(handle.model),
            "fingerprint": base_fingerprint,
            "name_or_path": _hub_name(handle.model),
        },
        "config": handle.config.to_dict(),
        "layers": handle.layers,
    }


def _hub_name(model: nn.Module) -> str | None:
    """Where the base model came from, when that is a Hub name and not somebody's disk."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or os.path.exists(name) or name.count("/") != 1:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
