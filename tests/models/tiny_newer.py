"""Tiny random models of the families that joined later: newer image models, ControlNets, video and audio."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from flatten_diffusion.mixers import Grid

from .tiny_parts import R, T, TinyWrapped, flux_like, picture, position_ids, text_mask, turn, wake

STREAM = {"attention_head_dim": 16, "num_attention_heads": 2}


def _sized(model: nn.Module, counts: tuple[int, int, int], grid: Grid, name: str, **inputs: Any) -> TinyWrapped:
    """A model that is given its image as the argument `name`, as well as images of its size under other names."""
    pictures = [name, *(n for n in ("controlnet_cond", "padding_mask", "latents", "condition_mask") if n in inputs)]
    turned = {n: turn(inputs[n]) for n in pictures}
    return TinyWrapped(wake(model), inputs, turned, grid, (*grid[:-2], grid[-1], grid[-2]), *counts)


# ---- UNets ----


def unclip() -> TinyWrapped:
    model = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8, block_out_channels=(16,),
        cross_attention_dim=24, down_block_types=("SimpleCrossAttnDownBlock2D",), attention_head_dim=8,
        up_block_types=("SimpleCrossAttnUpBlock2D",), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    return _sized(
        model, (4, 4, 4), (4, 6), "sample", sample=R(2, 4, 4, 6), timestep=T(5), encoder_hidden_states=R(2, 7, 24)
    )


def cascade() -> TinyWrapped:
    model = diffusers.StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16, block_out_channels=(16,),
        num_attention_heads=(2,), down_num_layers_per_block=(1,), up_num_layers_per_block=(1,), dropout=(0.0,),
        down_blocks_repeat_mappers=(1,), up_blocks_repeat_mappers=(1,), clip_text_pooled_in_channels=8,
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),),
    )  # fmt: skip
    return _sized(
        model, (2, 2, 2), (4, 6), "sample", sample=R(2, 4, 4, 6), timestep_ratio=T([0.5, 0.5]),
        clip_text_pooled=R(2, 1, 8),
    )  # fmt: skip


def kandinsky3() -> TinyWrapped:
    model = diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=8, groups=2, attention_head_dim=4, layers_per_block=2,
        block_out_channels=(8, 8, 8, 8), cross_attention_dim=12, encoder_hid_dim=12,
    )  # fmt: skip
    tiny = _sized(
        model, (2, 19, 0), (8, 12), "sample", sample=R(2, 4, 16, 24), timestep=T(5),
        encoder_hidden_states=R(2, 7, 12), encoder_attention_mask=torch.ones(2, 7),
    )  # fmt: skip
    tiny.include = ["down_blocks.1.*", "up_blocks.2.*"]  # of one size
    return tiny


def dreamlite() -> TinyWrapped:
    model = diffusers.DreamLiteUNetModel(
        block_out_channels=(16,), down_block_types=("DreamLiteCrossAttnDownBlock2D",), layers_per_block=1,
        up_block_types=("DreamLiteCrossAttnUpBlock2D",), cross_attention_dim=24, attention_head_dim=2,
        norm_num_groups=8,
    )  # fmt: skip
    return _sized(
        model, (4, 8, 0), (4, 6), "sample", sample=R(2, 4, 4, 6), timestep=T(5), encoder_hidden_states=R(2, 7, 24)
    )


# ---- images ----


def cogview3plus() -> TinyWrapped:
    model = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=24, time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    return picture(
        model, (2, 2, 2), hidden_states=R(2, 4, 8, 12), encoder_hidden_states=R(2, 7, 24), timestep=T([5, 5]),
        original_size=R(2, 2), target_size=R(2, 2), crop_coords=R(2, 2),
    )  # fmt: skip


def luminanext() -> TinyWrapped:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = diffusers.LuminaNextDiT2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3,
        num_kv_heads=1, multiple_of=16, ffn_dim_multiplier=None, cross_attention_dim=32,
    )  # fmt: skip
    nn.init.ones_(model.pad_token)  # uninitialised, and unused
    return picture(
        wake(model), (2, 4, 0), hidden_states=R(2, 4, 8, 12), timestep=T([0.5, 0.5]),
        encoder_hidden_states=R(2, 7, 32), encoder_mask=text_mask(),
        image_rotary_emb=get_2d_rotary_pos_embed_lumina(8, 384, 384), cross_attention_kwargs={},
    )  # fmt: skip


def ovis() -> TinyWrapped:
    model = diffusers.OvisImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8), **STREAM,
    )  # fmt: skip
    return flux_like(model)


def longcat() -> TinyWrapped:
    model = diffusers.LongCatImageTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=24, pooled_projection_dim=24,
        axes_dims_rope=[4, 4, 8], **STREAM,
    )  # fmt: skip
    return flux_like(model)


def bria() -> TinyWrapped:
    model = diffusers.BriaTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=24, axes_dims_rope=[0, 8, 8], **STREAM
    )
    return flux_like(model)


def briafibo() -> TinyWrapped:
    model = diffusers.BriaFiboTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=24, axes_dims_rope=[0, 8, 8],
        text_encoder_dim=12, **STREAM,
    )  # fmt: skip
    return flux_like(model, text_encoder_layers=[R(2, 7, 12), R(2, 7, 12)])


def briafibo2() -> TinyWrapped:
    model = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4, patch_size=2, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=24,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2,
        gist_min_text_len=4, gist_max_text_len=8, axes_dims=(4, 6, 6), axes_lens=(64, 32, 32),
    )  # fmt: skip
    return picture(
        wake(model), (3, 6, 2), hidden_states=R(2, 4, 8, 12), timestep=T([0.5, 0.5]),
        encoder_hidden_states=R(2, 2, 7, 24), encoder_attention_mask=text_mask(),
    )  # fmt: skip


def flux3() -> TinyWrapped:
    model = diffusers.Flux3Transformer2DModel(
        in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=24,
        timestep_channels=16, axes_dims_rope=(4, 4, 4, 4), **STREAM,
    )  # fmt: skip
    reference = position_ids(3, 3, picture=1, columns=4)
    tiny = flux_like(wake(model), columns=4, image_cond_hidden_states=R(2, 9, 4), image_cond_ids=reference)
    tiny.grid, tiny.turned_grid = ((1, 4, 6), (1, 3, 3)), ((1, 6, 4), (1, 3, 3))
    tiny.converted, tiny.total, tiny.joint, tiny.include = 1, 4, 1, ["single_transformer_blocks.*"]
    return tiny


def krea2() -> TinyWrapped:
    model = diffusers.Krea2Transformer2DModel(
        in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=24, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    ids = [torch.cat([torch.zeros(7, 3), position_ids(*size)]) for size in ((4, 6), (6, 4))]
    inputs = {
        "hidden_states": R(2, 24, 4),
        "encoder_hidden_states": R(2, 7, 2, 24),
        "timestep": T([0.5, 0.5]),
        "position_ids": ids[0],
        "encoder_attention_mask": text_mask(),
    }
    return TinyWrapped(wake(model), inputs, {"position_ids": ids[1]}, (4, 6), (6, 4), 2, 4, 2)


def ideogram4() -> TinyWrapped:
    model = diffusers.Ideogram4Transformer2DModel(
        in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=32, adaln_dim=8,
        llm_features_dim=24, mrope_section=(4, 2, 2),
    )  # fmt: skip
    home = inspect.getmodule(diffusers.Ideogram4Transformer2DModel)
    indicator = torch.full((2, 31), home.OUTPUT_IMAGE_INDICATOR)
    indicator[:, :7] = home.LLM_TOKEN_INDICATOR
    indicator[1, :2] = 0
    segments = torch.ones(2, 31, dtype=torch.long)
    segments[1, :2] = -1

    def ids(*size: int) -> torch.Tensor:
        return torch.cat([torch.zeros(7, 3), position_ids(*size) + 2**16]).long()[None].repeat(2, 1, 1)

    inputs = {
        "hidden_states": R(2, 31, 4),
        "timestep": T([0.5, 0.5]),
        "encoder_hidden_states": R(2, 31, 24),
        "position_ids": ids(4, 6),
        "segment_ids": segments,
        "indicator": indicator,
    }
    return TinyWrapped(wake(model), inputs, {"position_ids": ids(6, 4)}, (4, 6), (6, 4), 2, 2, 2)


def ernie() -> TinyWrapped:
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=4, out_channels=4,
        patch_size=2, text_in_dim=24, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return picture(
        wake(model), (2, 2, 2), hidden_states=R(2, 4, 8, 12), timestep=T([5, 5]), text_bth=R(2, 7, 24),
        text_lens=T([7, 5]),
    )  # fmt: skip


def glm() -> TinyWrapped:
    model = diffusers.GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=24, time_embed_dim=8, condition_dim=4, prior_vq_quantizer_codebook_size=16,
    )  # fmt: skip
    return picture(
        model, (2, 2, 2), hidden_states=R(2, 4, 8, 12), encoder_hidden_states=R(2, 7, 24),
        prior_token_id=torch.randint(0, 16, (2, 24)), prior_token_drop=T([False, False]), timestep=T([5, 5]),
        target_size=R(2, 2), crop_coords=R(2, 2),
    )  # fmt: skip


def qwenimage21() -> TinyWrapped:
    """A reference of 2 x 4 tokens stands between its text and the target's."""
    model = diffusers.QwenImage21Transformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, context_in_dim=24, axes_dims_rope=(4, 4, 8), **STREAM
    )
    mask = torch.zeros(2, 7 + 2 + 6, dtype=torch.bool)
    mask[:, 3:5] = mask[:, 9:] = True
    text = torch.ones(2, 9, dtype=torch.bool)
    text[1, 0] = False
    inputs = {
        "hidden_states": R(2, 8 + 24, 4),
        "encoder_hidden_states": R(2, 9, 24),
        "timestep": T([0.5, 0.5]),
        "img_shapes": [[(1, 2, 4), (1, 4, 6)]] * 2,
        "img_mask": mask,
        "encoder_hidden_states_mask": text,
    }
    turned = {"img_shapes": [[(1, 2, 4), (1, 6, 4)]] * 2}
    return TinyWrapped(wake(model), inputs, turned, (1, 4, 6), (1, 6, 4), 2, 2, 2)


