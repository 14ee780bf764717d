"""Distil a diffusers pipeline into focused linear attention: back to the original's quality in minutes.

    accelerate launch examples/distill.py --pretrained_model_name_or_path scenes --prompts prompts.txt \\
        --resolution 128 --output_dir out/adapter

The teacher is the model itself with the adapter disabled. Images come from --train_data_dir (captions in
metadata.jsonl, .csv or .parquet, or .txt files), --dataset_name (needs the datasets library), or, with --prompts, from
the teacher. Killed at any moment, the same command with --resume_from_checkpoint latest goes on where it was. The
adapter in --output_dir loads with `load_adapter(pipeline, output_dir)`; a run that diverges leaves the last good one
there, and an exit code that is not 0.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

import diffusers
import numpy as np
import torch
from accelerate.accelerator import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize, list_mixers, restore
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
from flatten_diffusion.distill.buckets import LARGEST_SIDE, check_sizes, make_buckets, parse_sizes
from flatten_diffusion.distill.checkpoint import list_checkpoints
from flatten_diffusion.distill.conditioning import family_of
from flatten_diffusion.distill.latents import check_pipeline, pixels_per_token_step
from flatten_diffusion.files import write_json, write_text
from flatten_diffusion.mixers import MixerConfig
from flatten_diffusion.scenes.pipeline import PIPELINES, load_embedded

logger = get_logger(__name__, log_level="INFO")


def one_line(message: object) -> str:
    return " ".join(str(message).split())[:500]


class Parser(argparse.ArgumentParser):
    """Its errors are one line, without the usage of sixty flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)}\n")


def between(low: float, high: float) -> Callable[[str], float]:
    """A flag's type: a number from `low` to `high`, whole where both are."""
    kind = int if isinstance(low, int) and isinstance(high, int) else float

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no {whole}number from {low} to {high}")
        return value

    return parse


