"""An adapter read from a folder or the Hub, checked wholly before a model is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import nn

from ..files import parse_json, read_json
from ..mixers import LayerMixer
from ..models import LayerInfo, find_attention_layers
from .adapter import Adapter
from .config import AdapterConfig
from .convert import (
    attach,
    build_layers,
    check_in_place,
    check_processors,
    check_supported,
    check_unconverted,
    resolve_model,
)
from .fingerprint import class_name, fingerprint
from .saving import CONFIG_NAME, DIGEST, FORMAT_VERSION, HEADER, WEIGHTS_NAME, signature

logger = logging.get_logger(__name__)

_AGAIN = "save or download it again"


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
            where that is "auto", layers with trained weights stay converted at every size.

    Returns:
        The adapter, as from `linearize`.

    Raises:
        TypeError: no model found.
        ValueError: the model is converted already; the adapter was made for another model, by another version's format,
            or with an unknown mixer or setting; keys, shapes or values do not fit.
        OSError: a file is missing, unreadable, truncated or damaged, or the Hub cannot provide it.
    """
    if min_tokens is not None:
        AdapterConfig(min_tokens=min_tokens)
    model = resolve_model(model_or_pipeline)
    found = find_attention_layers(model)
    check_unconverted(model, found)
    config_path, weights_path = _locate(path_or_hub_id, revision, token, cache_dir, local_files_only)
    tensors, description = _read(config_path, weights_path)
    config, names = _check_description(description, config_path, model)
    if min_tokens is not None:
        config = replace(config, min_tokens=min_tokens)
    chosen = _choose_saved(names, found, config_path)
    check_in_place(model)
    check_processors(chosen)
    check_supported(chosen, config)
    layers = build_layers(chosen, config)
    trained = _fill(layers, tensors, weights_path)
    return attach(model, config, found, layers, trained if min_tokens is None else ())


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


def _read(config_path: Path, weights_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, and the description that they are signed with.

    The weights carry it; a file rewritten by another tool may lack it, and then the config's has to fit.
    """
    try:
        with safe_open(weights_path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, RecursionError) as error:
        reason = str(error)[:200]
        raise OSError(f"{weights_path} is truncated or no safetensors file ({reason}): {_AGAIN}.") from error
    own = _object(metadata[HEADER], f"{weights_path}'s header") if HEADER in metadata else None
    given = _object(config_path, str(config_path))
    for path, found in ((weights_path, own), (config_path, given)):
        if found is not None:
            _check_version(found.get("format_version"), path)
    if own is None:
        own, path = given, config_path
    else:
        path = weights_path
        if given.get(DIGEST) != own.get(DIGEST):
            # A save was cut off between its two files: the weights are newer and describe themselves.
            logger.warning(f"{config_path} belongs to an earlier save than {WEIGHTS_NAME}: using what that file says.")
        elif given != own:
            raise OSError(f"{config_path} is damaged or was edited (it says other than {WEIGHTS_NAME}): {_AGAIN}.")
    if own.get(DIGEST) != signature(tensors, own):
        raise OSError(f"{path} is damaged (its checksum fits neither tensors nor settings): {_AGAIN}.")
    return tensors, own


def _object(source: Path | str, name: str) -> dict[str, Any]:
    try:
        value = read_json(source) if isinstance(source, Path) else parse_json(source, name)
    except ValueError as error:
        raise OSError(f"{error}: {_AGAIN}.") from error
    if not isinstance(value, dict):
        raise OSError(f"{name} does not hold a JSON object: {_AGAIN}.")
    return value


def _check_version(version: object, path: Path) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{path} has format_version {version!r:.40}: it was not written by save_pretrained.")
    if version < FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, of flatten_diffusion 0.1: this version reads {FORMAT_VERSION} only; "
            "distil again, or load it with flatten_diffusion 0.1."
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r:.40}, newer than {FORMAT_VERSION}: upgrade the package."
        )


def _check_description(description: Mapping[str, Any], path: Path, model: nn.Module) -> tuple[AdapterConfig, list[str]]:
    base, layers = description.get("base_model"), description.get("layers")
    if not isinstance(base, dict) or not isinstance(layers, list) or not all(isinstance(x, str) for x in layers):
        raise ValueError(f"{path} lacks base_model or layers: save it again.")
    made_for, here = base.get("class"), class_name(model)
    if made_for != here:
        raise ValueError(
            f"{path} was made for {made_for!r:.80}, this model is {here}: load it on the model it was made for."
        )
    if base.get("fingerprint") != fingerprint(model):
        raise ValueError(
            f"{path} was made for a {here} with other parameter shapes than this one: "
            "load it on the model it was made for, or a fine-tune of that."
        )
    try:
        config = AdapterConfig.from_dict(description.get("config", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {str(error)[:300]}") from error
    if not set(config.overrides) <= set(layers):
        raise ValueError(f"{path} has overrides for layers that it does not convert: {_AGAIN}.")
    return config, layers


def _choose_saved(layers: list[str], found: list[LayerInfo], path: Path) -> list[LayerInfo]:
    convertible = {info.name: info for info in found if info.reason is None}
    unknown = [name for name in layers if name not in convertible]
    if unknown or not layers or len(set(layers)) != len(layers):
        problem = f"layer {unknown[0]!r:.200}, which this model cannot convert" if unknown else "no or repeated layers"
        raise ValueError(f"{path} lists {problem}: the file was changed, or upgrade flatten_diffusion.")
    return [info for info in found if info.name in set(layers)]


def _fill(layers: Mapping[str, LayerMixer], tensors: Mapping[str, torch.Tensor], path: Path) -> Sequence[str]:
    """Load the tensors into fresh layers; returns the names of those that differ from fresh ones, which are trained."""
    fresh = {f"{layer}.{name}": t for layer, mixer in layers.items() for name, t in mixer.state_dict().items()}
    missing, unexpected = fresh.keys() - tensors.keys(), tensors.keys() - fresh.keys()
    for kind, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            raise ValueError(f"{path} {kind} {min(names)!r:.200} ({len(names)} such): {_AGAIN}.")
    for name, target in fresh.items():
        tensor = tensors[name]
        if tensor.shape != target.shape:
            raise ValueError(f"{path}: {name} has shape {list(tensor.shape)} and must have {list(target.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {tensor.dtype} and must be floating point.")
        if not tensor.to(target.dtype).isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite in the layer's {target.dtype}: {_AGAIN}.")
    trained = [layer for layer, mixer in layers.items() if _differs(layer, mixer, tensors)]
    for layer, mixer in layers.items():
        if any(tensor.is_meta for tensor in mixer.state_dict().values()):
            mixer.to_empty(device="cpu")
        mixer.load_state_dict({name: tensors[f"{layer}.{name}"] for name in mixer.state_dict()})
    return trained


def _differs(layer: str, fresh: LayerMixer, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether saved tensors are not those that a fresh layer starts with (which are the same every time)."""
    for name, start in fresh.state_dict().items():
        saved = tensors[f"{layer}.{name}"]
        if start.is_meta or not torch.equal(start.detach().cpu().to(saved.dtype), saved):
            return True
    return False