def nucleus() -> TinyWrapped:
    model = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, num_key_value_heads=1, joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8), moe_enabled=False, capacity_factors=[1.0, 1.0], **STREAM,
    )  # fmt: skip
    inputs = {
        "hidden_states": R(2, 24, 16),
        "img_shapes": [(1, 4, 6)] * 2,
        "encoder_hidden_states": R(2, 7, 24),
        "encoder_hidden_states_mask": text_mask(),
        "timestep": T([0.5, 0.5]),
    }
    return TinyWrapped(wake(model), inputs, {"img_shapes": [(1, 6, 4)] * 2}, (1, 4, 6), (1, 6, 4), 2, 2, 2)


def hunyuanimage() -> TinyWrapped:
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=(2, 2),
        text_embed_dim=16, rope_axes_dim=(8, 8), **STREAM,
    )  # fmt: skip
    return picture(
        model, (2, 3, 2), hidden_states=R(2, 4, 8, 12), timestep=T([5.0, 5.0]), encoder_hidden_states=R(2, 7, 16),
        encoder_attention_mask=text_mask().float(),
    )  # fmt: skip


def joyimage() -> TinyWrapped:
    model = diffusers.JoyImageEditTransformer3DModel(
        in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=24, num_layers=2, rope_dim_list=[4, 6, 6]
    )
    return picture(
        wake(model), (2, 2, 2), (2, 4, 6), hidden_states=R(2, 2, 4, 1, 8, 12), timestep=T([5, 5]),
        encoder_hidden_states=R(2, 7, 24),
    )  # fmt: skip


