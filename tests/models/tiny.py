"""Tiny random models of the real classes, with inputs and the token grids that their attention layers must see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

_UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
}


@dataclass
class Tiny:
    """A model, a call of it, and what a conversion must find."""

    model: nn.Module
    inputs: dict[str, Any]
    picture: str  # name of the input whose last two sizes may be exchanged
    converted: int
    total: int
    grids: set[tuple[int, int]] = field(default_factory=set)

    def __call__(self, model: nn.Module | None = None, **changes: Any) -> torch.Tensor:
        """All outputs of one call, flat."""
        output = (self.model if model is None else model)(**{**self.inputs, **changes})
        output = output if isinstance(output, (tuple, torch.Tensor)) else tuple(output.values())
        parts = [output] if isinstance(output, torch.Tensor) else output
        parts = [p for part in parts for p in (part if isinstance(part, (list, tuple)) else [part])]
        return torch.cat([part.flatten() for part in parts])

    def turned(self) -> dict[str, torch.Tensor]:
        """The image input with height and width exchanged: as many tokens, another grid."""
        turned = {self.picture: self.inputs[self.picture].transpose(-1, -2).contiguous()}
        if "controlnet_cond" in self.inputs:
            turned["controlnet_cond"] = self.inputs["controlnet_cond"].transpose(-1, -2).contiguous()
        return turned


def unet2d() -> Tiny:
    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return Tiny(model, {"sample": torch.randn(1, 3, 16, 24), "timestep": torch.tensor(5)}, "sample", 4, 4)


def _conditional(model: nn.Module, converted: int, grids: set[tuple[int, int]], **more: torch.Tensor) -> Tiny:
    inputs = {
        "sample": torch.randn(2, 4, 16, 24),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        **more,
    }
    return Tiny(model, inputs, "sample", converted, 2 * converted, grids)


def sd15() -> Tiny:
    return _conditional(diffusers.UNet2DConditionModel(**_UNET, attention_head_dim=2), 4, {(16, 24), (8, 12)})


def sd21() -> Tiny:
    model = diffusers.UNet2DConditionModel(
        **_UNET, attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True
    )
    return _conditional(model, 4, {(16, 24), (8, 12)})


def sdxl() -> Tiny:
    model = diffusers.UNet2DConditionModel(
        **{
            **_UNET,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    added = {"text_embeds": torch.randn(2, 24), "time_ids": torch.randn(2, 6)}
    return _conditional(model, 8, {(8, 12)}, added_cond_kwargs=added)


def controlnet() -> Tiny:
    model = diffusers.ControlNetModel(
        in_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(8, 16),
    )
    for parameter in model.parameters():  # its zero convolutions would hide everything
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return _conditional(model, 2, {(16, 24), (8, 12)}, controlnet_cond=torch.randn(2, 3, 32, 48))


def unclip() -> Tiny:
    """Self and cross attention under one softmax: nothing to convert."""
    model = diffusers.UNet2DConditionModel(
        **{
            **_UNET,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        },
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
    )
    return _conditional(model, 0, set())


def unet_motion() -> Tiny:
    model = diffusers.UNetMotionModel(
        **{
            **_UNET,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        },
        num_attention_heads=2,
        motion_num_attention_heads=2,
        use_motion_mid_block=True,
    )
    inputs = {
        "sample": torch.randn(1, 4, 4, 8, 12),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(4, 7, 24),
    }
    return Tiny(model, inputs, "sample", 4, 22, {(8, 12), (4, 6)})


def unet3d() -> Tiny:
    model = diffusers.UNet3DConditionModel(
        **{
            **_UNET,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        attention_head_dim=8,
    )
    inputs = {
        "sample": torch.randn(1, 4, 4, 8, 12),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(1, 7, 24),
    }
    return Tiny(model, inputs, "sample", 4, 18, {(8, 12), (4, 6)})


def svd() -> Tiny:
    model = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=4,
        num_frames=2,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=24,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    inputs = {
        "sample": torch.randn(1, 2, 8, 8, 12),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(1, 1, 24),
        "added_time_ids": torch.randn(1, 3),
    }
    return Tiny(model, inputs, "sample", 4, 16, {(8, 12), (4, 6)})


def uvit2d(downsample: bool = False) -> Tiny:
    model = diffusers.UVit2DModel(
        hidden_size=32,
        cond_embed_dim=16,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=24,
        vocab_size=33,
        codebook_size=32,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        sample_size=8,
        downsample=downsample,
        upsample=downsample,
    )
    inputs = {
        "input_ids": torch.randint(0, 32, (2, 6, 8)),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "pooled_text_emb": torch.randn(2, 16),
        "micro_conds": torch.randn(2, 5),
    }
    return Tiny(model, inputs, "input_ids", 2, 8, {(3, 4) if downsample else (6, 8)})


def uvit2d_downsampled() -> Tiny:
    return uvit2d(downsample=True)


def dit() -> Tiny:
    model = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "class_labels": torch.tensor([1, 2]),
    }
    return Tiny(model, inputs, "hidden_states", 2, 2, {(4, 4)})


def pixart() -> Tiny:
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=24,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 12),
        "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "encoder_attention_mask": torch.ones(2, 7),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }
    return Tiny(model, inputs, "hidden_states", 2, 4, {(4, 6)})


def latte() -> Tiny:
    model = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=24,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "encoder_hidden_states": torch.randn(2, 7, 24),
    }
    return Tiny(model, inputs, "hidden_states", 1, 3, {(4, 4)})


CONVERTIBLE: dict[str, Callable[[], Tiny]] = {
    build.__name__: build
    for build in (
        unet2d,
        sd15,
        sd21,
        sdxl,
        controlnet,
        unet_motion,
        unet3d,
        svd,
        uvit2d,
        uvit2d_downsampled,
        dit,
        pixart,
        latte,
    )
}


def build(name: str, seed: int = 0) -> Tiny:
    """The tiny model `name`, in eval mode, the same at every call with the same seed."""
    torch.manual_seed(seed)
    tiny = {**CONVERTIBLE, "unclip": unclip}[name]()
    tiny.model.eval()
    return tiny


def stir(adapter: Any, seed: int = 1) -> None:
    """Random values in everything an adapter learns, so that no parameter is without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def train_towards_original(tiny: Any, adapter: Any, steps: int) -> list[float]:
    """Steps of Adam on the distance to the original's output; the loss before each."""
    with torch.no_grad(), adapter.disabled():
        target = tiny()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (tiny() - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def assert_untouched(model: torch.nn.Module, keys: list[str], modules: list[Any]) -> None:
    """Nothing of a conversion is left: the same tensors and modules as before, no hooks, no attributes."""
    assert list(model.state_dict()) == keys and list(model.named_modules()) == modules
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_pre_hooks_with_kwargs
        assert not any(attribute.startswith("flatten_") for attribute in vars(module))


def assert_compiled_gradients(tiny: Any, adapter: Any) -> None:
    """Compiled and with gradient checkpointing, every parameter of the adapter gets the gradient it has without."""
    tiny.model.train()
    expected = torch.autograd.grad(tiny().square().sum(), list(adapter.parameters()))
    tiny.model.enable_gradient_checkpointing()
    torch._dynamo.reset()
    compiled = torch.compile(tiny.model, backend="aot_eager", dynamic=False)
    ours = torch.autograd.grad(tiny(compiled).square().sum(), list(adapter.parameters()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * expected[0].abs().max().item())
