"""What each process of `test_distributed.py` runs: its share of one image against the whole image in this process."""

from __future__ import annotations

import datetime
import time
from typing import Any

import torch
import torch.distributed as dist

from flatten_diffusion.ops import focused_linear_attention, split_focused_linear_attention

from .focused_cases import MAPS, attend, make_inputs, relative_error

TOKENS = ("query", "key", "value")
PARAMETERS = ("scale", *MAPS, "conv_weight", "conv_bias")


def join(rank: int, size: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=datetime.timedelta(minutes=5)
    )


def leave(size: int, folder: str) -> None:
    """Together: a process that goes while another still reads from it breaks that one's connection."""
    store = dist.FileStore(f"{folder}/done", size)
    store.add("done", 1)
    while store.add("done", 0) < size:
        time.sleep(0.01)
    dist.destroy_process_group()


def run(rank: int, size: int, folder: str, cases: list[dict[str, Any]]) -> None:
    join(rank, size, folder)
    for case in cases:
        check(rank, **case)
    leave(size, folder)


def check(
    rank: int,
    rows: tuple[int, ...],
    width: int,
    kernel: int,
    dtype: torch.dtype = torch.float64,
    backend: str = "auto",
    masked: bool = False,
    poison: float | None = None,
    shape: tuple[int, int, int] = (2, 2, 8),
    tolerance: float = 1e-12,
    power: float = 3.0,
    maps: bool = False,
) -> None:
    """Output and every gradient; those of the parameters add up over the processes."""
    batch, heads, head_dim = shape
    inputs = make_inputs((batch, (sum(rows), width), heads, head_dim), dtype=dtype, kernel=max(kernel, 1), maps=maps)
    if kernel == 0:
        del inputs["conv_weight"], inputs["conv_bias"], inputs["grid"]
    direction = torch.randn(inputs["query"].shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, sum(rows) * width, generator=torch.Generator().manual_seed(5)) > 0.4
        mask[0, : rows[0] * width] = False  # a process without any key of this sample
        mask[-1] = False  # a sample without any key at all
    whole = {name: t.clone().requires_grad_() if torch.is_tensor(t) else t for name, t in inputs.items()}
    options = {"focusing_factor": power, "backend": backend}
    expected = attend(**whole, key_mask=mask, **options)
    expected.backward(direction)

    start = sum(rows[:rank]) * width
    own = slice(start, start + rows[rank] * width)
    mine: dict[str, Any] = {}
    for name, tensor in inputs.items():
        if torch.is_tensor(tensor):
            part = tensor[:, own].clone() if name in TOKENS else tensor.clone()
            if poison is not None and mask is not None and name in ("key", "value"):
                part[~mask[:, own]] = poison
            mine[name] = part.requires_grad_()
    options |= {"rows": rows if kernel else None, "key_mask": None if mask is None else mask[:, own]}
    actual = attend(split_focused_linear_attention, **mine, **options)
    actual.backward(direction[:, own])
    label = f"rank {rank} of {rows}, kernel {kernel}, {dtype}, {backend}, maps {maps}"
    assert actual.dtype == dtype
    assert relative_error(actual, expected[:, own]) < tolerance, label
    for name in TOKENS:
        assert relative_error(mine[name].grad, whole[name].grad[:, own]) < tolerance, (label, name)
    for name in PARAMETERS:
        if name in mine:
            total = mine[name].grad.double()
            dist.all_reduce(total)
            assert relative_error(total, whole[name].grad) < tolerance, (label, name)
    with torch.inference_mode():
        again = attend(split_focused_linear_attention, **{name: t.detach() for name, t in mine.items()}, **options)
    assert torch.equal(again, actual)


def run_subgroup(rank: int, size: int, folder: str) -> None:
    """Two of three processes share an image; ranks inside the group differ from those outside."""
    join(rank, size, folder)
    group = dist.new_group([1, 2])
    if rank > 0:
        inputs = make_inputs((1, (5, 3), 2, 8))
        expected = focused_linear_attention(**inputs)
        own = slice(0, 6) if rank == 1 else slice(6, 15)
        mine = {name: t[:, own] if name in TOKENS else t for name, t in inputs.items() if torch.is_tensor(t)}
        assert relative_error(
            split_focused_linear_attention(**mine, rows=(2, 3), group=group), expected[:, own]
        ) < 1e-12  # fmt: skip
    leave(size, folder)


def run_messages(rank: int, size: int, folder: str) -> None:
    """Every process raises, before anything travels."""
    join(rank, size, folder)
    inputs = make_inputs((1, (4, 3), 2, 8))
    mine = {name: inputs[name] for name in (*TOKENS, "conv_weight")}
    for change, message in (
        ({"rows": (4,)}, "rows is [4]: pass 2 whole numbers"),
        ({"rows": (4, 0)}, "rows is [4, 0]"),
        ({"rows": (5, 5)}, f"Process {rank} has 12 tokens and 5 rows"),
        ({"rows": None}, "conv_weight is given without rows"),
        ({"rows": (4, 4), "backend": "reference"}, "'reference' runs in one process"),
        ({"rows": (4, 4), "scale": torch.ones(3)}, "scale has shape (3,)"),
        ({"rows": (4, 4), "key_map": (torch.ones(8, 8), torch.ones(2, 8))}, "key_map's weight has shape (8, 8)"),
    ):
        try:
            split_focused_linear_attention(**{**mine, **change})
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    leave(size, folder)
