"""Parallel tests of one thread each, and marks for what a developer may leave out: `pytest -m 'not slow'`."""

from __future__ import annotations

import os

# Before torch: two processes of two threads on two cores run tenfold slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# Parts of node ids: processes, interpreters, whole command lines.
SLOW = (
    "hopper",
    "interpreter",
    "test_distributed.py",
    "test_parallel.py",
    "test_train_scenes.py",
    "test_quickstart.py",
    "examples/test_highres.py",
    "test_script.py",
    "test_trains_a_model",
    "test_two_runs_in_one_folder",
    "test_eval_throughput.py",
    "test_mutated",
    "test_interrupted",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what compiles, what is slow, and the newer model families, whose tests are those of the older ones."""
    from .models.tiny_newer import NEWER

    for item in items:
        parameters = getattr(item, "callspec", None)
        newer = parameters is not None and parameters.params.get("name") in NEWER
        compiles = "compil" in item.nodeid
        if compiles:
            item.add_marker(pytest.mark.compile)
        if compiles or newer or any(part in item.nodeid for part in SLOW):
            item.add_marker(pytest.mark.slow)
