"""Which attention layers of which models hold images, as data: one row per module class that sees an image's size.

To add an architecture, add a row to `ARCHITECTURES`, or a reason to `REFUSED`: see the README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import token_layout
from .grid import Read
from .layer import Place


@dataclass(frozen=True)
class Architecture:
    """One row of the table. An owner that sees several sequences (video and audio) has a row for each.

    Attributes:
        owner: name of the module class (subclasses included).
        image: paths below the owner, with wildcards, of layers that attend over the image alone.
        joint: paths of layers whose sequence holds other tokens too (text, registers, padding).
        place: where the image's tokens stand in a joint sequence, "first" or "last".
        kept: paths below the owner -> why they stay softmax; looked at before `image` and `joint`.
        offered: paths -> why they are converted only where the config's `include` names them.
        read: (owner, *its arguments) -> the grid, or a `TokenLayout`; see `token_layout`. None when the attention
            itself receives [B, C, height, width].
        arguments: names of the owner's arguments that `read` wants; None stands for one that was not passed.
        native: names of the processor classes that are run as they are, with their product exchanged; empty where
            `FocusedLinearAttnProcessor` takes the place of AttnProcessor2_0.
        unless: (owner, attention module) -> why it stays softmax as this model is configured, or None.
        between: below the owner, the module whose output is the image's tokens, and the one whose output becomes an
            image again, where all that lies between looks at one token at a time, but for self-attention (and
            cross-attention, whose queries stand alone too): for `Adapter.token_parallel`.
    """

    owner: str
    image: tuple[str, ...] = ()
    joint: tuple[str, ...] = ()
    place: Place = "last"
    kept: Mapping[str, str] = field(default_factory=dict)
    offered: Mapping[str, str] = field(default_factory=dict)
    read: Read | None = None
    arguments: tuple[str, ...] = ("hidden_states",)
    native: tuple[str, ...] = ()
    unless: Callable[[nn.Module, nn.Module], str | None] | None = None
    between: tuple[str, str] | None = None


def _crosses(owner: Any, attn: Any) -> str | None:
    """A block whose attention layers may be built without the image's own keys."""
    return _CROSS if getattr(attn, "only_cross_attention", False) or not getattr(owner, "self_attn", True) else None


def _crosses_as_built(owner: Any, attn: Any) -> str | None:
    return _CROSS if attn.is_cross_attention else None


def _crosses_by_width(owner: Any, attn: Any) -> str | None:
    return _CROSS if attn.to_k.in_features != attn.to_q.in_features else None


def _in_a_window(owner: Any, attn: Any) -> str | None:
    return None if attn.sliding_window is None else "attends within a sliding window: its cost is linear already"


def _a_difference(owner: Any, attn: Any) -> str | None:
    return "differential attention: the difference of two softmaxes" if attn.use_differential else None


