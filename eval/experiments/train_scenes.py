"""Train an embedded scenes pipeline: its autoencoder, and its text encoders and denoiser.

    accelerate launch -m eval.experiments.train_scenes --output_dir out/scenes --mixed_precision bf16

--architecture unet is a Stable Diffusion, sd3 a Stable Diffusion 3 without T5. --initial_pipeline starts from the
weights of another one that fit: the text encoders and autoencoder of either architecture, the denoiser of the same one
at half the size (see --position_spacing), which is where a transformer learns four times as fast.

Killed at any moment, the same command goes on from the newest checkpoint. Two CPU cores need about an hour and a half
at --resolution 128 (fastest as two processes of one thread each); with a CUDA GPU use --resolution 512. The images
are drawn by flatten_diffusion.scenes; captions that `is_held_out` are never trained on. The latents are those of
`image_latents`, so either stage can be trained first. output_dir/pipeline is the trained pipeline,
output_dir/export the same in float16, as it ships in flatten_diffusion/scenes/weights and weights_sd3.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, set_seed
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from flatten_diffusion.distill.diffusion import Diffusion
from flatten_diffusion.files import atomic_path, write_json
from flatten_diffusion.scenes.check import fact_accuracy
from flatten_diffusion.scenes.grammar import sample_captions
from flatten_diffusion.scenes.latents import image_latents
from flatten_diffusion.scenes.render import render
from flatten_eval.errors import first_line

from .scenes_build import ARCHITECTURES, build_pipeline, export_pipeline, start_from

logger = get_logger(__name__, log_level="INFO")


@dataclass(frozen=True)
class Bucket:
    """One size that training draws batches of: pixels, batch per process, scenes cached, weight of the draw, and
    between which shares of the run."""

    width: int
    height: int
    batch: int
    scenes: int
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """From WIDTH[xHEIGHT]:BATCH:SCENES:WEIGHT[:FROM[:UNTIL]]; raises ArgumentTypeError."""
        size, *rest = text.split(":")
        try:
            width, height = (int(side) for side in size.split("x")) if "x" in size else (int(size), int(size))
            batch, scenes, weight = int(rest[0]), int(rest[1]), float(rest[2])
            start, end = (float(rest[at]) if len(rest) > at else share for at, share in ((3, 0.0), (4, 1.0)))
        except (ValueError, IndexError) as error:
            form = "WIDTH[xHEIGHT]:BATCH:SCENES:WEIGHT[:FROM[:UNTIL]]"
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}") from error
        if width % 32 or height % 32 or min(width, height, batch, scenes) <= 0 or weight <= 0:
            raise argparse.ArgumentTypeError(f"{text!r}: sides must be multiples of 32, counts and weight positive")
        if not 0 <= start < end <= 1:
            raise argparse.ArgumentTypeError(f"{text!r}: FROM and UNTIL must be rising shares of the run, 0 to 1")
        return cls(width, height, batch, scenes, weight, start, end)

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("scenes-model"))
    parser.add_argument("--stages", default="vae,denoiser", help="comma-separated; see the functions train_*")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="unet")
    parser.add_argument(
        "--initial_pipeline",
        type=Path,
        default=None,
        help="folder of a pipeline: its weights that fit are started from",
    )
    parser.add_argument(
        "--position_spacing", type=float, default=1.0, help="sd3: between neighbouring tokens; 2 at half the final size"
    )
    parser.add_argument("--resolution", type=int, default=128, help="native image side in pixels")
    parser.add_argument(
        "--default_size", type=int, default=None, help="side in pixels of what is drawn unasked; default: --resolution"
    )
    parser.add_argument("--num_scenes", type=int, default=32_000, help="rendered scenes whose latents are cached")
    parser.add_argument(
        "--buckets",
        nargs="+",
        type=Bucket.parse,
        default=None,
        metavar="WIDTH[xHEIGHT]:BATCH:SCENES:WEIGHT[:FROM[:UNTIL]]",
        help="sizes the denoiser learns in turn, each step one, drawn by weight between these shares of the run; "
        "by default --resolution alone, with --train_batch_size and --num_scenes",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default=None)
    parser.add_argument("--vae_train_steps", type=int, default=4000)
    parser.add_argument("--vae_batch_size", type=int, default=16)
    parser.add_argument("--vae_learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--vae_crop", type=int, default=64, help="training crop in pixels, a multiple of 8")
    parser.add_argument("--latent_noise", type=float, default=0.25, help="most noise on the decoder's latents")
    parser.add_argument("--max_train_steps", type=int, default=12_000, help="steps of the denoiser")
    parser.add_argument("--max_train_seconds", type=float, default=math.inf, help="per stage; the schedule adapts")
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--caption_dropout", type=float, default=0.1, help="share of captions left empty, for guidance")
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--checkpoints_total_limit", type=int, default=2)
    parser.add_argument("--validation_steps", type=int, default=1000)
    parser.add_argument("--num_validation_images", type=int, default=16)
    parser.add_argument("--report_to", default=None, help="tensorboard, wandb, …")
    args = parser.parse_args(arguments)
    unknown = set(args.stages.split(",")) - {"vae", "denoiser"}
    if unknown:
        parser.error(f"--stages: unknown stage {sorted(unknown)[0]!r}; use vae, denoiser")
    if args.vae_crop % 8 or not 8 <= args.vae_crop <= args.resolution:
        parser.error(f"--vae_crop {args.vae_crop} must be a multiple of 8, at most --resolution")
    for name in ("resolution", "default_size"):
        side = getattr(args, name)
        if side is not None and (side % 32 or side <= 0):
            parser.error(f"--{name} {side} must be a multiple of 32")
    if args.buckets is None:
        args.buckets = [Bucket(args.resolution, args.resolution, args.train_batch_size, args.num_scenes)]
    edges = [0.0, *(bucket.end for bucket in args.buckets if bucket.end < 1)]
    for share in edges:
        if not any(bucket.start <= share < bucket.end for bucket in args.buckets):
            parser.error(f"--buckets: none of them is drawn at {share:g} of the run")
    if args.initial_pipeline is not None and not (args.initial_pipeline / "model_index.json").is_file():
        parser.error(f"--initial_pipeline {args.initial_pipeline}: no pipeline there (no model_index.json)")
    return args


_Job = tuple[str, tuple[int, int], int, int | None]


def _render_array(job: _Job) -> np.ndarray:
    return np.asarray(render(*job))


def render_batches(
    captions: list[str], size: tuple[int, int], batch: int, seed: int, supersampling: int | None = None
) -> Iterator[torch.Tensor]:
    """Draw every caption once at (width, height), in worker processes; yields uint8 [b, 3, height, width]."""
    jobs = [(caption, size, seed + index, supersampling) for index, caption in enumerate(captions)]
    with ProcessPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) // 2)) as pool:
        pending: list[np.ndarray] = []
        for image in pool.map(_render_array, jobs, chunksize=32):
            pending.append(image)
            if len(pending) == batch:
                yield torch.from_numpy(np.stack(pending)).permute(0, 3, 1, 2)
                pending = []
        if pending:
            yield torch.from_numpy(np.stack(pending)).permute(0, 3, 1, 2)


T5_TOKENS = 256
"""Tokens that StableDiffusion3Pipeline reserves for a T5 encoder, all zero when there is none."""


class CountedLastKey(TorchFunctionMode):
    """Within it, the last key of every scaled dot-product attention counts `counts` [B] times, for each sample."""

    def __init__(self, counts: torch.Tensor) -> None:
        super().__init__()
        self.bias = counts.float().log().reshape(-1, 1, 1, 1)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value, given = (*args, kwargs.pop("attn_mask", None))[:4]
        if given is not None:
            raise RuntimeError("A masked attention cannot count its last key: feed all tokens.")
        mask = F.pad(self.bias.to(query.dtype), (key.shape[-2] - 1, 0))
        return function(query, key, value, mask.expand(-1, -1, query.shape[-2], -1), *args[4:], **kwargs)


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

    The tokens that stand for T5 are one that counts as often, see `CountedLastKey`.
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


class Progress:
    """Steps and seconds of one stage; both survive a restart, and whichever runs out first ends the stage."""

    def __init__(self, max_steps: int, max_seconds: float) -> None:
        self.max_steps, self.max_seconds = max_steps, max_seconds
        self.step, self.seconds = 0, 0.0
        self._mark = time.monotonic()

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step, self.seconds = int(state["step"]), float(state["seconds"])

    def start_clock(self) -> None:
        self._mark = time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        self.seconds, self._mark = self.seconds + now - self._mark, now
        self.step += 1

    @property
    def share(self) -> float:
        return min(1.0, max(self.step / self.max_steps, self.seconds / self.max_seconds))

    def shared_share(self) -> float:
        """That of the first process: clocks differ by milliseconds, and all must end at the same step."""
        share: float = broadcast_object_list([self.share])[0]
        return share

    def learning_rate(self, peak: float, warmup_steps: int) -> float:
        """Linear warm-up, then a cosine over what is left of the steps or of the time."""
        return peak * min(1.0, (self.step + 1) / max(warmup_steps, 1)) * 0.5 * (1 + math.cos(math.pi * self.share))


class Checkpoints:
    """checkpoint-N folders of one stage: written whole under a temporary name, rotated, the newest resumed."""

    def __init__(self, accelerator: Accelerator, folder: Path, limit: int) -> None:
        self.accelerator, self.folder, self.limit = accelerator, folder, limit

    def _existing(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))

    def save(self, step: int) -> None:
        target, partial = self.folder / f"checkpoint-{step}", self.folder / f"partial-{step}"
        self.accelerator.save_state(str(partial))
        if self.accelerator.is_main_process and not target.exists():
            partial.rename(target)
            for old in self._existing()[: -self.limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        existing = self._existing()
        if existing:
            logger.info(f"resuming from {existing[-1]}")
            try:
                self.accelerator.load_state(str(existing[-1]))
            except Exception as error:  # what is damaged fails in many ways
                raise SystemExit(
                    f"{existing[-1]}: cannot be read ({first_line(error)}): remove it to go on from the one before"
                ) from error


def _write_atomically(model: DiffusionPipeline | ModelMixin, folder: Path) -> None:
    with atomic_path(folder, folder=True) as partial:
        model.save_pretrained(partial, safe_serialization=True)


class Autoencoder(torch.nn.Module):
    """Encode an image, decode given latents, as one forward pass, so that several processes exchange gradients."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images [B, 3, side, side] in -1..1 and latents -> decoded latents, posterior mean and log variance."""
        posterior = self.vae.encode(pictures).latent_dist
        return self.vae.decode(latents).sample.float(), posterior.mean.float(), posterior.logvar.float()


