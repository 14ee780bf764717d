"""Which part of the work is this process's, under `accelerate launch` or alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

import torch

from .errors import InputError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Rank and number of processes, and this one's device."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in rank order, on every process."""
        if self.world == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def resolve_device(name: str) -> torch.device:
    """The device by name; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: not available here ({first_line(error)}); try --device cpu") from error
    return device


def join_processes(device: str) -> Processes:
    """Joins the group that `accelerate launch` or `torchrun` started; a single process otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, resolve_device(device))
    from accelerate import PartialState

    state = PartialState(cpu=resolve_device(device).type == "cpu")
    return Processes(state.process_index, state.num_processes, state.device)