def joyimageplus() -> TinyWrapped:
    model = diffusers.JoyImageEditPlusTransformer3DModel(
        in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=24, num_layers=2, rope_dim_list=[4, 6, 6]
    )
    inputs = {
        "hidden_states": R(2, 24, 4, 1, 2, 2),
        "timestep": T([5, 5]),
        "encoder_hidden_states": R(2, 7, 24),
        "encoder_hidden_states_mask": text_mask().float(),
        "shape_list": [[(1, 4, 6)]] * 2,
    }
    return TinyWrapped(wake(model), inputs, {"shape_list": [[(1, 6, 4)]] * 2}, (1, 4, 6), (1, 6, 4), 2, 2, 2)


def kandinsky5() -> TinyWrapped:
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=24, in_text_dim2=8, time_dim=16, out_visual_dim=4, model_dim=32, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip

    def positions(*size: int) -> Any:
        return [torch.arange(n) for n in size]

    inputs = {
        "hidden_states": R(2, 2, 8, 12, 4),
        "encoder_hidden_states": R(2, 7, 24),
        "timestep": T([0.5, 0.5]),
        "pooled_projections": R(2, 8),
        "visual_rope_pos": positions(2, 4, 6),
        "text_rope_pos": torch.arange(7),
    }
    turned = {"hidden_states": inputs["hidden_states"].transpose(2, 3), "visual_rope_pos": positions(2, 6, 4)}
    return TinyWrapped(wake(model), inputs, turned, (2, 4, 6), (2, 6, 4), 2, 5)


