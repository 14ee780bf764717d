"""State dictionaries of published networks: .safetensors, or a .pth of nothing but tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import InputError


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors by name, on the CPU.

    Raises:
        InputError: damaged, or anything but tensors by name.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged safetensors file ({error}); download it again") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises many kinds
        raise InputError(f"{path}: neither TorchScript nor a state dictionary of tensors; download it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: holds {type(state).__name__}, not a state dictionary; download it again")
    return state


def require_tensors(
    path: Path, state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], network: str
) -> None:
    """Raises InputError where `state` lacks a tensor of `expected` or has it in another shape.

    Args:
        network: what the file should be the weights of, for the message.
    """
    missing = [key for key in expected if key not in state]
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    for kind, keys in (("lacks", missing), ("has another shape for", wrong)):
        if keys:
            raise InputError(f"{path}: {kind} {keys[0]} ({len(keys)} keys); not the weights of {network}")
