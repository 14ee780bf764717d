"""What each process of `test_parallel.py` runs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize

from ..models.tiny import build, stir
from ..ops.split_worker import join, leave


def run(rank: int, size: int, folder: str) -> None:
    join(rank, size, folder)
    for name, config, height in (
        ("pixart", AdapterConfig(min_tokens=0, deltas=("q", "out")), 10),
        ("pixart", AdapterConfig(min_tokens=40, mixer=FocusedLinearConfig(kernel_size=0)), 10),
        ("dit", AdapterConfig(mixer=FocusedLinearConfig(kernel_size=3)), None),
    ):
        tiny = build(name)
        adapter = linearize(tiny.model, config)
        stir(adapter)
        inputs = tiny.inputs if height is None else tiny.inputs | {"hidden_states": torch.randn(2, 4, height, 8)}
        layers = [layer for _, layer, _ in adapter.converted_layers()]
        for layer in layers:
            layer.min_tokens = 0  # the yardstick is linear, as the split is
        with torch.inference_mode():
            expected = tiny.model(**inputs, return_dict=False)[0]
            for layer in layers:
                layer.min_tokens = config.min_tokens
            calls: list[int] = []
            block = tiny.model.transformer_blocks[0]
            handle = block.register_forward_hook(lambda m, a, y, calls=calls: calls.append(y.shape[1]))
            with adapter.token_parallel() as model:
                actual = model(**inputs, return_dict=False)[0]
                with pytest.raises(RuntimeError, match="softmax needs all"), adapter.disabled():
                    pass
            handle.remove()
            assert torch.allclose(actual, expected, atol=2e-5), name
            share = torch.tensor(float(calls[0]))
            dist.all_reduce(share)
            grid = layers[0].last_grid
            assert calls[0] < grid[0] * grid[1] == int(share)  # each holds its part only
            again = tiny.model(**inputs, return_dict=False)[0]
            assert all(layer.min_tokens == config.min_tokens for layer in layers)
        assert torch.equal(again, expected) or config.min_tokens > 0
    with pytest.raises(RuntimeError, match="for inference"), adapter.token_parallel() as model:
        model(**inputs)
    leave(size, folder)
