"""The two ways a command can end other than well; each carries one line for the user."""

from __future__ import annotations


class InputError(Exception):
    """Wrong use or input: exit code 2. The message names the thing, what is wrong and what to do."""


class RefusedComparison(Exception):
    """Two things that must not be compared: exit code 3."""
