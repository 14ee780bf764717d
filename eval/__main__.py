"""`python -m eval` from a checkout; the installed command is `flatten-eval`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
