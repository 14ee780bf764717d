"""Distil a diffusers pipeline into focused linear attention: back to the original's quality in minutes.

    accelerate launch examples/distill.py --pretrained_model_name_or_path scenes --prompts prompts.txt \\
        --resolution 128 --output_dir out/adapter

The teacher is the model itself with the adapter disabled. Pictures come from --train_data_dir (captions in
metadata.jsonl or .txt files), --dataset_name (needs the datasets library), or, with --prompts, from the teacher. Killed
at any moment, the same command with --resume_from_checkpoint latest goes on where it was. The adapter in --output_dir
loads with `load_adapter(pipeline, output_dir)`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.accelerator import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, set_seed
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize, list_mixers
from flatten_diffusion.adapter import Adapter, resolve_model
from flatten_diffusion.distill import (
    STAGES,
    CacheSettings,
    CalibrationSettings,
    Diffusion,
    Distiller,
    DistillSettings,
    Example,
    LossWeights,
    Progress,
    StageSettings,
    build_cache,
    hub_dataset,
    image_folder,
    prompt_file,
)
from flatten_diffusion.distill.buckets import check_sizes, make_buckets, parse_sizes
from flatten_diffusion.distill.checkpoint import list_checkpoints
from flatten_diffusion.distill.conditioning import family_of
from flatten_diffusion.distill.latents import pixels_per_token_step
from flatten_diffusion.mixers import MixerConfig
from flatten_diffusion.scenes.pipeline import PIPELINES, load_embedded

logger = get_logger(__name__, log_level="INFO")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", required=True, help="folder, Hub id, scenes or scenes-sd3")
    model.add_argument("--revision", default=None)
    model.add_argument("--variant", default=None)
    model.add_argument("--mixer", default="focused_linear", choices=list_mixers())
    model.add_argument("--kernel_size", type=int, default=5, help="of focused_linear's convolution; 0 for none")
    model.add_argument(
        "--window",
        type=int,
        default=0,
        help="side, in tokens, of windows that stay softmax; 0 for none",
    )
    model.add_argument("--focusing_factor", type=float, default=3.0, help="of focused_linear, before calibration")
    model.add_argument("--min_tokens", type=int, default=0, help="calls with fewer tokens stay softmax")
    model.add_argument("--include", nargs="*", default=None, help="patterns of the attention layers to convert")
    model.add_argument("--exclude", nargs="*", default=(), help="patterns of layers to leave alone")
    model.add_argument("--projections", default="q,k,v,out", help="what of converted layers learns; empty for none")
    model.add_argument("--rank", type=int, default=16, help="of the projections' LoRA factors; 0: full matrices")
    data = parser.add_argument_group("data: one of the first three")
    data.add_argument("--train_data_dir", type=Path, default=None)
    data.add_argument("--dataset_name", default=None)
    data.add_argument("--prompts", type=Path, default=None, help="one per line; the teacher draws the pictures")
    data.add_argument("--dataset_config_name", default=None)
    data.add_argument("--image_column", default=None, help="default: file_name in metadata.jsonl, image on the Hub")
    data.add_argument("--caption_column", default="text")
    data.add_argument("--max_train_samples", type=int, default=None)
    data.add_argument("--num_eval_samples", type=int, default=None, help="held out; default: a tenth, at most 256")
    data.add_argument(
        "--evaluation_batches", type=int, default=8, help="per process, of held-out samples with fresh noise: the gap's"
    )
    data.add_argument("--cache_dir", type=Path, default=None, help="of latents; default: output_dir/cache")
    data.add_argument("--resolution", type=int, default=512, help="side in pixels of the square bucket")
    data.add_argument("--buckets", default=None, help="'auto' for aspect ratios up to 2, or 512x512,384x640 (h x w)")
    data.add_argument("--draw_steps", type=int, default=20, help="inference steps when the teacher draws")
    data.add_argument("--draw_guidance_scale", type=float, default=3.0)
    data.add_argument("--cache_batch_size", type=int, default=8)
    data.add_argument("--dataloader_num_workers", type=int, default=0)
    train = parser.add_argument_group("training")
    train.add_argument("--stages", default=",".join(STAGES))
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--train_batch_size", type=int, default=16, help="per process")
    train.add_argument("--gradient_accumulation_steps", type=int, default=1)
    train.add_argument("--gradient_checkpointing", action="store_true")
    train.add_argument("--calibration_batches", type=int, default=12)
    train.add_argument("--transfer_steps", type=int, default=300)
    train.add_argument("--transfer_learning_rate", type=float, default=3e-3)
    train.add_argument("--max_train_steps", type=int, default=1000, help="of the finetune stage")
    train.add_argument("--learning_rate", type=float, default=3e-4, help="of the finetune stage")
    train.add_argument("--lr_scheduler", default="cosine", help="of both stages: constant, linear, cosine, …")
    train.add_argument("--lr_warmup_steps", type=int, default=20)
    train.add_argument("--adam_weight_decay", type=float, default=0.0)
    train.add_argument("--max_grad_norm", type=float, default=1.0)
    train.add_argument("--caption_dropout", type=float, default=0.1, help="as in the teacher's training")
    train.add_argument("--teacher_loss_weight", type=float, default=1.0)
    train.add_argument("--target_loss_weight", type=float, default=0.5)
    train.add_argument("--feature_loss_weight", type=float, default=0.5)
    train.add_argument("--guided_loss_weight", type=float, default=0.0)
    train.add_argument("--guidance_scale", type=float, default=3.0, help="of the guided loss and of validation")
    train.add_argument("--snr_gamma", type=float, default=None, help="min-SNR weighting; 5 is the paper's value")
    train.add_argument("--use_ema", action=argparse.BooleanOptionalAction, default=True)
    train.add_argument("--ema_decay", type=float, default=0.99)
    train.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default=None)
    train.add_argument("--allow_tf32", action="store_true")
    out = parser.add_argument_group("output")
    out.add_argument("--output_dir", type=Path, default=Path("out/adapter"))
    out.add_argument("--checkpointing_steps", type=int, default=500)
    out.add_argument("--checkpoints_total_limit", type=int, default=3)
    out.add_argument("--resume_from_checkpoint", choices=("latest",), default=None)
    out.add_argument("--validation_prompts", nargs="*", default=())
    out.add_argument("--num_validation_images", type=int, default=1, help="per prompt")
    out.add_argument("--validation_steps", type=int, default=500)
    out.add_argument("--validation_inference_steps", type=int, default=20)
    out.add_argument("--report_to", default="tensorboard", help="'none' for no tracker")
    out.add_argument("--tracker_project_name", default="distill")
    out.add_argument("--push_to_hub", action="store_true")
    out.add_argument("--hub_model_id", default=None)
    args = parser.parse_args(arguments)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What can be said before anything is loaded."""
    if sum(source is not None for source in (args.train_data_dir, args.dataset_name, args.prompts)) != 1:
        parser.error("pass one of --train_data_dir, --dataset_name and --prompts")
    if args.train_data_dir is not None and not args.train_data_dir.is_dir():
        parser.error(f"--train_data_dir {args.train_data_dir} is no folder")
    if args.prompts is not None and not args.prompts.is_file():
        parser.error(f"--prompts {args.prompts} is no file")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file")
    if args.rank < 0 or args.checkpoints_total_limit < 1 or args.checkpointing_steps < 1 or args.validation_steps < 1:
        parser.error("--rank must be at least 0, --checkpoints_total_limit and the ..._steps at least 1")
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_model_id or args.output_dir.resolve().name)
        except HFValidationError as error:
            parser.error(f"--hub_model_id: {error}")


