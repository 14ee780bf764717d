"""An adapter on disk and on the Hub: adapter_config.json, adapter_model.safetensors, README.md."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn

from .. import __version__
from ..mixers import Mixer
from ..models import Finding, survey
from .card import model_card
from .config import AdapterConfig
from .convert import attach, build_mixers, check_processors, check_unconverted, resolve_model
from .fingerprint import fingerprint
from .handle import Adapter

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
_HEADER = "adapter_config"
_DIGEST = "tensors_sha256"


def save_adapter(
    adapter: Adapter,
    save_directory: str | os.PathLike[str],
    *,
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
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _materialised(adapter).items()}
    digest = _digest(tensors)
    description = _describe(adapter, digest)
    # The weights carry the whole description, so replacing this one file is the moment the new adapter counts.
    weights = safetensors_bytes(tensors, metadata={_HEADER: json.dumps(description)})
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS_NAME, weights)
    _write(folder / CONFIG_NAME, (json.dumps(description, indent=2) + "\n").encode())
    _write(folder / CARD_NAME, model_card(adapter, description).encode())
    if push_to_hub:
        api = HfApi(token=token)
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, CARD_NAME],
            commit_message=commit_message or "Upload focused linear attention adapter",
        )


def load_adapter(
    model_or_pipeline: Any,
    path_or_hub_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    min_tokens: int | Literal["auto"] | None = None,
) -> Adapter:
    """Convert a model with a saved adapter, in place.

    Exactly the layers that were saved are converted, with the saved settings; tensors take the dtype and device of
    their layer. Everything is checked before the model is touched.

    Args:
        model_or_pipeline: as for `linearize`; not converted yet.
        path_or_hub_id: a folder written by `save_pretrained`, or a Hub repository "user/name".
        revision, token, cache_dir, local_files_only: for the Hub, as in `huggingface_hub.hf_hub_download`.
        min_tokens: in place of the saved setting, for every layer; see `AdapterConfig`. None keeps what was saved, but
            where that is "auto", layers with trained weights stay linear at every size.

    Returns:
        The adapter, as from `linearize`.

    Raises:
        TypeError: no model found.
        ValueError: the model is converted already; the adapter was made for another model, by a newer version, or
            with an unknown mixer or setting; keys or shapes do not fit.
        OSError: a file is missing, unreadable, truncated or damaged, or the Hub cannot provide it.
    """
    if min_tokens is not None:
        AdapterConfig(min_tokens=min_tokens)
    model = resolve_model(model_or_pipeline)
    findings = survey(model)
    check_unconverted(model, findings)
    config_path, weights_path = _locate(path_or_hub_id, revision, token, cache_dir, local_files_only)
    tensors, own_description = _read_weights(weights_path)
    description = _read_description(config_path, own_description)
    config, layers = _check_description(description, config_path, model)
    if min_tokens is not None:
        config = replace(config, min_tokens=min_tokens)
    chosen = _choose_saved(layers, findings, config_path)
    check_processors(chosen)
    mixers = build_mixers(chosen, config)
    _fill(mixers, tensors, weights_path)
    trained = [name for name, mixer in mixers.items() if min_tokens is None and _is_trained(mixer)]
    return attach(model, config, findings, mixers, trained)


def _materialised(adapter: Adapter) -> dict[str, torch.Tensor]:
    tensors = adapter.state_dict()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no data: materialise the model before saving.")
    return tensors


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _describe(adapter: Adapter, digest: str) -> dict[str, Any]:
    model = adapter.model
    return {
        "format_version": FORMAT_VERSION,
        "flatten_diffusion_version": __version__,
        "base_model": {
            "class": type(model).__name__,
            "fingerprint": adapter.base_fingerprint(),
            "name_or_path": _hub_name(model),
        },
        "config": adapter.config.to_dict(),
        "layers": adapter.layers,
        _DIGEST: digest,
    }


def _hub_name(model: nn.Module) -> str | None:
    """Where the base model came from, when that is a Hub name and not somebody's disk."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((".", "/", "~")) or os.path.exists(name):
        return None
    return name


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: written beside under a temporary name, then renamed."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _locate(
    path_or_hub_id: str | os.PathLike[str],
    revision: str | None,
    token: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> tuple[Path, Path]:
    """(config, weights) on this disk, fetched from the Hub where needed."""
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: pass a folder written by save_pretrained.")
        return folder / CONFIG_NAME, folder / WEIGHTS_NAME
    name = str(path_or_hub_id)
    if folder.exists():
        raise NotADirectoryError(f"{name} is a file: pass the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a Hub name such as 'user/name'.") from error

    def fetch(filename: str) -> Path:
        return Path(
            hf_hub_download(
                name,
                filename,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
            )
        )

    try:
        return fetch(CONFIG_NAME), fetch(WEIGHTS_NAME)
    except LocalEntryNotFoundError as error:
        raise OSError(f"{name!r} is no folder here, and neither the cache nor the Hub can provide it now.") from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"Hub repository {name!r} holds no {CONFIG_NAME} and {WEIGHTS_NAME}.") from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"{name!r} is no folder here, and the Hub does not provide it: {reason}") from error


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The tensors, and the description that travels with them (a file rewritten by another tool may lack it)."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError) as error:
        raise OSError(f"{path} is truncated or no safetensors file ({error}): save or download it again.") from error
    description = _parse(metadata[_HEADER], path) if _HEADER in metadata else None
    if description is not None and description.get(_DIGEST) != _digest(tensors):
        raise OSError(f"{path} is damaged (its tensors do not match their checksum): save or download it again.")
    return tensors, description


