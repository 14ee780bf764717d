"""One thread per process: tests run in parallel, and two threads each on two cores slow them down tenfold."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
