"""Numbers checked where they come in."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def check_numbers(settings: Any, **bounds: tuple[float, float]) -> None:
    """Check fields of a dataclass against (lowest, highest); whole numbers where both are.

    None passes where the field's annotation says so.

    Raises:
        ValueError: another type, NaN, or out of bounds; names the field.
    """
    optional = {field.name for field in fields(settings) if "None" in str(field.type)}
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        if value is None and name in optional:
            continue
        whole = isinstance(low, int) and isinstance(high, int)
        fits = isinstance(value, int) or (isinstance(value, float) and not whole)
        if not fits or isinstance(value, bool) or not low <= value <= high:
            kind = "whole number" if whole else "number"
            raise ValueError(f"{name} is {str(value)[:40]}: pass a {kind} from {low} to {high}.")