def kandinsky6() -> TinyWrapped:
    model = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=24, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6), visual_cond=False, in_audio_dim=4, out_audio_dim=4,
    )  # fmt: skip
    inputs = {
        "hidden_states": R(2, 2, 8, 12, 4),
        "encoder_hidden_states": R(2, 7, 24),
        "timestep": T([0.5, 0.5]),
        "pooled_projections": R(2, 8),
        "audio_hidden_states": R(2, 10, 4),
    }
    turned = {"hidden_states": inputs["hidden_states"].transpose(2, 3)}
    include = ["*.video_dec_block.self_attention"]
    return TinyWrapped(wake(model), inputs, turned, (2, 4, 6), (2, 6, 4), 1, 8, include=include)


def cosmos() -> TinyWrapped:
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, text_embed_dim=24, adaln_lora_dim=4, max_size=(4, 32, 32),
        extra_pos_embed_type=None, mlp_ratio=2.0, concat_padding_mask=False, **STREAM,
    )  # fmt: skip
    return picture(
        wake(model), (2, 4, 0), (2, 4, 6), hidden_states=R(2, 4, 2, 8, 12), timestep=T([0.5, 0.5]),
        encoder_hidden_states=R(2, 7, 24),
    )  # fmt: skip


def cosmos3() -> TinyWrapped:
    """One sample: a prompt of seven tokens, then a video of two frames; 31 rotary channels by axis."""
    model = diffusers.Cosmos3OmniTransformer(
        head_dim=16, hidden_size=32, intermediate_size=32, latent_channel=4, num_attention_heads=2, num_hidden_layers=2,
        num_key_value_heads=1, patch_latent_dim=16, vocab_size=20, rope_axes_dim=(4, 2, 2),
    )  # fmt: skip
    video = R(1, 4, 2, 8, 12)
    inputs = {
        "input_ids": torch.arange(7),
        "text_indexes": torch.arange(7),
        "position_ids": torch.arange(55)[None].repeat(3, 1),
        "und_len": 7,
        "sequence_length": 55,
        "vision_tokens": [video],
        "vision_token_shapes": [(2, 4, 6)],
        "vision_sequence_indexes": torch.arange(7, 55),
        "vision_mse_loss_indexes": torch.arange(7, 55),
        "vision_timesteps": torch.full((48,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }
    turned = {"vision_tokens": [turn(video)], "vision_token_shapes": [(2, 6, 4)]}
    return TinyWrapped(wake(model), inputs, turned, (2, 4, 6), (2, 6, 4), 2, 2, 2, batch=1)


def minimaxh3() -> TinyWrapped:
    """[7 text, 4 audio, 2 x 4 x 6 video]."""
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=2, num_refiner_layers=1, ffn_dim=32,
        in_channels=4, audio_in_channels=4, text_dim=24, freq_dim=16, time_embed_hidden_dim=16, time_embed_dim=16,
        rope_freq_dim=2,
    )  # fmt: skip

    def ids(height: int, width: int) -> torch.Tensor:
        frames = [position_ids(height, width) * T([0.0, 0.5, 0.5]) + T([7 + 5 / 3 * f, 0.0, 0.0]) for f in range(2)]
        others = torch.zeros(11, 3)
        others[:7, 0], others[7:, 0] = torch.arange(7.0), 7 + torch.arange(4.0)
        return torch.cat([others, *frames])

    tags = torch.zeros(59, dtype=torch.long)
    inputs = {
        "hidden_states": R(2, 48, 16),
        "audio_hidden_states": R(2, 4, 4),
        "encoder_hidden_states": R(2, 7, 24),
        "timestep": T([0.5]),
        "timestep_indices": tags,
        "token_tags": tags,
        "position_ids": ids(4, 6),
        "video_indices": torch.arange(11, 59),
        "audio_indices": torch.arange(7, 11),
        "text_indices": torch.arange(7),
    }
    return TinyWrapped(wake(model), inputs, {"position_ids": ids(6, 4)}, (2, 4, 6), (2, 6, 4), 2, 3, 2)


def sanavideo() -> TinyWrapped:
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=24,
        sample_size=8, patch_size=(1, 2, 2), rope_max_seq_len=32,
    )  # fmt: skip
    tiny = picture(
        wake(model), (2, 4, 0), (2, 4, 6), hidden_states=R(2, 4, 2, 8, 12), timestep=T([5, 5]),
        encoder_hidden_states=R(2, 7, 24), encoder_attention_mask=torch.ones(2, 7),
    )  # fmt: skip
    tiny.include = ["*.attn1"]
    return tiny


# ---- ControlNets ----