COUNT, STEPS, MANY, RANK = between(1, 2**16), between(0, 10**9), between(1, 10**9), between(0, 2**12)
RATE, WEIGHT, SCALE, SIDE = between(1e-12, 10.0), between(0.0, 1e6), between(1e-3, 1e3), between(1, LARGEST_SIDE)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", required=True, help="folder, Hub id, scenes or scenes-sd3")
    model.add_argument("--revision", default=None)
    model.add_argument("--variant", default=None)
    model.add_argument("--mixer", default="focused_linear", choices=list_mixers())
    model.add_argument("--kernel_size", type=between(0, 63), default=5, help="of focused_linear's convolution; 0: none")
    model.add_argument(
        "--window",
        type=between(0, 128),
        default=0,
        help="side, in tokens, of windows that stay softmax; 0 for none",
    )
    model.add_argument("--focusing_factor", type=SCALE, default=3.0, help="of focused_linear, before calibration")
    model.add_argument("--min_tokens", type=between(0, 2**30), default=0, help="calls with fewer tokens stay softmax")
    model.add_argument("--include", nargs="*", default=None, help="patterns of the attention layers to convert")
    model.add_argument("--exclude", nargs="*", default=(), help="patterns of layers to leave alone")
    model.add_argument("--projections", default="q,k,v,out", help="what of converted layers learns; empty for none")
    model.add_argument("--rank", type=RANK, default=16, help="of the projections' LoRA factors; 0: full matrices")
    data = parser.add_argument_group("data: one of the first three")
    data.add_argument("--train_data_dir", type=Path, default=None)
    data.add_argument("--dataset_name", default=None)
    data.add_argument("--prompts", type=Path, default=None, help="one per line; the teacher draws the images")
    data.add_argument("--dataset_config_name", default=None)
    data.add_argument("--image_column", default=None, help="default: file_name in metadata.jsonl, image on the Hub")
    data.add_argument("--caption_column", default="text")
    data.add_argument("--max_train_samples", type=MANY, default=None)
    data.add_argument("--num_eval_samples", type=MANY, default=None, help="held out; default: a tenth, at most 256")
    data.add_argument(
        "--evaluation_batches",
        type=COUNT,
        default=8,
        help="per process, of held-out samples: the gap's",
    )
    data.add_argument("--cache_dir", type=Path, default=None, help="of latents; default: output_dir/cache")
    data.add_argument("--resolution", type=SIDE, default=512, help="side in pixels of the square bucket")
    data.add_argument("--buckets", default=None, help="'auto' for aspect ratios up to 2, or 512x512,384x640 (h x w)")
    data.add_argument("--draw_steps", type=between(1, 1000), default=20, help="inference steps when the teacher draws")
    data.add_argument("--draw_guidance_scale", type=between(0.0, 1e3), default=3.0)
    data.add_argument("--cache_batch_size", type=COUNT, default=8)
    data.add_argument("--dataloader_num_workers", type=between(0, 256), default=0)
    train = parser.add_argument_group("training")
    train.add_argument("--stages", default=",".join(STAGES))
    train.add_argument("--seed", type=between(0, 2**32 - 1), default=0)
    train.add_argument("--train_batch_size", type=COUNT, default=16, help="per process")
    train.add_argument("--gradient_accumulation_steps", type=COUNT, default=1)
    train.add_argument("--gradient_checkpointing", action="store_true")
    train.add_argument("--calibration_batches", type=COUNT, default=12)
    train.add_argument("--transfer_steps", type=STEPS, default=300)
    train.add_argument("--transfer_learning_rate", type=RATE, default=3e-3)
    train.add_argument("--max_train_steps", type=STEPS, default=1000, help="of the finetune stage")
    train.add_argument("--learning_rate", type=RATE, default=3e-4, help="of the finetune stage")
    train.add_argument("--lr_scheduler", default="cosine", help="of both stages: constant, linear, cosine, …")
    train.add_argument("--lr_warmup_steps", type=STEPS, default=20)
    train.add_argument("--adam_weight_decay", type=between(0.0, 1.0), default=0.0)
    train.add_argument("--max_grad_norm", type=between(1e-9, 1e9), default=1.0)
    train.add_argument("--caption_dropout", type=between(0.0, 1.0), default=0.1, help="as in the teacher's training")
    train.add_argument("--teacher_loss_weight", type=WEIGHT, default=1.0)
    train.add_argument("--target_loss_weight", type=WEIGHT, default=0.5)
    train.add_argument("--feature_loss_weight", type=WEIGHT, default=0.5)
    train.add_argument("--guided_loss_weight", type=WEIGHT, default=0.0)
    train.add_argument("--guidance_scale", type=SCALE, default=3.0, help="of the guided loss and of validation")
    train.add_argument("--snr_gamma", type=SCALE, default=None, help="min-SNR weighting; 5 is the paper's value")
    train.add_argument("--use_ema", action=argparse.BooleanOptionalAction, default=True)
    train.add_argument("--ema_decay", type=between(0.0, 0.999999), default=0.99)
    train.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default=None)
    train.add_argument("--allow_tf32", action="store_true")
    out = parser.add_argument_group("output")
    out.add_argument("--output_dir", type=Path, default=Path("out/adapter"))
    out.add_argument("--checkpointing_steps", type=MANY, default=500)
    out.add_argument("--checkpoints_total_limit", type=COUNT, default=3)
    out.add_argument("--resume_from_checkpoint", choices=("latest",), default=None)
    out.add_argument("--validation_prompts", nargs="*", default=())
    out.add_argument("--num_validation_images", type=between(1, 64), default=1, help="per prompt")
    out.add_argument("--validation_steps", type=MANY, default=500)
    out.add_argument("--validation_inference_steps", type=between(1, 1000), default=20)
    out.add_argument("--report_to", default=None, help="tracker, or 'none'; default: tensorboard where installed")
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
    for name in ("output_dir", "cache_dir"):
        folder = getattr(args, name)
        if folder is not None and folder.exists() and not folder.is_dir():
            parser.error(f"--{name} {folder} is a file")
    trackers = [str(tracker.value) for tracker in get_available_trackers()]
    if args.report_to is None:
        args.report_to = "tensorboard" if "tensorboard" in trackers else "none"
    if args.report_to not in ("none", "all", *trackers):
        parser.error(f"--report_to {args.report_to} is not installed: choose out of none, {', '.join(trackers)}")
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_model_id or args.output_dir.resolve().name)
            HfApi().whoami()
        except HFValidationError as error:
            parser.error(f"--hub_model_id: {error}")
        except Exception as error:  # of the client, whose kinds differ by version
            parser.error(f"--push_to_hub: the Hub cannot be reached or does not know you ({one_line(error)})")