def _read_description(path: Path, own_description: dict[str, Any] | None) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise OSError(f"{path} is no UTF-8 text ({error}): save or download it again.") from error
    description = _parse(text, path)
    if own_description is not None and description.get(_DIGEST) != own_description.get(_DIGEST):
        # A save was cut off between its two files: the weights are newer and describe themselves.
        logger.warning(f"{path} belongs to an earlier save than {WEIGHTS_NAME}: using what that file says.")
        return own_description
    return description


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except ValueError as error:
        raise OSError(f"{path} is truncated or no JSON ({error}): save or download it again.") from error
    if not isinstance(description, dict):
        raise OSError(f"{path} does not hold a JSON object: save or download it again.")
    return description


def _check_description(description: Mapping[str, Any], path: Path, model: nn.Module) -> tuple[AdapterConfig, list[str]]:
    version = description.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{path} has format_version {version!r}: it was not written by save_pretrained.")
    if version > FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version}, newer than {FORMAT_VERSION}: upgrade the package.")
    base, layers = description.get("base_model"), description.get("layers")
    if not isinstance(base, dict) or not isinstance(layers, list) or not all(isinstance(x, str) for x in layers):
        raise ValueError(f"{path} lacks base_model or layers: save it again.")
    made_for, here = base.get("class"), type(model).__name__
    if made_for != here:
        raise ValueError(f"{path} was made for {made_for}, this model is {here}: load it on the model it was made for.")
    if base.get("fingerprint") != fingerprint(model):
        raise ValueError(
            f"{path} was made for a {made_for} with other parameter shapes than this one: "
            "load it on the model it was made for, or a fine-tune of that."
        )
    try:
        return AdapterConfig.from_dict(description.get("config", {})), layers
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _choose_saved(layers: list[str], findings: list[Finding], path: Path) -> list[Finding]:
    convertible = {finding.name: finding for finding in findings if finding.reason is None}
    unknown = [name for name in layers if name not in convertible]
    if unknown or not layers or len(set(layers)) != len(layers):
        problem = f"layer {unknown[0]!r}, which this model cannot convert" if unknown else "no or repeated layers"
        raise ValueError(f"{path} lists {problem}: the file was changed, or upgrade flatten_diffusion.")
    return [finding for finding in findings if finding.name in set(layers)]


def _is_trained(mixer: Mixer) -> bool:
    """Whether a mixer adds anything: all it learns starts at zero but the first factor of LoRA."""
    return any(bool(p.any()) for name, p in mixer.named_parameters() if name.rpartition(".")[2] != "lora_A")


def _fill(mixers: Mapping[str, Mixer], tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    expected = {f"{layer}.{name}": t for layer, mixer in mixers.items() for name, t in mixer.state_dict().items()}
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    for kind, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            raise ValueError(f"{path} {kind} {min(names)!r} ({len(names)} such): save or download the adapter again.")
    for name, target in expected.items():
        tensor = tensors[name]
        if tensor.shape != target.shape:
            raise ValueError(f"{path}: {name} has shape {list(tensor.shape)} and must have {list(target.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {tensor.dtype} and must be floating point.")
    for layer, mixer in mixers.items():
        state = {name: tensors[f"{layer}.{name}"] for name in mixer.state_dict()}
        if any(tensor.is_meta for tensor in mixer.state_dict().values()):
            mixer.to_empty(device="cpu")
        mixer.load_state_dict(state)
