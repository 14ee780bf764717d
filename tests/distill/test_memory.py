from __future__ import annotations

import diffusers
import torch

from flatten_diffusion import linearize
from flatten_diffusion.distill import DistillSettings


def test_teacher_and_student_share_an_sd15_shaped_unet() -> None:
    """What the adapter adds, gradients and optimizer state not counted, is below 5 % of the model."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
    model = sum(parameter.numel() for parameter in unet.parameters())
    assert model > 850e6
    adapter = linearize(unet)
    assert len(adapter.layers) == 16
    settings = DistillSettings()
    adapter.add_deltas(settings.projections, settings.rank)
    added = sum(parameter.numel() for parameter in adapter.parameters())
    everything = sum(tensor.numel() for tensor in (*unet.parameters(), *unet.buffers()))
    assert everything == model + added
    assert 0 < added < 0.05 * model
