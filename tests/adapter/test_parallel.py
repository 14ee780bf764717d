"""A whole model with its tokens split over two and three CPU processes: the output of one."""

from __future__ import annotations

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from flatten_diffusion import AdapterConfig, linearize

from ..models.tiny import build
from .split_worker import run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


@pytest.mark.compatibility(
    "Tokens of one image over processes", "works", "`token_parallel`, for inference with PixArt and DiT"
)
@pytest.mark.parametrize("processes", [2, 3])
def test_the_output_is_that_of_one_process(processes, tmp_path):
    mp.spawn(run, args=(processes, str(tmp_path)), nprocs=processes, join=True)


def test_what_cannot_be_split_is_named():
    unet = linearize(build("sd15").model)
    with pytest.raises(ValueError, match="not UNet2DConditionModel"), unet.token_parallel():
        pass
    partly = linearize(build("pixart").model, AdapterConfig(exclude=("transformer_blocks.0.*",)))
    with pytest.raises(ValueError, match="transformer_blocks.0.attn1 stayed softmax"), partly.token_parallel():
        pass
    windows = linearize(build("pixart").model, AdapterConfig(window=4))
    with pytest.raises(ValueError, match="attn1: windows cannot be split over processes"), windows.token_parallel():
        pass
    with pytest.raises(RuntimeError, match="torchrun"), linearize(build("pixart").model).token_parallel():
        pass