def sd3_controlnet() -> TinyWrapped:
    model = diffusers.SD3ControlNetModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=24, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    return _sized(
        model, (2, 2, 2), (4, 6), "hidden_states", hidden_states=R(2, 4, 8, 12), controlnet_cond=R(2, 4, 8, 12),
        timestep=T([5, 5]), encoder_hidden_states=R(2, 7, 24), pooled_projections=R(2, 24),
    )  # fmt: skip


def flux_controlnet() -> TinyWrapped:
    model = diffusers.FluxControlNetModel(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=24, pooled_projection_dim=24,
        axes_dims_rope=[4, 4, 8], num_mode=3, **STREAM,
    )  # fmt: skip
    mode = torch.zeros(2, 1, dtype=torch.long)
    return flux_like(wake(model), pooled_projections=R(2, 24), controlnet_cond=R(2, 24, 4), controlnet_mode=mode)


def qwen_controlnet() -> TinyWrapped:
    model = diffusers.QwenImageControlNetModel(
        in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=24, axes_dims_rope=(4, 4, 8), **STREAM
    )
    inputs = {
        "hidden_states": R(2, 24, 16),
        "controlnet_cond": R(2, 24, 16),
        "encoder_hidden_states": R(2, 7, 24),
        "encoder_hidden_states_mask": text_mask(),
        "timestep": T([0.5, 0.5]),
        "img_shapes": [[(1, 4, 6)]] * 2,
    }
    return TinyWrapped(wake(model), inputs, {"img_shapes": [[(1, 6, 4)]] * 2}, (1, 4, 6), (1, 6, 4), 2, 2, 2)


def hunyuandit_controlnet() -> TinyWrapped:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    model = diffusers.HunyuanDiT2DControlNetModel(
        sample_size=8, patch_size=2, in_channels=4, transformer_num_layers=4, attention_head_dim=8,
        num_attention_heads=2, hidden_size=16, cross_attention_dim=24, cross_attention_dim_t5=24,
        pooled_projection_dim=8, text_len=4, text_len_t5=4, activation_fn="gelu-approximate",
    )  # fmt: skip
    ropes = [get_2d_rotary_pos_embed(8, ((0, 0), size), size, output_type="pt") for size in ((4, 6), (6, 4))]
    tiny = _sized(
        model, (1, 2, 0), (4, 6), "hidden_states", hidden_states=R(2, 4, 8, 12), controlnet_cond=R(2, 4, 8, 12),
        timestep=T([5.0, 5.0]), encoder_hidden_states=R(2, 4, 24), text_embedding_mask=torch.ones(2, 4),
        encoder_hidden_states_t5=R(2, 4, 24), text_embedding_mask_t5=torch.ones(2, 4), image_meta_size=R(2, 6),
        style=T([0, 0]), image_rotary_emb=ropes[0],
    )  # fmt: skip
    tiny.turn["image_rotary_emb"] = ropes[1]
    return tiny


def sana_controlnet() -> TinyWrapped:
    model = diffusers.SanaControlNetModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=24,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    tiny = _sized(
        model, (2, 4, 0), (8, 12), "hidden_states", hidden_states=R(2, 4, 8, 12), controlnet_cond=R(2, 4, 8, 12),
        timestep=T([5, 5]), encoder_hidden_states=R(2, 7, 24), encoder_attention_mask=torch.ones(2, 7),
    )  # fmt: skip
    tiny.include = ["*.attn1"]
    return tiny


def zimage_controlnet() -> TinyWrapped:
    """With the layers that `from_transformer` gives it."""
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, qk_norm=True, cap_feat_dim=24, rope_theta=256.0, t_scale=1000.0, axes_dims=[4, 4, 8],
        axes_lens=[256, 32, 32],
    )  # fmt: skip
    model = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 1], control_refiner_layers_places=[0], control_in_dim=4, dim=32, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    model = diffusers.ZImageControlNetModel.from_transformer(model, transformer)
    for parameter in (model.x_pad_token, model.cap_pad_token):
        nn.init.zeros_(parameter)
    model.gradient_checkpointing = False  # its own __init__ forgets it, and its forward reads it under gradients
    pictures, controls = [R(4, 1, 8, 12), R(4, 1, 8, 12)], [R(4, 1, 8, 12), R(4, 1, 8, 12)]
    inputs = {
        "x": pictures,
        "t": T([0.5, 0.5]),
        "cap_feats": [R(7, 24), R(40, 24)],
        "control_context": controls,
    }
    turned = {"x": [turn(x) for x in pictures], "control_context": [turn(x) for x in controls]}
    return TinyWrapped(wake(model), inputs, turned, (1, 4, 6), (1, 6, 4), 4, 5, 4)