def mixer_of(args: argparse.Namespace) -> MixerConfig | str:
    """The mixer with the flags that are its own."""
    if args.mixer == FocusedLinearConfig.name:
        return FocusedLinearConfig(args.focusing_factor, args.kernel_size)
    return str(args.mixer)


def conversion_of(args: argparse.Namespace) -> AdapterConfig:
    """The flags of the conversion. Raises ValueError for a value out of range."""
    return AdapterConfig(
        mixer=mixer_of(args),
        window=args.window,
        min_tokens=args.min_tokens,
        include=None if args.include is None else tuple(args.include),
        exclude=tuple(args.exclude),
    )


def settings_of(args: argparse.Namespace) -> DistillSettings:
    """The flags that decide the result. Raises ValueError for a value out of range."""
    schedule = (args.lr_scheduler, args.lr_warmup_steps)
    return DistillSettings(
        stages=tuple(stage for stage in args.stages.split(",") if stage),
        seed=args.seed,
        train_batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        caption_dropout=args.caption_dropout,
        max_grad_norm=args.max_grad_norm,
        adam_weight_decay=args.adam_weight_decay,
        projections=tuple(name for name in args.projections.split(",") if name),
        rank=args.rank or None,
        calibration=CalibrationSettings(),
        evaluation_batches=args.evaluation_batches,
        calibration_batches=args.calibration_batches,
        transfer=StageSettings(args.transfer_steps, args.transfer_learning_rate, *schedule),
        finetune=StageSettings(args.max_train_steps, args.learning_rate, *schedule),
        weights=LossWeights(
            teacher=args.teacher_loss_weight,
            target=args.target_loss_weight,
            features=args.feature_loss_weight,
            guided=args.guided_loss_weight,
            guidance_scale=args.guidance_scale,
            min_snr_gamma=args.snr_gamma,
        ),
        ema_decay=args.ema_decay if args.use_ema else None,
    )


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator) -> Any:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    if args.pretrained_model_name_or_path in PIPELINES:
        pipeline: Any = load_embedded(args.pretrained_model_name_or_path, dtype)
    else:
        pipeline = DiffusionPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, torch_dtype=dtype
        )
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
            component.eval()
    return pipeline.to(accelerator.device)


