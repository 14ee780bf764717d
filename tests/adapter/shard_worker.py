"""What each process of `test_sharded.py` runs: a model sharded or replicated over processes, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from flatten_diffusion import AdapterConfig, linearize, load_adapter, restore

from ..models.tiny import build, stir
from ..models.tiny_wrapped import build_wrapped
from ..ops.split_worker import join, leave

CONFIG = AdapterConfig(deltas=("q", "out"), delta_rank=2)
BLOCKS = ("BasicTransformerBlock", "JointTransformerBlock")


def tiny_of(name: str) -> Any:
    return build_wrapped(name) if name == "sd3" else build(name)


def loss_of(tiny: Any, model: Any = None, rank: int | None = None) -> torch.Tensor:
    """Over the whole batch of two, or over the sample of a rank."""
    inputs = dict(tiny.inputs)
    if rank is not None:
        inputs = {k: v[rank : rank + 1] if v.dim() and len(v) == 2 else v for k, v in inputs.items()}
    output = (tiny.model if model is None else model)(**inputs, return_dict=False)[0]
    return output.square().mean()


def shard(model: torch.nn.Module, mesh: Any) -> None:
    for module in [m for m in model.modules() if type(m).__name__ in BLOCKS]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def pair(name: str) -> tuple[Any, Any, Any, Any]:
    one, many = tiny_of(name), tiny_of(name)
    adapters = [linearize(tiny.model, CONFIG) for tiny in (one, many)]
    for adapter in adapters:
        stir(adapter)
    loss_of(one).backward()
    return one, adapters[0], many, adapters[1]


def assert_gradients(adapter: Any, wanted: Any, label: str) -> None:
    grads = dict(wanted.named_parameters())
    for name, parameter in adapter.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(
            grad, grads[name].grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{label} {n} {m}"
        )


def run_fsdp2(rank: int, size: int, folder: str) -> None:
    join(rank, size, folder)
    mesh = init_device_mesh("cpu", (size,))
    for name in ("sd15", "sd3"):
        one, alone, many, together = pair(name)
        with torch.no_grad(), alone.disabled():
            native = one()
        shard(many.model, mesh)
        loss_of(many, rank=rank).backward()
        assert_gradients(together, alone, name)
        # Collective: every process gathers, and writes where it is told.
        paths = [Path(folder, f"{name}-{rank}-{kind}") for kind in ("alone", "together")]
        alone.save_pretrained(paths[0])
        together.save_pretrained(paths[1])
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (paths[0] / file).read_bytes() == (paths[1] / file).read_bytes(), (name, file)
        for adapter in (alone, together):
            torch.optim.SGD(adapter.parameters(), lr=0.1).step()
        with torch.no_grad():
            torch.testing.assert_close(many(), one(), rtol=1e-4, atol=1e-5)
            with together.disabled():
                assert torch.equal(many(), native)
            with pytest.raises(ValueError, match="holds DTensor: quantised and sharded weights do not merge"):
                together.merge()
            restore(many.model)
            assert torch.equal(many(), native)
            late = tiny_of(name)
            shard(late.model, mesh)
            with pytest.raises(ValueError, match="attn1? is sharded already: convert the model first, then shard"):
                linearize(late.model)
            with pytest.raises(ValueError, match="attn1? is sharded already: convert the model first, then shard"):
                load_adapter(late.model, paths[1])
            torch.testing.assert_close(late(), native)
    leave(size, folder)


def run_ddp(rank: int, size: int, folder: str) -> None:
    join(rank, size, folder)
    for name in ("sd15", "sd3"):
        _, alone, many, together = pair(name)
        many.model.requires_grad_(False)
        together.requires_grad_()
        replica = DistributedDataParallel(many.model)
        loss_of(many, replica, rank).backward()
        assert_gradients(together, alone, name)
        restore(replica)
        late = tiny_of(name)
        adapter = linearize(DistributedDataParallel(late.model))  # found inside the wrapper, but not synchronised by it
        assert adapter.model is late.model
    leave(size, folder)


def run_tensor_parallel(rank: int, size: int, folder: str) -> None:
    join(rank, size, folder)
    tiny = build("pixart")
    with torch.no_grad():
        native = tiny()
    attn = tiny.model.transformer_blocks[0].attn1
    parallelize_module(attn, init_device_mesh("cpu", (size,)), {"to_q": ColwiseParallel(), "to_k": ColwiseParallel()})
    with pytest.raises(ValueError, match="transformer_blocks.0.attn1 is sharded already: convert the model first"):
        linearize(tiny.model)
    assert native.isfinite().all()
    leave(size, folder)
