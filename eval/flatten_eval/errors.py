"""The two ways a command can end other than well; each carries one line for the user."""


class InputError(Exception):
    """Wrong use or input: exit code 2. The message names the thing, what is wrong and what to do."""


class RefusedComparison(Exception):
    """Two things that must not be compared: exit code 3."""


def first_line(error: BaseException) -> str:
    """Of an error's message, or its class's name where it has none; at most 300 characters."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
