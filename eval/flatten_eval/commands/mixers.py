"""`flatten-diffusion mixers`: what can take the place of softmax."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from flatten_diffusion.mixers import list_mixers
from flatten_diffusion.mixers.registry import mixer_class

from .options import Outcome, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(arguments: argparse.Namespace) -> Outcome:
    """Every registered mixer: settings with their defaults, cost, what it supports."""
    classes = {name: mixer_class(name) for name in list_mixers()}
    result: dict[str, dict[str, Any]] = {
        name: {
            "summary": cls.summary,
            "tokens": cls.cost,
            "supports": sorted(cls.supports),
            "settings": asdict(cls.Config()),
        }
        for name, cls in classes.items()
    }
    rows = [[name, cls.cost, cls.summary] for name, cls in classes.items()]
    lines = [table(["mixer", "tokens", ""], rows), ""]
    for name, about in result.items():
        settings = ", ".join(f"{key}={value}" for key, value in about["settings"].items())
        lines.append(f"{name}: {settings}")
    return Outcome("\n".join(lines), {"command": "mixers", "mixers": result})
