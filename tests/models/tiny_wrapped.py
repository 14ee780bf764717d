"""Tiny random models of the families whose native processors run as they are, but for their product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from .tiny_newer import NEWER, NEWER_ALONE
from .tiny_parts import R, T, TinyWrapped, flux_like, picture, position_ids, text_mask, turn

__all__ = ["JOINT", "WRAPPED", "TinyWrapped", "build_wrapped", "position_ids"]


def hunyuandit() -> TinyWrapped:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    model = diffusers.HunyuanDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        hidden_size=16, cross_attention_dim=24, cross_attention_dim_t5=24, pooled_projection_dim=8, text_len=4,
        text_len_t5=4, activation_fn="gelu-approximate",
    )  # fmt: skip
    ropes = [get_2d_rotary_pos_embed(8, ((0, 0), size), size, output_type="pt") for size in ((4, 6), (6, 4))]
    tiny = picture(
        model, (2, 4, 0), hidden_states=R(2, 4, 8, 12), timestep=T([5.0, 5.0]), encoder_hidden_states=R(2, 4, 24),
        text_embedding_mask=torch.ones(2, 4), encoder_hidden_states_t5=R(2, 4, 24),
        text_embedding_mask_t5=torch.ones(2, 4), image_meta_size=R(2, 6), style=T([0, 0]), image_rotary_emb=ropes[0],
    )  # fmt: skip
    tiny.turn["image_rotary_emb"] = ropes[1]
    return tiny


def sd3() -> TinyWrapped:
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=24, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return picture(
        model, (3, 3, 2), hidden_states=R(2, 4, 8, 12), timestep=T([5, 5]), encoder_hidden_states=R(2, 7, 24),
        pooled_projections=R(2, 24),
    )  # fmt: skip


def auraflow() -> TinyWrapped:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    return picture(
        model, (2, 2, 2), hidden_states=R(2, 4, 8, 12), timestep=T([0.5, 0.5]), encoder_hidden_states=R(2, 7, 24)
    )


def flux() -> TinyWrapped:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    )  # fmt: skip
    return flux_like(model, pooled_projections=R(2, 24))


def flux2() -> TinyWrapped:
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    return flux_like(model, columns=4)


def chroma() -> TinyWrapped:
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    mask = torch.ones(2, 31, dtype=torch.bool)
    mask[1, 5:7] = False
    return flux_like(model, attention_mask=mask)


def qwenimage() -> TinyWrapped:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": R(2, 24, 16),
        "encoder_hidden_states": R(2, 7, 24),
        "encoder_hidden_states_mask": text_mask(),
        "timestep": T([0.5, 0.5]),
        "img_shapes": [[(1, 4, 6)]] * 2,
    }
    return TinyWrapped(model, inputs, {"img_shapes": [[(1, 6, 4)]] * 2}, (1, 4, 6), (1, 6, 4), 2, 2, 2)


def cogview4() -> TinyWrapped:
    model = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=24, time_embed_dim=8, condition_dim=4, rope_axes_dim=(256, 256),
    )  # fmt: skip
    return picture(
        model, (2, 2, 2), hidden_states=R(2, 4, 8, 12), encoder_hidden_states=R(2, 7, 24), timestep=T([5, 5]),
        original_size=R(2, 2), target_size=R(2, 2), crop_coords=R(2, 2),
    )  # fmt: skip


def lumina2() -> TinyWrapped:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 4, 4), axes_lens=(32, 32, 32),
        cap_feat_dim=24,
    )  # fmt: skip
    return picture(
        model, (3, 4, 2), hidden_states=R(2, 4, 8, 12), timestep=T([0.5, 0.5]), encoder_hidden_states=R(2, 7, 24),
        encoder_attention_mask=text_mask(),
    )  # fmt: skip


def hidream() -> TinyWrapped:
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[24, 12], text_emb_dim=16, num_routed_experts=2,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=(0, 1),
        force_inference_output=True,
    )  # fmt: skip
    return picture(
        model, (2, 2, 2), hidden_states=R(2, 4, 8, 12), timesteps=T([5, 5]), encoder_hidden_states_t5=R(2, 7, 24),
        encoder_hidden_states_llama3=R(2, 2, 7, 12), pooled_embeds=R(2, 16),
    )  # fmt: skip


def omnigen() -> TinyWrapped:
    model = diffusers.OmniGenTransformer2DModel(
        in_channels=4, patch_size=2, hidden_size=16, num_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, pad_token_id=0, vocab_size=100, time_step_dim=4, pos_embed_max_size=16,
        rope_scaling={"long_factor": list(range(1, 5)), "short_factor": list(range(1, 5))},
    )  # fmt: skip
    tokens = 7 + 1 + 24
    mask = torch.ones(2, tokens, tokens).tril()
    mask[:, 8:, :] = 1
    mask[1, :, :2] = 0
    mask[1, :2, :2] = torch.eye(2)
    return picture(
        model, (2, 2, 2), hidden_states=R(2, 4, 8, 12), timestep=T([0.5, 0.5]),
        input_ids=torch.randint(0, 100, (2, 7)), input_img_latents=[], input_image_sizes={}, attention_mask=mask,
        position_ids=torch.arange(tokens)[None].repeat(2, 1),
    )  # fmt: skip


def zimage() -> TinyWrapped:
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, qk_norm=True, cap_feat_dim=24, rope_theta=256.0, t_scale=1000.0, axes_dims=[4, 4, 8],
        axes_lens=[256, 32, 32],
    )  # fmt: skip
    for parameter in (model.x_pad_token, model.cap_pad_token):
        nn.init.zeros_(parameter)
    pictures = [R(4, 1, 8, 12), R(4, 1, 8, 12)]
    inputs = {"x": pictures, "t": T([0.5, 0.5]), "cap_feats": [R(7, 24), R(40, 24)]}
    return TinyWrapped(model, inputs, {"x": [turn(x) for x in pictures]}, (1, 4, 6), (1, 6, 4), 3, 4, 3)


def prx() -> TinyWrapped:
    model = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[8, 8],
    )  # fmt: skip
    for parameter in model.parameters():  # its zero layers would hide everything
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return picture(
        model, (2, 2, 2), hidden_states=R(2, 4, 8, 12), timestep=T([0.5, 0.5]), encoder_hidden_states=R(2, 7, 24),
        attention_mask=text_mask(),
    )  # fmt: skip


def sana() -> TinyWrapped:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=24,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    tiny = picture(
        model, (2, 4, 0), (8, 12), hidden_states=R(2, 4, 8, 12), timestep=T([5, 5]),
        encoder_hidden_states=R(2, 7, 24), encoder_attention_mask=torch.ones(2, 7),
    )  # fmt: skip
    tiny.include = ["*.attn1"]
    return tiny


def cogvideox() -> TinyWrapped:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=24, num_layers=2, sample_width=12, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=7, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    ropes = [get_3d_rotary_pos_embed(16, ((0, 0), size), size, 3) for size in ((4, 6), (6, 4))]
    tiny = picture(
        model, (2, 2, 2), (3, 4, 6), hidden_states=R(2, 3, 4, 8, 12), encoder_hidden_states=R(2, 7, 24),
        timestep=T([5, 5]), image_rotary_emb=ropes[0],
    )  # fmt: skip
    tiny.turn["image_rotary_emb"] = ropes[1]
    return tiny


def ltx() -> TinyWrapped:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=24,
    )  # fmt: skip
    inputs = {
        "hidden_states": R(2, 48, 4),
        "encoder_hidden_states": R(2, 7, 24),
        "timestep": T([5, 5]),
        "encoder_attention_mask": torch.ones(2, 7),
        "num_frames": 2,
        "height": 4,
        "width": 6,
    }
    return TinyWrapped(model, inputs, {"height": 6, "width": 4}, (2, 4, 6), (2, 6, 4), 2, 4)


def wan() -> TinyWrapped:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    return picture(
        model, (2, 4, 0), (2, 4, 6), hidden_states=R(2, 4, 2, 8, 12), timestep=T([5, 5]),
        encoder_hidden_states=R(2, 7, 16),
    )  # fmt: skip


def hunyuanvideo() -> TinyWrapped:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return picture(
        model, (2, 3, 2), (2, 4, 6), hidden_states=R(2, 4, 2, 4, 6), timestep=T([5, 5]),
        encoder_hidden_states=R(2, 7, 16), pooled_projections=R(2, 8), encoder_attention_mask=text_mask().float(),
        guidance=T([5.0, 5.0]),
    )  # fmt: skip


def mochi() -> TinyWrapped:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, out_channels=None, qk_norm="rms_norm", text_embed_dim=16, time_embed_dim=4,
        activation_fn="swiglu", max_sequence_length=7,
    )  # fmt: skip
    return picture(
        model, (2, 2, 2), (2, 4, 6), hidden_states=R(2, 4, 2, 8, 12), encoder_hidden_states=R(2, 7, 16),
        timestep=T([5, 5]), encoder_attention_mask=text_mask(),
    )  # fmt: skip


def allegro() -> TinyWrapped:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=48, sample_width=12, sample_height=8, sample_frames=2, caption_channels=24,
    )  # fmt: skip

    def rope(size: tuple[int, int]) -> Any:
        *freqs, times, rows, columns = get_3d_rotary_pos_embed_allegro(
            embed_dim=24, crops_coords=((0, 0), size), grid_size=size, temporal_size=2,
            interpolation_scale=(1.0, 1.0, 1.0), device="cpu",
        )  # fmt: skip
        axes = torch.meshgrid(times, rows, columns, indexing="ij")
        return tuple(freqs), tuple(axis.reshape(1, -1).long() for axis in axes)

    tiny = picture(
        model, (2, 4, 0), (2, 4, 6), hidden_states=R(2, 4, 2, 8, 12), timestep=T([5, 5]),
        encoder_hidden_states=R(2, 7, 24), encoder_attention_mask=torch.ones(2, 7), image_rotary_emb=rope((4, 6)),
    )  # fmt: skip
    tiny.turn["image_rotary_emb"] = rope((6, 4))
    return tiny


def stableaudio() -> TinyWrapped:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    model = diffusers.StableAudioDiTModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        num_key_value_attention_heads=2, cross_attention_dim=32, time_proj_dim=8, global_states_input_dim=8,
        cross_attention_input_dim=24,
    )  # fmt: skip
    ropes = [get_1d_rotary_pos_embed(8, n + 1, use_real=True, repeat_interleave_real=False) for n in (16, 20)]
    inputs = {
        "hidden_states": R(2, 4, 16),
        "timestep": T([5.0, 5.0]),
        "encoder_hidden_states": R(2, 7, 24),
        "global_hidden_states": R(2, 1, 8),
        "rotary_embedding": ropes[0],
    }
    longer = {"hidden_states": R(2, 4, 20), "rotary_embedding": ropes[1]}
    return TinyWrapped(model, inputs, longer, (1, 16), (1, 20), 2, 4, 2)


WRAPPED: dict[str, Callable[[], TinyWrapped]] = {
    build.__name__: build
    for build in (
        hunyuandit, sd3, auraflow, flux, flux2, chroma, qwenimage, cogview4, lumina2, hidream, omnigen, zimage, prx,
        sana, cogvideox, ltx, wan, hunyuanvideo, mochi, allegro, stableaudio,
    )
} | NEWER  # fmt: skip

JOINT = [name for name in WRAPPED if name not in ("hunyuandit", "sana", "ltx", "wan", "allegro", *NEWER_ALONE)]


def build_wrapped(name: str, seed: int = 0) -> TinyWrapped:
    """The tiny model `name`, in eval mode, the same at every call with the same seed."""
    torch.manual_seed(seed)
    try:
        tiny = WRAPPED[name]()
    except AttributeError as error:
        if "module diffusers has no attribute" not in str(error):
            raise
        pytest.skip(f"this diffusers has no {name}")
    tiny.model.eval()
    return tiny