def cosmos_controlnet() -> TinyWrapped:
    pytest.importorskip("torchvision", reason="its forward resizes a mask with torchvision")
    model = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2, in_channels=10, latent_channels=6, model_channels=32, text_embed_dim=24,
        adaln_lora_dim=4, max_size=(4, 32, 32), mlp_ratio=2.0, **STREAM,
    )  # fmt: skip
    tiny = _sized(
        model, (2, 4, 0), (2, 4, 6), "controls_latents", controls_latents=R(2, 8, 2, 8, 12), latents=R(2, 4, 2, 8, 12),
        timestep=T([0.5, 0.5]), encoder_hidden_states=R(2, 7, 24), condition_mask=torch.zeros(2, 1, 2, 8, 12),
        padding_mask=torch.zeros(1, 1, 8, 12),
    )  # fmt: skip
    return tiny


# ---- videos ----

_WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip


def _wan_like(model: nn.Module, counts: tuple[int, int, int] = (2, 4, 0), **more: Any) -> TinyWrapped:
    inputs = {"timestep": T([5, 5]), "encoder_hidden_states": R(2, 7, 16), **more}
    return picture(wake(model), counts, (2, 4, 6), hidden_states=R(2, 4, 2, 8, 12), **inputs)


def chronoedit() -> TinyWrapped:
    return _wan_like(diffusers.ChronoEditTransformer3DModel(**_WAN))


def skyreels() -> TinyWrapped:
    return _wan_like(diffusers.SkyReelsV2Transformer3DModel(**_WAN))


def wanvace() -> TinyWrapped:
    tiny = _wan_like(
        diffusers.WanVACETransformer3DModel(**_WAN, vace_layers=[0], vace_in_channels=4), (3, 6, 0),
        control_hidden_states=R(2, 4, 2, 8, 12),
    )  # fmt: skip
    tiny.turn["control_hidden_states"] = turn(tiny.inputs["control_hidden_states"])
    return tiny


def wananimate() -> TinyWrapped:
    model = diffusers.WanAnimateTransformer3DModel(
        **{**_WAN, "in_channels": 12}, latent_channels=4, image_dim=None, motion_encoder_size=16, motion_style_dim=8,
        motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4}, motion_dim=4, motion_encoder_dim=8,
        face_encoder_hidden_dim=8, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    hidden, pose = R(2, 12, 2, 8, 12), R(2, 4, 1, 8, 12)
    inputs = {
        "hidden_states": hidden,
        "timestep": T([5, 5]),
        "encoder_hidden_states": R(2, 7, 16),
        "pose_hidden_states": pose,
        "face_pixel_values": R(2, 3, 4, 16, 16),
    }
    turned = {"hidden_states": turn(hidden), "pose_hidden_states": turn(pose)}
    return TinyWrapped(wake(model), inputs, turned, (2, 4, 6), (2, 6, 4), 2, 5)


def anyflow() -> TinyWrapped:
    model = diffusers.AnyFlowTransformer3DModel(**{**_WAN, "attention_head_dim": 24})
    return picture(
        wake(model), (2, 4, 0), (2, 4, 6), hidden_states=R(2, 2, 4, 8, 12), timestep=torch.full((2, 2), 5.0),
        r_timestep=torch.full((2, 2), 3.0), encoder_hidden_states=R(2, 7, 16),
    )  # fmt: skip


def helios() -> TinyWrapped:
    """With short history of one frame before two."""
    model = diffusers.HeliosTransformer3DModel(
        **{key: value for key, value in _WAN.items() if key != "rope_max_seq_len"}, rope_dim=(4, 4, 4)
    )
    hidden, short = R(2, 4, 2, 8, 12), R(2, 4, 1, 8, 12)
    middle, long = R(2, 4, 2, 8, 12), R(2, 4, 4, 8, 12)
    index = torch.arange(9)[None].repeat(2, 1)
    inputs = {
        "hidden_states": hidden,
        "timestep": T([5, 5]),
        "encoder_hidden_states": R(2, 7, 16),
        "indices_hidden_states": index[:, 7:],
        "indices_latents_history_short": index[:, 6:7],
        "indices_latents_history_mid": index[:, 4:6],
        "indices_latents_history_long": index[:, :4],
        "latents_history_short": short,
        "latents_history_mid": middle,
        "latents_history_long": long,
    }
    turned = {name: turn(value) for name, value in inputs.items() if value.dim() == 5}
    grid = ((1, 1, 2), (1, 2, 3), (1, 4, 6), (2, 4, 6))
    return TinyWrapped(wake(model), inputs, turned, grid, tuple((f, w, h) for f, h, w in grid), 2, 4)