def train_vae(args: argparse.Namespace, accelerator: Accelerator, vae: AutoencoderKL) -> None:
    """The encoder learns the latents of `image_latents`, the decoder to undo them; writes output_dir/vae."""
    side = args.resolution
    captions = sample_captions(min(args.num_scenes, 3000), args.seed, held_out=False, different=False, size=side)
    pictures = torch.cat(list(render_batches(captions, (side, side), 256, args.seed)))
    whole = max(1, 4 * 128**2 // side**2)
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_learning_rate, weight_decay=0.0)
    model, optimizer = accelerator.prepare(Autoencoder(vae), optimizer)
    progress = Progress(args.vae_train_steps, args.max_train_seconds)
    accelerator.register_for_checkpointing(progress)
    checkpoints = Checkpoints(accelerator, args.output_dir / "vae-checkpoints", args.checkpoints_total_limit)
    checkpoints.resume()
    progress.start_clock()
    bar = tqdm(total=args.vae_train_steps, initial=progress.step, disable=not accelerator.is_local_main_process)
    while (share := progress.shared_share()) < 1:
        # The last part sees whole images, so that group norms meet the statistics they will be used with.
        crop, count = (args.vae_crop, args.vae_batch_size) if share < 0.6 else (side, whole)
        batch = _random_crops(pictures, count, crop, accelerator.device)
        latents = image_latents(batch)
        # What a denoiser draws is a little off: the decoder meets errors of up to that size in training.
        blur = args.latent_noise * torch.rand(count, 1, 1, 1, device=latents.device)
        for group in optimizer.param_groups:
            group["lr"] = progress.learning_rate(args.vae_learning_rate, args.lr_warmup_steps)
        with accelerator.autocast():
            decoded, mean, log_variance = model(batch, latents + blur * torch.randn_like(latents))
        error = decoded - batch
        reconstruction = (error.abs() + error.square()).mean()
        miss = (mean - latents).square()
        likelihood = 0.5 * (miss.detach() * (-log_variance).exp() + log_variance).mean()
        accelerator.backward(reconstruction + miss.mean() + 0.01 * likelihood)
        accelerator.clip_grad_norm_(vae.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        progress.tick()
        bar.update(1)
        if progress.step % 50 == 0:
            l1, encoder_error = error.abs().mean().item(), miss.mean().sqrt().item()
            bar.set_postfix(l1=f"{l1:.4f}", encoder=f"{encoder_error:.4f}")
            accelerator.log({"vae/l1": l1, "vae/encoder_error": encoder_error}, step=progress.step)
        if progress.step % args.checkpointing_steps == 0:
            checkpoints.save(progress.step)
    if accelerator.is_main_process:
        _write_atomically(vae.eval(), args.output_dir / "vae")
    accelerator.wait_for_everyone()


def _to_model_range(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    return pictures.to(device).float() / 127.5 - 1


def _random_crops(pictures: torch.Tensor, count: int, crop: int, device: torch.device) -> torch.Tensor:
    side = pictures.shape[-1]
    chosen = torch.randint(len(pictures), (count,))
    corners = torch.randint((side - crop) + 1, (count, 2))
    crops = [
        pictures[index, :, top : top + crop, left : left + crop]
        for index, (top, left) in zip(chosen.tolist(), corners.tolist(), strict=True)
    ]
    return _to_model_range(torch.stack(crops), device)


def cached_latents(
    args: argparse.Namespace, bucket: Bucket, accelerator: Accelerator
) -> tuple[torch.Tensor, list[str]]:
    """Latents [scenes, C, h, w] of freshly drawn scenes of one size and their captions, cached in output_dir."""
    shorter, seed = min(bucket.width, bucket.height), args.seed + 1
    captions = sample_captions(bucket.scenes, seed, held_out=False, different=False, size=shorter)
    path = args.output_dir / f"latents-{bucket.name}.safetensors"
    if accelerator.is_main_process and not path.exists():
        # Latents are made of means of 4 x 4 pixels, which is antialiasing enough where these are many.
        sampling = 1 if shorter >= 256 else None
        batches = render_batches(captions, (bucket.width, bucket.height), 64, seed, sampling)
        bar = tqdm(batches, total=math.ceil(len(captions) / 64), desc=f"drawing scenes of {bucket.name}")
        drawn = torch.cat([image_latents(_to_model_range(batch, torch.device("cpu"))).half() for batch in bar])
        with atomic_path(path) as partial:
            save_file({"latents": drawn.contiguous()}, partial)
    accelerator.wait_for_everyone()
    try:
        latents = load_file(str(path))["latents"]
    except (OSError, KeyError, SafetensorError) as error:
        raise SystemExit(f"{path}: cannot be read ({first_line(error)}): remove it to redraw") from error
    if len(latents) != len(captions):
        raise SystemExit(f"{path} holds {len(latents)} scenes, not {len(captions)} as asked: remove it to redraw")
    return latents, captions


def draw_bucket(buckets: list[Bucket], share: float, seed: int, step: int) -> int:
    """Which bucket a step trains on: the same in every process and after a restart."""
    weights = [bucket.weight if bucket.start <= share < bucket.end else 0.0 for bucket in buckets]
    return random.Random(f"{seed} {step}").choices(range(len(buckets)), weights)[0]


def train_denoiser(args: argparse.Namespace, accelerator: Accelerator, pipeline: DiffusionPipeline) -> None:
    """What the scheduler has a model predict, on cached latents with dropped captions and an EMA; writes
    output_dir/pipeline."""
    data = []
    for bucket in args.buckets:
        latents, captions = cached_latents(args, bucket, accelerator)
        data.append((latents, _tokenize(pipeline, captions)))
    empty = _tokenize(pipeline, [""])[0]
    denoiser = denoiser_of(pipeline)
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    ema = EMAModel(denoiser.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    ema.to(accelerator.device)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # one graph compiles in minutes, DDP's buckets in many more
        denoiser.denoiser.compile()
    progress = Progress(args.max_train_steps, args.max_train_seconds)
    accelerator.register_for_checkpointing(progress, ema)
    checkpoints = Checkpoints(accelerator, args.output_dir / "denoiser-checkpoints", args.checkpoints_total_limit)
    checkpoints.resume()
    diffusion = Diffusion(pipeline.scheduler)
    draws = (args.output_dir / "vae").is_dir()
    if not draws:
        logger.info("the autoencoder is not trained yet: no validation images")
    progress.start_clock()
    bar = tqdm(total=args.max_train_steps, initial=progress.step, disable=not accelerator.is_local_main_process)
    running: dict[str, float] = {}
    while (share := progress.shared_share()) < 1:
        at = draw_bucket(args.buckets, share, args.seed, progress.step)
        (latents, tokens), bucket = data[at], args.buckets[at]
        chosen = torch.randint(len(latents), (bucket.batch,))
        clean = latents[chosen].to(accelerator.device).float()
        prompt = tokens[chosen].clone()
        prompt[torch.rand(len(chosen)) < args.caption_dropout] = empty
        noise = torch.randn_like(clean)
        timesteps = draw_timesteps(diffusion, len(chosen), min(bucket.width, bucket.height)).to(accelerator.device)
        noisy = diffusion.add_noise(clean, noise, timesteps)
        target = diffusion.target(clean, noise, timesteps)
        for group in optimizer.param_groups:
            group["lr"] = progress.learning_rate(args.learning_rate, args.lr_warmup_steps)
        with accelerator.autocast():
            prediction = model(noisy, timesteps, prompt.to(accelerator.device))
        loss = F.mse_loss(prediction.float(), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        progress.tick()
        running[bucket.name] = 0.98 * running.get(bucket.name, loss.item()) + 0.02 * loss.item()
        bar.update(1)
        if progress.step % 50 == 0:
            losses = {f"loss {name}": round(value, 4) for name, value in running.items()}
            bar.set_postfix(losses, share=f"{progress.share:.3f}")
            accelerator.log({f"denoiser/{name}": value for name, value in losses.items()}, step=progress.step)
        if progress.step % args.checkpointing_steps == 0:
            checkpoints.save(progress.step)
        if progress.step % args.validation_steps == 0 and accelerator.is_main_process and draws:
            _validate(args, pipeline, ema, denoiser, progress.step)
            progress.start_clock()
    ema.copy_to(denoiser.parameters())
    if accelerator.is_main_process:
        _write_atomically(pipeline, args.output_dir / "pipeline")
        summary = {"steps": progress.step, "seconds": round(progress.seconds), "loss": running}
        write_json(args.output_dir / "training.json", summary)
    accelerator.wait_for_everyone()


def draw_timesteps(diffusion: Diffusion, count: int, side: int = 128) -> torch.Tensor:
    """[count] timesteps, stratified over the batch: the loss is less noisy than with independent draws.

    They lean towards high noise, where it is decided what stands where (fine detail is learned sooner), the more the
    greater `side`, the picture's shorter one in pixels: the same noise hides less of a larger picture.
    """
    strata = (torch.arange(count) + torch.rand(count)) / count
    timesteps = strata ** (0.6 * (128 / side) ** 0.4) * diffusion.steps
    return timesteps if diffusion.prediction == "flow" else timesteps.long()


def _tokenize(pipeline: DiffusionPipeline, captions: list[str]) -> torch.Tensor:
    length = pipeline.tokenizer.model_max_length
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return pipeline.tokenizer(captions, **options).input_ids


def _validate(
    args: argparse.Namespace,
    pipeline: DiffusionPipeline,
    ema: EMAModel,
    denoiser: UNetDenoiser | JointDenoiser,
    step: int,
) -> None:
    """Draw unseen captions with the averaged weights: a grid in output_dir/samples, and their fact accuracy."""
    ema.store(denoiser.parameters())
    ema.copy_to(denoiser.parameters())
    captions = sample_captions(args.num_validation_images, 99, held_out=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(args.seed)
    with torch.compiler.set_stance("force_eager"):  # other batch sizes would each be compiled anew
        images = pipeline(captions, num_inference_steps=20, guidance_scale=3.0, generator=generator).images
    ema.restore(denoiser.parameters())
    accuracy = sum(fact_accuracy(image, caption) for image, caption in zip(images, captions, strict=True)) / len(images)
    logger.info(f"step {step}: fact accuracy {accuracy:.3f} on {len(images)} unseen captions")
    columns = math.ceil(math.sqrt(len(images)))
    side = args.resolution
    grid = Image.new("RGB", (columns * side, math.ceil(len(images) / columns) * side))
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * side, index // columns * side))
    folder = args.output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / f"step-{step:06d}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=str(args.output_dir)
    )
    set_seed(args.seed, device_specific=True)
    if args.report_to:
        accelerator.init_trackers("train_scenes")
    stages = args.stages.split(",")
    pipeline = build_pipeline(args.resolution, args.seed, args.architecture, args.position_spacing)
    trained_vae, trained_pipeline = args.output_dir / "vae", args.output_dir / "pipeline"
    if args.initial_pipeline is not None:
        start_from(pipeline, args.initial_pipeline)
        if "vae" not in stages and not trained_vae.is_dir() and accelerator.is_main_process:
            _write_atomically(pipeline.vae, trained_vae)
        accelerator.wait_for_everyone()
    if "vae" in stages and not (trained_vae / "config.json").exists():
        train_vae(args, accelerator, pipeline.vae)
        accelerator.free_memory()
        accelerator = Accelerator(mixed_precision=args.mixed_precision, log_with=args.report_to)
    if trained_vae.is_dir():
        pipeline.vae = AutoencoderKL.from_pretrained(trained_vae).eval()
    if "denoiser" in stages and not (trained_pipeline / "model_index.json").exists():
        train_denoiser(args, accelerator, pipeline)
    if accelerator.is_main_process and trained_vae.is_dir() and trained_pipeline.is_dir():
        absent = {name: None for name, part in pipeline.components.items() if part is None}  # T5 is asked for otherwise
        vae = AutoencoderKL.from_pretrained(trained_vae)
        pipeline = type(pipeline).from_pretrained(trained_pipeline, vae=vae, **absent)
        _write_atomically(pipeline, trained_pipeline)
        if args.default_size is not None:
            denoiser_of(pipeline).denoiser.register_to_config(sample_size=args.default_size // 8)
        export_pipeline(pipeline, args.output_dir / "export")
    accelerator.end_training()


if __name__ == "__main__":
    main()
