"""Numbers of settings, checked where they come in."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any


def number(default: Any, low: float, high: float) -> Any:
    """A dataclass field that `check_numbers` holds between `low` and `high`; a whole number where both are."""
    return field(default=default, metadata={"bounds": (low, high)})


def check_numbers(settings: Any) -> None:
    """Check the fields of a dataclass that are made by `number`; None passes where the annotation says so.

    Raises:
        ValueError: another type, NaN, or out of bounds; names the field.
    """
    for part in fields(settings):
        value = getattr(settings, part.name)
        if "bounds" not in part.metadata or (value is None and "None" in str(part.type)):
            continue
        low, high = part.metadata["bounds"]
        whole = isinstance(low, int)
        fits = isinstance(value, int) or (isinstance(value, float) and not whole)
        if not fits or isinstance(value, bool) or not low <= value <= high:
            kind = "whole number" if whole else "number"
            raise ValueError(f"{part.name} is {str(value)[:40]}: pass a {kind} from {low} to {high}.")