def ltx2() -> TinyWrapped:
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=24,
    )  # fmt: skip
    inputs = {
        "hidden_states": R(2, 48, 4),
        "audio_hidden_states": R(2, 10, 4),
        "encoder_hidden_states": R(2, 7, 24),
        "audio_encoder_hidden_states": R(2, 7, 24),
        "timestep": T([5.0, 5.0]),
        "encoder_attention_mask": torch.ones(2, 7),
        "audio_encoder_attention_mask": torch.ones(2, 7),
        "num_frames": 2,
        "height": 4,
        "width": 6,
        "audio_num_frames": 10,
    }
    turned = {"height": 6, "width": 4}
    return TinyWrapped(wake(model), inputs, turned, (2, 4, 6), (2, 6, 4), 2, 12, include=["*.attn1"])


def hunyuanvideo15() -> TinyWrapped:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=12,
        image_embed_dim=8, rope_axes_dim=(4, 6, 6), **STREAM,
    )  # fmt: skip
    return picture(
        wake(model), (2, 3, 2), (2, 4, 6), hidden_states=R(2, 4, 2, 4, 6), timestep=T([5.0, 5.0]),
        encoder_hidden_states=R(2, 7, 16), encoder_attention_mask=text_mask().float(),
        encoder_hidden_states_2=R(2, 7, 12), encoder_attention_mask_2=text_mask().flip(0).float(),
        image_embeds=torch.zeros(2, 3, 8),
    )  # fmt: skip


def framepack() -> TinyWrapped:
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2,
        text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), has_image_proj=True, image_proj_dim=8,
        has_clean_x_embedder=True, **STREAM,
    )  # fmt: skip
    inputs = {
        "hidden_states": R(2, 4, 2, 8, 12),
        "timestep": T([5, 5]),
        "encoder_hidden_states": R(2, 7, 16),
        "encoder_attention_mask": text_mask().float(),
        "pooled_projections": R(2, 8),
        "image_embeds": R(2, 3, 8),
        "indices_latents": T([7, 8]),
        "guidance": T([5.0, 5.0]),
        "latents_clean": R(2, 4, 1, 8, 12),
        "indices_latents_clean": T([6]),
        "latents_history_2x": R(2, 4, 2, 8, 12),
        "indices_latents_history_2x": T([4, 5]),
        "latents_history_4x": R(2, 4, 4, 8, 12),
        "indices_latents_history_4x": torch.arange(4),
    }
    turned = {name: turn(value) for name, value in inputs.items() if value.dim() == 5}
    grid = ((1, 1, 2), (1, 2, 3), (1, 4, 6), (2, 4, 6))
    return TinyWrapped(wake(model), inputs, turned, grid, tuple((f, w, h) for f, h, w in grid), 2, 3, 2)


def motifvideo() -> TinyWrapped:
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, patch_size=2, text_embed_dim=16,
        rope_axes_dim=(4, 6, 6), enable_text_cross_attention_dual=True, **STREAM,
    )  # fmt: skip
    return picture(
        wake(model), (2, 3, 2), (2, 4, 6), hidden_states=R(2, 4, 2, 8, 12), timestep=T([5, 5]),
        encoder_hidden_states=R(2, 7, 16), encoder_attention_mask=text_mask(),
    )  # fmt: skip


def easyanimate() -> TinyWrapped:
    model = diffusers.EasyAnimateTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=2, num_layers=2, mmdit_layers=1, sample_width=12, sample_height=8,
        time_embed_dim=8, text_embed_dim=24, **STREAM,
    )  # fmt: skip
    return picture(
        wake(model), (2, 2, 2), (2, 4, 6), hidden_states=R(2, 4, 2, 8, 12), timestep=T([5, 5]),
        encoder_hidden_states=R(2, 7, 24),
    )  # fmt: skip


def consisid() -> TinyWrapped:
    model = diffusers.ConsisIDTransformer3DModel(
        in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=24, num_layers=2, sample_width=12,
        sample_height=8, sample_frames=9, patch_size=2, max_text_seq_length=7,
        use_rotary_positional_embeddings=True, **STREAM,
    )  # fmt: skip
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    ropes = [get_3d_rotary_pos_embed(16, ((0, 0), size), size, 3) for size in ((4, 6), (6, 4))]
    tiny = picture(
        wake(model), (2, 2, 2), (3, 4, 6), hidden_states=R(2, 3, 4, 8, 12), encoder_hidden_states=R(2, 7, 24),
        timestep=T([5, 5]), image_rotary_emb=ropes[0],
    )  # fmt: skip
    tiny.turn["image_rotary_emb"] = ropes[1]
    return tiny