def list_examples(args: argparse.Namespace) -> list[Example]:
    if args.prompts is not None:
        return prompt_file(args.prompts, args.max_train_samples)
    if args.train_data_dir is not None:
        return image_folder(
            args.train_data_dir,
            image_column=args.image_column or "file_name",
            caption_column=args.caption_column,
            max_samples=args.max_train_samples,
        )
    return hub_dataset(
        args.dataset_name,
        config_name=args.dataset_config_name,
        image_column=args.image_column or "image",
        caption_column=args.caption_column,
        max_samples=args.max_train_samples,
    )


def cache_settings(args: argparse.Namespace, step: int) -> CacheSettings:
    if args.buckets is None:
        sizes = [(args.resolution, args.resolution)]
    elif args.buckets == "auto":
        sizes = make_buckets(args.resolution, step)
    else:
        sizes = parse_sizes(args.buckets)
    check_sizes(sizes, step)
    return CacheSettings(
        buckets=tuple(sizes),
        draw_steps=args.draw_steps,
        guidance_scale=args.draw_guidance_scale,
        seed=args.seed,
        batch_size=args.cache_batch_size,
    )


class Validation:
    """Grids of the teacher's row above the student's, from the same seeds: in output_dir/validation and the tracker."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, pipeline: Any) -> None:
        self.args, self.accelerator, self.pipeline = args, accelerator, pipeline

    def draw(self, adapter: Adapter) -> Image.Image:
        prompts = [prompt for prompt in self.args.validation_prompts for _ in range(self.args.num_validation_images)]
        with adapter.disabled():
            teacher = self._pictures(prompts)
        return make_image_grid([*teacher, *self._pictures(prompts)], rows=2, cols=len(prompts))

    def _pictures(self, prompts: list[str]) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(self.args.seed + index) for index in range(len(prompts))]
        with self.accelerator.autocast():
            pictures: list[Image.Image] = self.pipeline(
                prompts,
                num_inference_steps=self.args.validation_inference_steps,
                guidance_scale=self.args.guidance_scale,
                generator=generators,
            ).images
        return pictures

    def __call__(self, distiller: Distiller, losses: dict[str, float]) -> None:
        progress, step = distiller.progress, distiller.progress.total_steps
        self.accelerator.log({f"{progress.stage}/{name}": value for name, value in losses.items()}, step=step)
        if not self.args.validation_prompts or step % self.args.validation_steps:
            return
        sharded = self.accelerator.distributed_type == DistributedType.FSDP  # then every process has to take part
        if self.accelerator.is_main_process or sharded:
            self.save(distiller.adapter, f"step-{step:06d}", step)
        self.accelerator.wait_for_everyone()

    def save(self, adapter: Adapter, name: str, step: int) -> None:
        grid = self.draw(adapter)
        if not self.accelerator.is_main_process:
            return
        folder = self.args.output_dir / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        grid.save(folder / f"{name}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("teacher above student", np.asarray(grid), step, dataformats="HWC")


def summarise(progress: Progress) -> dict[str, Any]:
    """What each stage reached: denoising losses on held-out examples and the share of the raw swap's gap closed."""
    raw = progress.gaps["raw"]
    stages = [
        {
            "stage": stage,
            "loss": gap.student,
            "distance_to_teacher": gap.distance,
            "gap_closed": gap.closed(raw) if raw.student != raw.teacher and math.isfinite(raw.student) else None,
            "distance_closed": 1 - gap.distance / raw.distance if raw.distance else None,
            "seconds": round(progress.seconds.get(stage, 0.0), 1),
        }
        for stage, gap in progress.gaps.items()
    ]
    return {"teacher_loss": raw.teacher, "stages": stages, "skipped_steps": progress.skipped}