def check_model(args: argparse.Namespace) -> None:
    """Whether its pipeline can be distilled and validated, from its index alone; classes of others pass.

    Raises:
        OSError: no pipeline there.
        ValueError: it needs more than prompts, or draws no still images from --validation_prompts.
    """
    if args.pretrained_model_name_or_path in PIPELINES:
        return
    index: Any = DiffusionPipeline.load_config(args.pretrained_model_name_or_path, revision=args.revision)
    cls = getattr(diffusers, str(index.get("_class_name")), None)
    if cls is None:
        return
    check_pipeline(cls)
    accepted = inspect.signature(cls.__call__).parameters
    if args.validation_prompts and ("prompt" not in accepted or "num_frames" in accepted):
        raise ValueError(f"{cls.__name__} draws no still images from prompts: leave out --validation_prompts.")


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
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            torch_dtype=dtype,
            use_safetensors=True,
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
            teacher = self._images(prompts)
        return make_image_grid([*teacher, *self._images(prompts)], rows=2, cols=len(prompts))

    def _images(self, prompts: list[str]) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(self.args.seed + index) for index in range(len(prompts))]
        options = {"num_inference_steps": self.args.validation_inference_steps, "generator": generators}
        if "guidance_scale" in inspect.signature(type(self.pipeline).__call__).parameters:
            options["guidance_scale"] = self.args.guidance_scale
        with self.accelerator.autocast():
            pictures: list[Image.Image] = self.pipeline(prompts, **options).images
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
    """What each stage reached: denoising losses on held-out examples and the share of the raw swap's gap closed.

    None stands for what is not finite.
    """
    raw = progress.gaps["raw"]
    stages = [
        {
            "stage": stage,
            "loss": finite(gap.student),
            "distance_to_teacher": finite(gap.distance),
            "gap_closed": finite(gap.closed(raw)) if raw.student != raw.teacher else None,
            "distance_closed": finite(1 - gap.distance / raw.distance) if raw.distance else None,
            "seconds": round(progress.seconds.get(stage, 0.0), 1),
        }
        for stage, gap in progress.gaps.items()
    ]
    return {"teacher_loss": finite(raw.teacher), "stages": stages, "skipped_steps": progress.skipped}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(summary: dict[str, Any]) -> str:
    """The summary as a markdown table."""
    lines = [f"Teacher's held-out denoising loss: {_shown(summary['teacher_loss'], '.5f')}", ""]
    lines += ["| stage | loss | gap closed | distance to teacher | seconds |", "|---|---|---|---|---|"]
    for row in summary["stages"]:
        formats = {"loss": ".5f", "gap_closed": ".1%", "distance_to_teacher": ".2e", "seconds": ".0f"}
        cells = [row["stage"], *(_shown(row[name], form) for name, form in formats.items())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def save_results(args: argparse.Namespace, adapter: Adapter, summary: dict[str, Any]) -> None:
    """The adapter, before anything else can fail; then summary.json, and the results on the adapter's card."""
    adapter.save_pretrained(args.output_dir)
    write_json(args.output_dir / "summary.json", summary)
    extend_card(args, f"## Distillation\n\n{table(summary)}")
    logger.info(f"\n{table(summary)}\nadapter: {args.output_dir}")


def extend_card(args: argparse.Namespace, text: str) -> None:
    card = args.output_dir / "README.md"
    write_text(card, f"{card.read_text(encoding='utf-8')}\n{text}\n")


def upload(args: argparse.Namespace) -> None:
    """Raises OSError when the Hub does not take it."""
    api = HfApi()
    files = ["adapter_*", "README.md", "summary.json", "validation/final.png"]
    try:
        repo = api.create_repo(args.hub_model_id or args.output_dir.resolve().name, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, folder_path=args.output_dir, allow_patterns=files)
    except Exception as error:  # of the client, whose kinds differ by version
        reason = f"could not be uploaded: {one_line(error)}"
        raise OSError(f"{args.output_dir} holds the adapter, which {reason}") from error


def main(arguments: list[str] | None = None) -> None:
    try:
        distil(parse_args(arguments))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        logger.logger.debug("where it failed", exc_info=error)
        raise SystemExit(f"error: {one_line(error)}") from error


def distil(args: argparse.Namespace) -> None:
    settings, config = settings_of(args), conversion_of(args)
    if args.resume_from_checkpoint is None and list_checkpoints(args.output_dir):
        raise ValueError(
            f"{args.output_dir} holds checkpoints: pass --resume_from_checkpoint latest, or another --output_dir"
        )
    cache_settings(args, 1)
    examples = list_examples(args)
    if not (args.num_eval_samples or 1) < len(examples):
        raise ValueError(f"{args.num_eval_samples or 1} held-out of {len(examples)} examples leave none to train on")
    check_model(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    tracker = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=tracker, project_dir=str(args.output_dir / "logs")
    )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    set_seed(args.seed)
    if tracker:
        accelerator.init_trackers(args.tracker_project_name)

    pipeline = load_pipeline(args, accelerator)
    model = resolve_model(pipeline)
    family_of(model)
    diffusion = Diffusion(pipeline.scheduler)
    linearize(model, config)  # what cannot be converted is said before the cache is built
    restore(model)
    cache = build_cache(
        pipeline,
        model,
        examples,
        args.cache_dir or args.output_dir / "cache",
        cache_settings(args, pixels_per_token_step(pipeline, model)),
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )
    train, evaluation = cache.split(args.num_eval_samples or max(1, min(256, len(cache) // 10)))
    if args.gradient_checkpointing:
        cast(Any, model).enable_gradient_checkpointing()
    validation = Validation(args, accelerator, pipeline)

    def prepare() -> Distiller:
        return Distiller(
            accelerator,
            linearize(model, config),
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

    distiller = prepare()
    logger.info(f"{len(train)} examples to train on, {len(evaluation)} held out\n{distiller.adapter.report()}")
    try:
        progress = distiller.run(resume=args.resume_from_checkpoint is not None)
    except FloatingPointError as error:
        restore(model)
        good = prepare()
        if good.load_checkpoint() is None:
            raise
        if accelerator.is_main_process:
            save_results(args, good.adapter, {**summarise(good.progress), "diverged": str(error)})
        kept = f"{args.output_dir} holds the adapter as of {good.progress.where}"
        raise FloatingPointError(f"{error} {kept}.") from error
    adapter = distiller.adapter
    if accelerator.is_main_process:
        save_results(args, adapter, summarise(progress))
    accelerator.wait_for_everyone()
    if args.validation_prompts:
        validation.save(adapter, "final", progress.total_steps)
        if accelerator.is_main_process:
            picture = "![validation](validation/final.png)"
            extend_card(args, f"Original above, distilled below, from the same seeds:\n\n{picture}")
    if args.push_to_hub and accelerator.is_main_process:
        upload(args)
    accelerator.end_training()


if __name__ == "__main__":
    main()
