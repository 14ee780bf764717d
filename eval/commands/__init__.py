"""One module per subcommand: add_arguments(parser), and run(arguments) -> Outcome, or None on helper processes."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Protocol, cast

from .outcome import Outcome

COMMANDS = {
    "fid": "Fréchet distance (FID for Inception), KID, CMMD, precision/recall, CLIP score of images against real ones",
    "statistics": "save statistics of a set of images as .npz (mu, sigma as pytorch-fid; count, extractor, resize)",
    "generate": "images of a pipeline, with or without an adapter: one PNG per (prompt, seed), resumable",
    "throughput": "seconds per step and image of SDPA, the conversion and the attention-free floor, at several sizes",
    "compare": "original beside converted: distance, alignment, pairs, speed, memory, and an HTML report",
}
"""Name and one line of help of every subcommand; the module has the same name."""


class Command(Protocol):
    """What a subcommand's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> Outcome | None: ...


def load_command(name: str) -> Command:
    """The module of one subcommand. Only the one that runs is imported: some bring diffusers along."""
    return cast(Command, import_module(f".{name}", __name__))
