"""Pipelines with two denoisers (Wan 2.2) are converted, saved and restored as one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatten_diffusion import AdapterConfig, linearize, load_adapter, restore

from ..models.tiny import stir
from ..models.tiny_wrapped import build_wrapped


def _pipeline() -> tuple[Any, list[Any]]:
    models = [build_wrapped("wan") for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].model.parameters():
            parameter.mul_(1.1)
    return SimpleNamespace(transformer=models[0].model, transformer_2=models[1].model), models


@pytest.mark.compatibility("Two denoisers (Wan 2.2)", "works", "one adapter for both")
def test_both_are_converted_saved_and_restored(tmp_path: Path) -> None:
    pipeline, models = _pipeline()
    with torch.no_grad():
        native = [tiny() for tiny in models]
        adapter = linearize(pipeline)
        stir(adapter)
        converted = [tiny() for tiny in models]
        assert not any(torch.equal(a, b) for a, b in zip(native, converted, strict=True))
        names = {name.split(".")[0] for name in adapter.layers}
        assert names == {"transformer", "transformer_2"}
        assert {row.name.split(".")[0] for row in adapter.report()} == names
        with adapter.disabled():
            assert all(torch.equal(tiny(), expected) for tiny, expected in zip(models, native, strict=True))
        with pytest.raises(ValueError, match="converted already"):
            linearize(pipeline.transformer_2)
        adapter.save_pretrained(tmp_path)
        fresh, others = _pipeline()
        loaded = load_adapter(fresh, tmp_path)
        assert loaded.layers == adapter.layers
        assert all(torch.equal(tiny(), expected) for tiny, expected in zip(others, converted, strict=True))
        restore(pipeline.transformer_2)  # one of them: the adapter is both's
        assert all(torch.equal(tiny(), expected) for tiny, expected in zip(models, native, strict=True))
    assert not any(hasattr(part, "flatten_adapter") for part in vars(pipeline).values())
    with pytest.raises(ValueError, match="made for 'Denoisers', this model is WanTransformer3DModel"):
        load_adapter(pipeline.transformer, tmp_path)


def test_one_may_be_chosen() -> None:
    pipeline, models = _pipeline()
    with torch.no_grad():
        native = [tiny() for tiny in models]
        linearize(pipeline, AdapterConfig(include=("transformer_2.*",)))
        assert torch.equal(models[0](), native[0]) and not torch.equal(models[1](), native[1])
        restore(pipeline)
        assert torch.equal(models[1](), native[1])
