"""What the training of a scenes pipeline optimises: its text encoders and its denoiser as one module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from flatten_diffusion.distill.equal_tokens import CountedLastKey

T5_TOKENS = 256
"""Tokens that StableDiffusion3Pipeline reserves for a T5 encoder, all zero when there is none."""


class UNetDenoiser(torch.nn.Module):
    """The text encoder and the UNet of a StableDiffusionPipeline."""

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        super().__init__()
        self.text_encoder, self.denoiser = pipeline.text_encoder, pipeline.unet

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Noisy latents [B, C, h, w], timesteps [B] and prompts' token numbers [B, T] -> prediction [B, C, h, w]."""
        prompt = self.text_encoder(tokens)[0]
        prediction: torch.Tensor = self.denoiser(noisy, timesteps, encoder_hidden_states=prompt).sample
        return prediction


class JointDenoiser(torch.nn.Module):
    """Both text encoders and the transformer of a StableDiffusion3Pipeline without T5.

    The tokens that stand for T5 are one that counts as often, see `flatten_diffusion.distill.equal_tokens`.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = pipeline.text_encoder, pipeline.text_encoder_2
        self.denoiser = pipeline.transformer

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Noisy latents [B, C, h, w], timesteps [B] and prompts' token numbers [B, T] -> prediction [B, C, h, w]."""
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        prompt = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        counts = torch.full((len(tokens),), T5_TOKENS, device=tokens.device)
        with CountedLastKey(counts):
            prediction: torch.Tensor = self.denoiser(
                hidden_states=noisy,
                timestep=timesteps,
                encoder_hidden_states=F.pad(prompt, (0, 0, 0, 1)),
                pooled_projections=pooled,
            ).sample
        return prediction


def denoiser_of(pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline) -> UNetDenoiser | JointDenoiser:
    """The module that training optimises."""
    return JointDenoiser(pipeline) if isinstance(pipeline, StableDiffusion3Pipeline) else UNetDenoiser(pipeline)