_BLOCKS = ("transformer_blocks.*.attn1", "transformer_blocks.*.attn2")
_STREAMS = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
_CROSS = "cross-attention"
_TEXT = "attends over the text alone"
_TEMPORAL = "temporal attention: its tokens are frames"
_ALREADY = "linear already (ReLU attention): name it in `include` to give it the focused mixer"
ARCHITECTURES: tuple[Architecture, ...] = (
    # Stable Diffusion 1.x, 2.x, XL, ControlNet, and the spatial layers of UNetMotion and UNet3D.
    Architecture(
        "Transformer2DModel",
        image=_BLOCKS,
        kept={"*.fuser.attn": "attends over image and grounding tokens together"},
        read=token_layout.transformer_2d,
    ),
    Architecture(
        "DiTTransformer2DModel", image=_BLOCKS, read=token_layout.square_patches, between=("pos_embed", "proj_out_2")
    ),
    Architecture(
        "PixArtTransformer2DModel", image=_BLOCKS, read=token_layout.patches, between=("pos_embed", "proj_out")
    ),
    Architecture(
        "LatteTransformer3DModel",
        image=_BLOCKS,
        kept={"temporal_transformer_blocks.*": _TEMPORAL},
        read=token_layout.patches,
    ),
    # Stable Video Diffusion.
    Architecture(
        "TransformerSpatioTemporalModel",
        image=_BLOCKS,
        kept={"temporal_transformer_blocks.*": _TEMPORAL},
        read=token_layout.pixels,
    ),
    Architecture(
        "UVit2DModel", image=("transformer_layers.*",), read=token_layout.uvit_codes, arguments=("input_ids",)
    ),
    Architecture("UVitBlock", kept={"*": _CROSS}),
    Architecture("KAttentionBlock", image=("attn1", "attn2"), read=token_layout.pixels),
    *(
        Architecture(owner, kept={"*": _TEMPORAL})
        for owner in ("TransformerTemporalModel", "AnimateDiffTransformer3D", "I2VGenXLTransformerTemporalEncoder")
    ),
    *(
        Architecture(owner, image=("attentions.*",))
        for owner in (
            "AttnDownBlock2D",
            "AttnUpBlock2D",
            "AttnSkipDownBlock2D",
            "AttnSkipUpBlock2D",
            "AttnDownEncoderBlock2D",
            "AttnUpDecoderBlock2D",
            "UNetMidBlock2D",
        )
    ),
    # From here on the native processors run as they are, but for their product.
    *(
        Architecture(
            owner,
            image=("blocks.*.attn1",),
            kept={"blocks.*.attn2": _CROSS},
            read=token_layout.patches,
            native=("HunyuanAttnProcessor2_0", "FusedHunyuanAttnProcessor2_0"),
        )
        for owner in ("HunyuanDiT2DModel", "HunyuanDiT2DControlNetModel")
    ),
    *(
        Architecture(
            owner,
            image=("transformer_blocks.*.attn2",),
            joint=("transformer_blocks.*.attn",),
            place="first",
            read=token_layout.patches,
            native=("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"),
        )
        for owner in ("SD3Transformer2DModel", "SD3ControlNetModel")
    ),
    Architecture(
        "AuraFlowTransformer2DModel",
        joint=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        read=token_layout.patches,
        native=("AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0"),
    ),
    *(
        Architecture(
            owner,
            joint=_STREAMS,
            read=token_layout.position_ids,
            arguments=("img_ids",),
            native=("FluxAttnProcessor", "FluxAttnProcessor2_0", "FusedFluxAttnProcessor2_0"),
        )
        for owner in ("FluxTransformer2DModel", "FluxControlNetModel")
    ),
    Architecture(
        "Flux2Transformer2DModel",
        joint=_STREAMS,
        read=token_layout.position_ids,
        arguments=("img_ids",),
        native=("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"),
    ),
    Architecture(
        "ChromaTransformer2DModel",
        joint=_STREAMS,
        read=token_layout.masked_position_ids,
        arguments=("img_ids", "attention_mask"),
        native=("FluxAttnProcessor", "FluxAttnProcessor2_0", "FusedFluxAttnProcessor2_0"),
    ),
    *(
        Architecture(
            owner,
            joint=("transformer_blocks.*.attn",),
            read=token_layout.image_shapes,
            arguments=("img_shapes",),
            native=("QwenDoubleStreamAttnProcessor2_0",),
        )
        for owner in ("QwenImageTransformer2DModel", "QwenImageControlNetModel")
    ),
    Architecture(
        "CogView4Transformer2DModel",
        joint=("transformer_blocks.*.attn1",),
        read=token_layout.unmasked_patches,
        arguments=("hidden_states", "attention_mask"),
        native=("CogView4AttnProcessor",),
    ),
    Architecture(
        "Lumina2Transformer2DModel",
        image=("noise_refiner.*.attn",),
        joint=("layers.*.attn",),
        kept={"context_refiner.*": _TEXT},
        read=token_layout.ragged_patches,
        arguments=("hidden_states", "encoder_attention_mask"),
        native=("Lumina2AttnProcessor2_0",),
    ),
    Architecture(
        "HiDreamImageTransformer2DModel",
        joint=("double_stream_blocks.*.block.attn1", "single_stream_blocks.*.block.attn1"),
        place="first",
        read=token_layout.patches_or_sizes,
        arguments=("hidden_states", "img_sizes"),
        native=("HiDreamAttnProcessor",),
    ),
    Architecture(
        "OmniGenTransformer2DModel",
        joint=("layers.*.self_attn",),
        read=token_layout.causal_text_patches,
        arguments=("hidden_states", "attention_mask"),
        native=("OmniGenAttnProcessor2_0",),
    ),
    Architecture(
        "ZImageTransformer2DModel",
        joint=("noise_refiner.*.attention", "layers.*.attention"),
        place="first",
        kept={"context_refiner.*": _TEXT, "siglip_refiner.*": "attends over features of reference images"},
        read=token_layout.latent_list,
        arguments=("x", "patch_size", "f_patch_size"),
        native=("ZSingleStreamAttnProcessor",),
    ),
    Architecture(
        "PRXTransformer2DModel",
        joint=("blocks.*.attention",),
        read=token_layout.patches,
        native=("PRXAttnProcessor2_0",),
    ),
    *(
        Architecture(
            owner,
            image=("transformer_blocks.*.attn1",),
            kept={"transformer_blocks.*.attn2": _CROSS},
            offered={"transformer_blocks.*.attn1": _ALREADY},
            read=token_layout.patches,
            native=("SanaLinearAttnProcessor2_0",),
        )
        for owner in ("SanaTransformer2DModel", "SanaControlNetModel")
    ),
    *(
        Architecture(
            owner,
            joint=("transformer_blocks.*.attn1",),
            read=token_layout.frames_first_video,
            native=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
        )
        for owner in ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    ),
    Architecture(
        "LTXVideoTransformer3DModel",
        image=("transformer_blocks.*.attn1",),
        kept={"transformer_blocks.*.attn2": _CROSS},
        read=token_layout.given_video,
        arguments=("num_frames", "height", "width"),
        native=("LTXVideoAttnProcessor", "LTXVideoAttentionProcessor2_0"),
    ),
    *(
        Architecture(
            owner,
            image=("blocks.*.attn1",),
            kept={"blocks.*.attn2": _CROSS},
            read=token_layout.video,
            native=("WanAttnProcessor", "WanAttnProcessor2_0"),
        )
        for owner in ("WanTransformer3DModel", "ChronoEditTransformer3DModel")
    ),
    Architecture(
        "HunyuanVideoTransformer3DModel",
        joint=_STREAMS,
        place="first",
        kept={"context_embedder.*": _TEXT},
        read=token_layout.video,
        native=("HunyuanVideoAttnProcessor2_0",),
    ),
    Architecture(
        "MochiTransformer3DModel",
        joint=("transformer_blocks.*.attn1",),
        place="first",
        read=token_layout.video,
        native=("MochiAttnProcessor2_0",),
    ),
    Architecture(
        "AllegroTransformer3DModel",
        image=("transformer_blocks.*.attn1",),
        kept={"transformer_blocks.*.attn2": _CROSS},
        read=token_layout.video,
        native=("AllegroAttnProcessor2_0",),
    ),
    # a global token, then the signal.
    Architecture(
        "StableAudioDiTModel",
        joint=("transformer_blocks.*.attn1",),
        kept={"transformer_blocks.*.attn2": _CROSS},
        read=token_layout.signal,
        native=("StableAudioAttnProcessor2_0",),
    ),
    # unCLIP, Kandinsky 2.x, DeepFloyd IF: image queries over text and image keys.
    *(
        Architecture(
            owner,
            joint=("attentions.*",),
            read=token_layout.pixels,
            native=("AttnAddedKVProcessor2_0",),
            unless=_crosses,
        )
        for owner in ("UNetMidBlock2DSimpleCrossAttn", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")
    ),
    # Stable Cascade.
    Architecture(
        "SDCascadeAttnBlock",
        joint=("attention",),
        place="first",
        read=token_layout.pixels,
        arguments=("x",),
        native=("AttnProcessor2_0",),
        unless=_crosses,
    ),
    Architecture(
        "Kandinsky3AttentionBlock",
        image=("attention",),
        read=token_layout.pixels_alone,
        arguments=("x", "context"),
        native=("AttnProcessor2_0",),
        unless=_crosses_by_width,
    ),
    Architecture(
        "DreamLiteTransformer2DModel",
        image=_BLOCKS,
        kept={"transformer_blocks.*.attn2": _CROSS},
        read=token_layout.pixels,
        native=("DreamLiteAttnProcessor2_0",),
        unless=_crosses_as_built,
    ),
    Architecture(
        "LuminaNextDiT2DModel",
        image=("layers.*.attn1",),
        kept={"layers.*.attn2": _CROSS},
        read=token_layout.all_patches,
        native=("LuminaAttnProcessor2_0",),
    ),
    Architecture(
        "CogView3PlusTransformer2DModel",
        joint=("transformer_blocks.*.attn1",),
        read=token_layout.patches,
        native=("CogVideoXAttnProcessor2_0",),
    ),
    Architecture(
        "OvisImageTransformer2DModel",
        joint=_STREAMS,
        read=token_layout.position_ids,
        arguments=("img_ids",),
        native=("OvisImageAttnProcessor",),
    ),
    Architecture(
        "LongCatImageTransformer2DModel",
        joint=_STREAMS,
        read=token_layout.position_ids,
        arguments=("img_ids",),
        native=("LongCatImageAttnProcessor",),
    ),
    Architecture(
        "BriaTransformer2DModel",
        joint=_STREAMS,
        read=token_layout.position_ids,
        arguments=("img_ids",),
        native=("BriaAttnProcessor",),
    ),
    Architecture(
        "BriaFiboTransformer2DModel",
        joint=_STREAMS,
        read=token_layout.position_ids,
        arguments=("img_ids",),
        native=("BriaFiboAttnProcessor", "BriaAttnProcessor"),
    ),
    Architecture(
        "BriaFibo2Transformer2DModel",
        image=("noise_refiner.*.attention",),
        joint=("layers.*.attention",),
        kept={"perceiver.*": _TEXT, "layers.*.cross_attention": _CROSS},
        read=token_layout.patches_around_gist,
        arguments=("hidden_states", "encoder_hidden_states", "encoder_attention_mask", "context_latents"),
        native=("BriaFibo2AttnProcessor",),
    ),
    Architecture(
        "Flux3Transformer2DModel",
        image=("mode_blocks.image.*.attn",),
        read=token_layout.position_ids,
        arguments=("img_ids",),
        native=("Flux3AttnProcessor",),
    ),
    Architecture(
        "Flux3Transformer2DModel",
        image=("mode_blocks.image_cond.*.attn",),
        read=token_layout.position_ids,
        arguments=("image_cond_ids",),
        native=("Flux3AttnProcessor",),
    ),
    Architecture(
        "Flux3Transformer2DModel",
        joint=("single_transformer_blocks.*.attn",),
        kept={"txt_mode_blocks.*": _TEXT},
        read=token_layout.both_position_ids,
        arguments=("img_ids", "image_cond_ids"),
        native=("Flux3AttnProcessor",),
    ),
    Architecture(
        "Krea2Transformer2DModel",
        joint=("transformer_blocks.*.attn",),
        kept={"text_fusion.*": _TEXT},
        read=token_layout.last_position_ids,
        arguments=("position_ids", "hidden_states"),
        native=("Krea2AttnProcessor",),
    ),
    Architecture(
        "Ideogram4Transformer2DModel",
        joint=("layers.*.attention",),
        read=token_layout.indicated_position_ids,
        arguments=("position_ids", "indicator", "segment_ids"),
        native=("Ideogram4AttnProcessor",),
    ),
    Architecture(
        "ErnieImageTransformer2DModel",
        joint=("layers.*.self_attention",),
        place="first",
        read=token_layout.patches,
        native=("ErnieImageSingleStreamAttnProcessor",),
    ),
    Architecture(
        "GlmImageTransformer2DModel",
        joint=("transformer_blocks.*.attn1",),
        read=token_layout.unmasked_patches,
        arguments=("hidden_states", "attention_mask"),
        native=("GlmImageAttnProcessor",),
    ),
    Architecture(
        "QwenImage21Transformer2DModel",
        joint=("transformer_blocks.*.attn",),
        read=token_layout.target_shape,
        arguments=("img_shapes", "img_mask", "hidden_states"),
        native=("QwenImage21AttnProcessor",),
    ),
    Architecture(
        "NucleusMoEImageTransformer2DModel",
        joint=("transformer_blocks.*.attn",),
        place="first",
        read=token_layout.image_shapes,
        arguments=("img_shapes",),
        native=("NucleusMoEAttnProcessor2_0",),
    ),
    Architecture(
        "HunyuanImageTransformer2DModel",
        joint=_STREAMS,
        place="first",
        kept={"context_embedder.*": _TEXT},
        read=token_layout.sized_patches,
        native=("HunyuanImageAttnProcessor",),
    ),
    Architecture(
        "JoyImageEditTransformer3DModel",
        joint=("double_blocks.*.attn",),
        place="first",
        read=token_layout.stacked_video,
        native=("JoyImageAttnProcessor",),
    ),
    Architecture(
        "JoyImageEditPlusTransformer3DModel",
        joint=("double_blocks.*.attn",),
        place="first",
        read=token_layout.image_shapes,
        arguments=("shape_list",),
        native=("JoyImageEditPlusAttnProcessor",),
    ),
    Architecture(
        "Kandinsky5Transformer3DModel",
        image=("visual_transformer_blocks.*.self_attention",),
        kept={"text_transformer_blocks.*": _TEXT, "*.cross_attention": _CROSS},
        read=token_layout.dense_channels_last_video,
        arguments=("hidden_states", "sparse_params"),
        native=("Kandinsky5AttnProcessor",),
    ),
    Architecture(
        "Kandinsky6Transformer3DModel",
        image=("visual_transformer_blocks.*.video_dec_block.self_attention",),
        kept={"*_text_transformer_blocks.*": _TEXT, "*cross_attention": _CROSS},
        read=token_layout.channels_last_video,
        native=("Kandinsky6AttnProcessor",),
    ),
    Architecture(
        "Kandinsky6Transformer3DModel",
        image=("visual_transformer_blocks.*.audio_dec_block.self_attention",),
        read=token_layout.tokens_in_time,
        arguments=("audio_hidden_states",),
        native=("Kandinsky6AttnProcessor",),
    ),
    Architecture(
        "CosmosTransformer3DModel",
        image=("transformer_blocks.*.attn1",),
        kept={"transformer_blocks.*.attn2": _CROSS},
        read=token_layout.video,
        native=("CosmosAttnProcessor2_0",),
    ),
    Architecture(
        "Cosmos3OmniTransformer",
        joint=("layers.*.self_attn",),
        read=token_layout.packed_video,
        arguments=("vision_token_shapes", "und_len", "sequence_length"),
        native=("Cosmos3AttnProcessor",),
    ),
    Architecture(
        "MiniMaxH3Transformer3DModel",
        joint=("transformer_blocks.*.attn",),
        kept={"token_refiner.*": _TEXT},
        read=token_layout.packed_position_ids,
        arguments=("position_ids", "video_indices"),
        native=("MiniMaxH3AttnProcessor",),
    ),
    Architecture(
        "SanaVideoTransformer3DModel",
        image=("transformer_blocks.*.attn1",),
        kept={"transformer_blocks.*.attn2": _CROSS},
        offered={"transformer_blocks.*.attn1": _ALREADY},
        read=token_layout.video,
        native=("SanaLinearAttnProcessor3_0",),
    ),
    Architecture(
        "ZImageControlNetModel",
        joint=("noise_refiner.*.attention", "control_noise_refiner.*.attention", "control_layers.*.attention"),
        place="first",
        kept={"context_refiner.*": _TEXT},
        read=token_layout.latent_list,
        arguments=("x", "patch_size", "f_patch_size"),
        native=("ZSingleStreamAttnProcessor",),
    ),
    Architecture(
        "CosmosControlNetModel",
        image=("control_blocks.*.attn1",),
        kept={"control_blocks.*.attn2": _CROSS},
        read=token_layout.video,
        arguments=("controls_latents",),
        native=("CosmosAttnProcessor2_0",),
    ),
    Architecture(
        "WanVACETransformer3DModel",
        image=("blocks.*.attn1", "vace_blocks.*.attn1"),
        kept={"*blocks.*.attn2": _CROSS},
        read=token_layout.video,
        native=("WanAttnProcessor", "WanAttnProcessor2_0"),
    ),
    Architecture(
        "WanAnimateTransformer3DModel",
        image=("blocks.*.attn1",),
        kept={"blocks.*.attn2": _CROSS, "face_adapter.*": _CROSS},
        read=token_layout.video,
        native=("WanAttnProcessor", "WanAttnProcessor2_0"),
    ),
    Architecture(
        "SkyReelsV2Transformer3DModel",
        image=("blocks.*.attn1",),
        kept={"blocks.*.attn2": _CROSS},
        read=token_layout.video,
        native=("SkyReelsV2AttnProcessor",),
    ),
    Architecture(
        "AnyFlowTransformer3DModel",
        image=("blocks.*.attn1",),
        kept={"blocks.*.attn2": _CROSS},
        read=token_layout.frames_first_video,
        native=("AnyFlowAttnProcessor",),
    ),
    Architecture(
        "HeliosTransformer3DModel",
        image=("blocks.*.attn1",),
        kept={"blocks.*.attn2": _CROSS},
        read=token_layout.video_after_history,
        arguments=(
            "hidden_states",
            "latents_history_short",
            "latents_history_mid",
            "latents_history_long",
            "indices_latents_history_short",
            "indices_latents_history_mid",
            "indices_latents_history_long",
        ),
        native=("HeliosAttnProcessor",),
    ),
    Architecture(
        "LTX2VideoTransformer3DModel",
        image=("transformer_blocks.*.attn1",),
        kept={"transformer_blocks.*attn2": _CROSS, "transformer_blocks.*_to_*_attn": _CROSS},
        read=token_layout.given_video,
        arguments=("num_frames", "height", "width"),
        native=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
    ),
    Architecture(
        "LTX2VideoTransformer3DModel",
        image=("transformer_blocks.*.audio_attn1",),
        read=token_layout.tokens_in_time,
        arguments=("audio_hidden_states",),
        native=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
    ),
    Architecture(
        "HunyuanVideo15Transformer3DModel",
        joint=("transformer_blocks.*.attn",),
        place="first",
        kept={"context_embedder.*": _TEXT},
        read=token_layout.video_before_sorted_text,
        arguments=("hidden_states", "encoder_attention_mask", "encoder_attention_mask_2", "image_embeds"),
        native=("HunyuanVideo15AttnProcessor2_0",),
    ),
    Architecture(
        "HunyuanVideoFramepackTransformer3DModel",
        joint=_STREAMS,
        place="first",
        kept={"context_embedder.*": _TEXT},
        read=token_layout.framepack,
        arguments=(
            "hidden_states",
            "latents_clean",
            "latents_history_2x",
            "latents_history_4x",
            "indices_latents_clean",
            "indices_latents_history_2x",
            "indices_latents_history_4x",
        ),
        native=("HunyuanVideoAttnProcessor2_0",),
    ),
    Architecture(
        "MotifVideoTransformer3DModel",
        joint=_STREAMS,
        place="first",
        kept={"*.cross_attn": _CROSS},
        read=token_layout.video,
        native=("MotifVideoAttnProcessor2_0",),
    ),
    Architecture(
        "EasyAnimateTransformer3DModel",
        joint=("transformer_blocks.*.attn1",),
        read=token_layout.video,
        native=("EasyAnimateAttnProcessor2_0",),
    ),
    Architecture(
        "AceStepTransformer1DModel",
        image=("layers.*.self_attn",),
        kept={"layers.*.cross_attn": _CROSS},
        read=token_layout.patches_in_time,
        native=("AceStepAttnProcessor2_0",),
        unless=_in_a_window,
    ),
    # memory tokens, then the signal.
    Architecture(
        "StableAudio3DiTModel",
        joint=("transformer_blocks.*.self_attn",),
        kept={"transformer_blocks.*.cross_attn": _CROSS},
        read=token_layout.signal_patches,
        native=("StableAudio3SelfAttnProcessor",),
        unless=_a_difference,
    ),
    Architecture(
        "LongCatAudioDiTTransformer",
        image=("blocks.*.self_attn",),
        kept={"blocks.*.cross_attn": _CROSS},
        read=token_layout.tokens_in_time,
        native=("AudioDiTSelfAttnProcessor",),
    ),
    # a time token, then the signal.
    Architecture(
        "MiniMaxMusic3Transformer1DModel",
        joint=("transformer_blocks.*.attn",),
        read=token_layout.signal,
        native=("MiniMaxMusic3AttnProcessor",),
    ),
)

_AUTOENCODER = "an autoencoder, not a denoiser: it runs once per image"
_CONDITION = "prepares a condition, not an image"
REFUSED: Mapping[str, str] = {
    "AnimaTextConditioner": _CONDITION,
    "AnyFlowFARTransformer3DModel": "causal attention between chunks of frames (a block mask), and cached keys",
    "AutoencoderKLAllegro": _AUTOENCODER,
    "AutoencoderKLCosmos": _AUTOENCODER,
    "AutoencoderKLHunyuanVideo": _AUTOENCODER,
    "AutoencoderKLKVAEAudio": _AUTOENCODER,
    "AutoencoderKLMiniMaxH3": _AUTOENCODER,
    "AutoencoderKLMiniMaxH3Audio": _AUTOENCODER,
    "AutoencoderKLMochi": _AUTOENCODER,
    "AutoencoderKLTemporalDecoder": _AUTOENCODER,
    "AutoencoderRAE": _AUTOENCODER,
    "AutoencoderSAME": _AUTOENCODER,
    "Kandinsky6SRTransformer3DModel": "sparse attention already (NABLA), which chooses its blocks by content",
    "LTX2VideoDiffusionDecoderModel": "neighbourhood attention: its cost is linear already",
    "MMAudioVAE": _AUTOENCODER,
    "MiniMaxMusic3RVQDepthDecoder": "causal attention over the few codes of one audio frame, not over an image",
    "PriorTransformer": "predicts an image embedding from a few tokens, not an image",
    "RFD4ProteinaAutoencoder": "works on atoms of proteins, not on an image",
    "RFD4ProteinaTransformer": "works on residues of proteins, with a bias per pair, not on an image",
    "SanaWMLTX2RefinerTransformer3DModel": "refines block by block over cached keys, and is not told the video's size",
    "SanaWMTransformer3DModel": "linear already: its self-attention is a gated recurrence without processors",
    "T5FilmDecoder": "unscaled attention over spectrogram frames and notes, not over an image",
    "WanAnimate2Transformer3DModel": "packs video and cached reference keys under a block mask (flex attention)",
}
"""Classes whose attention layers have no row -> why: these are no denoisers of images, videos or audio with layers
that could be converted."""
