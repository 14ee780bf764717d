"""`python -m flatten_eval`: the same as the command `flatten-eval`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
