"""FSDP2, DDP and tensor parallelism over two CPU processes (gloo), against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


@pytest.mark.slow
@pytest.mark.compatibility(
    "FSDP2", "order matters", "convert, then `fully_shard`; sharded first is refused; merge before sharding"
)
def test_converted_then_fully_sharded(tmp_path: Path) -> None:
    from .shard_worker import run_fsdp2

    mp.spawn(run_fsdp2, args=(2, str(tmp_path)), nprocs=2, join=True)


@pytest.mark.slow
@pytest.mark.compatibility("DDP", "order matters", "convert, then wrap: parameters made later are not synchronised")
def test_converted_then_replicated(tmp_path: Path) -> None:
    from .shard_worker import run_ddp

    mp.spawn(run_ddp, args=(2, str(tmp_path)), nprocs=2, join=True)


@pytest.mark.slow
@pytest.mark.compatibility("Tensor parallelism", "refused", "of layers that are sharded already; see `token_parallel`")
def test_tensor_parallel_layers_are_refused(tmp_path: Path) -> None:
    from .shard_worker import run_tensor_parallel

    mp.spawn(run_tensor_parallel, args=(2, str(tmp_path)), nprocs=2, join=True)