# ---- audio ----


def acestep() -> TinyWrapped:
    model = diffusers.AceStepTransformer1DModel(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, in_channels=12, audio_acoustic_hidden_dim=4, patch_size=2, sliding_window=4,
        encoder_hidden_size=24,
    )  # fmt: skip
    inputs = {
        "hidden_states": R(2, 31, 4),
        "timestep": T([0.5, 0.5]),
        "timestep_r": T([0.5, 0.5]),
        "encoder_hidden_states": R(2, 7, 24),
        "context_latents": R(2, 31, 8),
    }
    longer = {"hidden_states": R(2, 40, 4), "context_latents": R(2, 40, 8)}
    return TinyWrapped(wake(model), inputs, longer, (1, 16), (1, 20), 1, 4)


def stableaudio3() -> TinyWrapped:
    model = diffusers.StableAudio3DiTModel(
        io_channels=4, embed_dim=64, depth=2, num_heads=2, cond_token_dim=24, global_cond_dim=8, local_add_cond_dim=4,
        timestep_features_dim=8, ff_mult=1.0, num_memory_tokens=5, use_differential_attention=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": R(2, 4, 16),
        "timestep": T([0.5, 0.5]),
        "encoder_hidden_states": R(2, 7, 24),
        "global_hidden_states": R(2, 8),
    }
    return TinyWrapped(wake(model), inputs, {"hidden_states": R(2, 4, 20)}, (1, 16), (1, 20), 2, 4, 2)


def longcataudio() -> TinyWrapped:
    model = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=24, latent_dim=4, ff_mult=1.0, use_latent_condition=False
    )
    inputs = {
        "hidden_states": R(2, 16, 4),
        "encoder_hidden_states": R(2, 7, 24),
        "encoder_attention_mask": text_mask(),
        "timestep": T([0.5, 0.5]),
        "attention_mask": torch.ones(2, 16, dtype=torch.bool),
    }
    longer = {"hidden_states": R(2, 20, 4), "attention_mask": torch.ones(2, 20, dtype=torch.bool)}
    return TinyWrapped(wake(model), inputs, longer, (1, 16), (1, 20), 2, 4)


def minimaxmusic3() -> TinyWrapped:
    model = diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=4, condition_dim=8, num_layers=2, num_attention_heads=2, attention_head_dim=16, ff_inner_dim=32,
        rotary_dim=8, fourier_embedding_dim=8,
    )  # fmt: skip
    inputs = {"hidden_states": R(2, 4, 16), "timestep": T([0.5, 0.5]), "encoder_hidden_states": R(2, 16, 8)}
    longer = {"hidden_states": R(2, 4, 20), "encoder_hidden_states": R(2, 20, 8)}
    return TinyWrapped(wake(model), inputs, longer, (1, 16), (1, 20), 2, 2, 2)


_BUILDERS: tuple[Callable[[], TinyWrapped], ...] = (
    unclip, cascade, kandinsky3, dreamlite,
    cogview3plus, luminanext, ovis, longcat, bria, briafibo, briafibo2, flux3, krea2, ideogram4, ernie, glm,
    qwenimage21, nucleus, hunyuanimage, joyimage, joyimageplus, kandinsky5, kandinsky6, cosmos, cosmos3, minimaxh3,
    sanavideo,
    sd3_controlnet, flux_controlnet, qwen_controlnet, hunyuandit_controlnet, sana_controlnet, zimage_controlnet,
    cosmos_controlnet,
    chronoedit, skyreels, wanvace, wananimate, anyflow, helios, ltx2, hunyuanvideo15, framepack, motifvideo,
    easyanimate, consisid,
    acestep, stableaudio3, longcataudio, minimaxmusic3,
)  # fmt: skip

NEWER: dict[str, Callable[[], TinyWrapped]] = {build.__name__: build for build in _BUILDERS}

NEWER_ALONE = (
    "kandinsky3", "dreamlite", "luminanext", "kandinsky5", "kandinsky6", "cosmos", "sanavideo",
    "hunyuandit_controlnet", "sana_controlnet", "cosmos_controlnet", "chronoedit", "skyreels", "wanvace", "wananimate",
    "anyflow", "helios", "ltx2", "acestep", "longcataudio",
)  # fmt: skip
"""Those whose converted layers hold the image alone."""