def table(summary: dict[str, Any]) -> str:
    """The summary as a markdown table."""
    lines = [f"Teacher's held-out denoising loss: {summary['teacher_loss']:.5f}", ""]
    lines += ["| stage | loss | gap closed | distance to teacher | seconds |", "|---|---|---|---|---|"]
    for row in summary["stages"]:
        closed = "-" if row["gap_closed"] is None else f"{row['gap_closed']:.1%}"
        distance = f"{row['distance_to_teacher']:.2e}"
        lines.append(f"| {row['stage']} | {row['loss']:.5f} | {closed} | {distance} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def publish(args: argparse.Namespace, adapter: Adapter, summary: dict[str, Any]) -> None:
    """Write the adapter, its card with the results, and summary.json; upload them if asked to."""
    adapter.save_pretrained(args.output_dir)
    card = args.output_dir / "README.md"
    text = card.read_text(encoding="utf-8") + "\n## Distillation\n\n" + table(summary) + "\n"
    if (args.output_dir / "validation" / "final.png").is_file():
        text += "\nOriginal above, distilled below, from the same seeds:\n\n![validation](validation/final.png)\n"
    card.write_text(text, encoding="utf-8")
    partial = args.output_dir / ".summary.json.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    partial.replace(args.output_dir / "summary.json")
    if args.push_to_hub:
        api = HfApi()
        repo = api.create_repo(args.hub_model_id or args.output_dir.resolve().name, exist_ok=True).repo_id
        files = ["adapter_*", "README.md", "summary.json", "validation/final.png"]
        api.upload_folder(repo_id=repo, folder_path=args.output_dir, allow_patterns=files)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        settings, config = settings_of(args), conversion_of(args)
        examples = list_examples(args)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    if args.resume_from_checkpoint is None and list_checkpoints(args.output_dir):
        raise SystemExit(
            f"error: {args.output_dir} holds checkpoints: pass --resume_from_checkpoint latest, or another --output_dir"
        )
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    tracker = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=tracker, project_dir=str(args.output_dir / "logs")
    )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    set_seed(args.seed)
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if tracker:
        accelerator.init_trackers(args.tracker_project_name)

    pipeline = load_pipeline(args, accelerator)
    model = resolve_model(pipeline)
    try:
        family_of(model)
        diffusion = Diffusion(pipeline.scheduler)
        caching = cache_settings(args, pixels_per_token_step(pipeline, model))
        cache = build_cache(
            pipeline,
            model,
            examples,
            args.cache_dir or args.output_dir / "cache",
            caching,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            wait=accelerator.wait_for_everyone,
        )
        held_out = args.num_eval_samples if args.num_eval_samples is not None else max(1, min(256, len(cache) // 10))
        train, evaluation = cache.split(held_out)
        adapter = linearize(model, config)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if args.gradient_checkpointing:
        cast(Any, model).enable_gradient_checkpointing()
    logger.info(f"{len(train)} examples to train on, {len(evaluation)} held out\n{adapter.report()}")

    validation = Validation(args, accelerator, pipeline)
    distiller = Distiller(
        accelerator,
        adapter,
        diffusion,
        train,
        evaluation,
        settings,
        output_dir=args.output_dir,
        checkpointing_steps=args.checkpointing_steps,
        checkpoints_total_limit=args.checkpoints_total_limit,
        dataloader_num_workers=args.dataloader_num_workers,
        on_step=validation,
    )
    try:
        progress = distiller.run(resume=args.resume_from_checkpoint is not None)
    except (ValueError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    if args.validation_prompts:
        validation.save(adapter, "final", progress.total_steps)
    if accelerator.is_main_process:
        summary = summarise(progress)
        publish(args, adapter, summary)
        logger.info(f"\n{table(summary)}\nadapter: {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
