"""Tokens of one image over two and three CPU processes, unevenly: exact against one process."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flatten_diffusion.ops import even_rows
from flatten_diffusion.ops.focused_linear.distributed import _plan

from .split_worker import run, run_messages, run_subgroup

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

HALF = {"dtype": torch.bfloat16, "tolerance": 1e-2}
SINGLE = {"dtype": torch.float32, "tolerance": 1e-5}


def spawn(worker, processes, folder, *arguments):
    mp.spawn(worker, args=(processes, str(folder), *arguments), nprocs=processes, join=True)


def test_two_processes(tmp_path):
    cases = [
        {"rows": (5, 2), "width": 3, "kernel": 5},
        {"rows": (1, 6), "width": 4, "kernel": 5, "masked": True, "poison": float("nan")},
        {"rows": (3, 4), "width": 5, "kernel": 0, "masked": True},
        {"rows": (9, 1), "width": 1, "kernel": 3, "power": 2.5},
        {"rows": (4, 4), "width": 3, "kernel": 1},
        {"rows": (3, 2), "width": 7, "kernel": 3, "shape": (1, 3, 40), **SINGLE},
        {"rows": (3, 2), "width": 7, "kernel": 3, "shape": (1, 3, 40), **HALF},
        {"rows": (3, 2), "width": 7, "kernel": 5, "shape": (1, 3, 40), "dtype": torch.float16, "tolerance": 4e-3},
        {"rows": (1, 6), "width": 4, "kernel": 3, "maps": True, "masked": True, "poison": float("nan")},
        {"rows": (3, 2), "width": 7, "kernel": 0, "maps": True, "shape": (1, 3, 40), **HALF},
    ]
    spawn(run, 2, tmp_path, cases)


def test_three_processes(tmp_path):
    """A middle process thinner than the kernel reaches: its neighbours' rows travel past it."""
    cases = [
        {"rows": (4, 1, 3), "width": 3, "kernel": 5},
        {"rows": (2, 1, 1), "width": 4, "kernel": 7, "masked": True},
        {"rows": (1, 5, 2), "width": 2, "kernel": 3, "masked": True, "poison": float("inf")},
        {"rows": (3, 3, 2), "width": 3, "kernel": 0},
        {"rows": (4, 1, 2), "width": 3, "kernel": 5, "maps": True},
    ]
    spawn(run, 3, tmp_path, cases)


def test_the_kernels_under_the_interpreter(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cases = [
        {"rows": (3, 2), "width": 7, "kernel": 3, "shape": (1, 2, 20), "backend": "triton", **SINGLE},
        {"rows": (1, 3), "width": 5, "kernel": 5, "masked": True, "poison": math.nan, "backend": "triton", **SINGLE},
        {
            "rows": (1, 2),
            "width": 5,
            "kernel": 3,
            "masked": True,
            "poison": math.nan,
            "maps": True,
            "shape": (2, 2, 20),
            "backend": "triton",
            **SINGLE,
        },
    ]
    spawn(run, 2, tmp_path, cases)


def test_a_group_that_is_not_everyone(tmp_path):
    spawn(run_subgroup, 3, tmp_path)


def test_wrong_rows_are_named_before_anything_travels(tmp_path):
    spawn(run_messages, 2, tmp_path)


@pytest.mark.parametrize(("height", "processes", "rows"), [(7, 3, (3, 2, 2)), (4, 4, (1, 1, 1, 1)), (5, 1, (5,))])
def test_even_rows(height, processes, rows):
    assert even_rows(height, processes) == rows


def test_too_few_rows():
    with pytest.raises(ValueError, match="2 rows cannot be split over 3 processes"):
        even_rows(2, 3)


@pytest.mark.parametrize("reach", [1, 2, 3])
@pytest.mark.parametrize("rows", [(4, 1, 3), (1, 1, 1, 1), (8, 2), (2, 6, 1, 5)])
def test_what_is_sent_is_what_is_received(rows, reach):
    """In rows of the whole grid: each process gets exactly the rows within reach, in order, from their owners."""
    starts = [sum(rows[:index]) for index in range(len(rows))]

    def edge_rows(rank):
        own = list(range(starts[rank], starts[rank] + rows[rank]))
        return own if len(own) <= 2 * reach else own[:reach] + own[-reach:]

    for rank, start in enumerate(starts):
        stop = start + rows[rank]
        wanted = [row for row in range(start - reach, stop + reach) if 0 <= row < sum(rows) and not start <= row < stop]
        _, receives, total = _plan(rows, reach, rank)
        halo = [None] * total
        for peer, first, last in receives:
            sent = [edge_rows(peer)[a:b] for to, a, b in _plan(rows, reach, peer)[0] if to == rank]
            assert len(sent) == 1
            halo[first:last] = sent[0]
        assert halo == wanted
