"""What each part of the conversion and of the distillation is worth: one variant after another, the same budget each.

    python -m eval.experiments.ablation --num_scenes 2000 --json eval/results/ablation.json

Every variant converts the same layers of the same pipeline, sees the same batches and is measured by the share of the
raw focused swap's denoising-loss gap that it closes on held-out examples. Prints one table, writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.accelerator import Accelerator
from torch import nn

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize, restore
from flatten_diffusion.adapter import Adapter, resolve_model
from flatten_diffusion.distill import (
    STAGES,
    CacheSettings,
    CalibrationSettings,
    Diffusion,
    Distiller,
    DistillSettings,
    Gap,
    LatentCache,
    StageSettings,
    build_cache,
    image_folder,
)
from flatten_diffusion.distill.buckets import check_sizes
from flatten_diffusion.distill.latents import pixels_per_token_step
from flatten_diffusion.mixers import (
    Context,
    FocusedCalibration,
    FocusedLinearAttention,
    LayerShape,
    Mixed,
    Mixer,
    MixerConfig,
    ProjectionDelta,
    register_mixer,
)
from flatten_diffusion.models import find_projection
from flatten_diffusion.scenes.grammar import sample_captions
from flatten_diffusion.scenes.render import render_folder
from flatten_eval.errors import InputError
from flatten_eval.files import write_json
from flatten_eval.pipelines import load_pipeline
from flatten_eval.versions import environment


@dataclass(frozen=True)
class EluMlpConfig(MixerConfig):
    """`EluMlpAttention` has no settings."""


@register_mixer("ablation_elu_mlp")
class EluMlpAttention(Mixer):
    """LinFusion's kernel (Liu et al., "LinFusion", 2024, section 3): elu(x + MLP(x)) + 1 on query and key.

    The MLPs work on each token's whole query (or key), are as wide as it, and end in zeros, so they add nothing at
    first. No convolution.
    """

    Config = EluMlpConfig
    supports = frozenset({"frames", "images"})

    def __init__(self, config: EluMlpConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        width = layer.heads * layer.head_dim
        self.query_mlp, self.key_mlp = (
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(2)
        )
        for mlp in (self.query_mlp, self.key_mlp):
            for parameter in mlp[2].parameters():
                nn.init.zeros_(parameter)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`."""
        shape = query.shape
        mapped_query = F.elu((query.flatten(2) + self.query_mlp(query.flatten(2))).contiguous()).reshape(shape) + 1
        mapped_key = F.elu((key.flatten(2) + self.key_mlp(key.flatten(2))).contiguous()).reshape(key.shape) + 1
        state = torch.einsum("bmhd,bmhe->bhde", mapped_key, value) / key.shape[1]
        normalizer = torch.einsum("bnhd,bhd->bnh", mapped_query, mapped_key.mean(1)) + 1e-6
        return Mixed(torch.einsum("bnhd,bhde->bnhe", mapped_query, state) / normalizer[..., None])


@dataclass(frozen=True)
class MergedHeadsConfig(FocusedLinearConfig):
    """Settings of the one head."""


@register_mixer("ablation_merged_heads")
class MergedHeads(Mixer):
    """Focused linear attention with all heads of a layer made one, the convolution over all its channels."""

    Config = MergedHeadsConfig
    supports = frozenset({"mask", "frames", "images"})

    def __init__(self, config: MergedHeadsConfig, layer: LayerShape) -> None:
        super().__init__(config, layer)
        self.attention = FocusedLinearAttention(config, LayerShape(1, layer.heads * layer.head_dim, layer.channels))
        self.needs = self.attention.needs

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`."""
        merged = (x.flatten(2).unsqueeze(2) for x in (query, key, value))
        output: torch.Tensor = self.attention(*merged, context).output
        return Mixed(output.reshape(query.shape))


@dataclass(frozen=True)
class Variant:
    """One row: what differs from the whole recipe.

    Attributes:
        config: changes of the conversion.
        settings: changes of the distillation.
        fresh: whether the query and key projections start from random weights instead of the teacher's.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False


@dataclass(frozen=True)
class Budget:
    """What all variants share."""

    pipeline: Any
    config: AdapterConfig
    settings: DistillSettings
    data: tuple[LatentCache, LatentCache]


_UNFOCUSED = CalibrationSettings(mixers=(FocusedCalibration(powers=(1.0,)),))
_INHERITED = CalibrationSettings(mixers=(FocusedCalibration(shifts=(), pair_shifts=()),))
VARIANTS = (
    Variant("focused + convolution (whole recipe)"),
    Variant("with windows of 8", {"window": 8}),
    Variant("no convolution", {"mixer": FocusedLinearConfig(kernel_size=0)}),
    Variant("no focusing power", {"mixer": FocusedLinearConfig(focusing_factor=1.0)}, {"calibration": _UNFOCUSED}),
    Variant("plain relu: neither", {"mixer": FocusedLinearConfig(1.0, 0)}, {"calibration": _UNFOCUSED}),
    Variant("elu + 1 with MLPs (LinFusion)", {"mixer": "ablation_elu_mlp"}),
    Variant("all heads merged", {"mixer": "ablation_merged_heads"}),
    Variant("query and key fresh", {}, {"calibration": _INHERITED}, fresh=True),
    Variant("calibration keeps query and key", {}, {"calibration": _INHERITED}),
    Variant("without calibrate", {}, {"stages": ("transfer", "finetune")}),
    Variant("without transfer", {}, {"stages": ("calibrate", "finetune")}),
    Variant("without finetune", {}, {"stages": ("calibrate", "transfer")}),
)


def refresh(adapter: Adapter, seed: int) -> None:
    """Make queries and keys come from new random projections, through the deltas."""
    generator = torch.Generator().manual_seed(seed)
    adapter.add_deltas(("q", "k", "v", "out"))
    for _, attn in adapter.attention_modules():
        for name in ("q", "k"):
            projection = find_projection(attn, name)
            assert projection is not None, "a UNet's layers have their own projections"
            weight = projection.module(attn).weight.detach()
            new = torch.randn(weight.shape, generator=generator) * weight.std()
            delta = attn.flatten_mixer.deltas[name]
            assert isinstance(delta, ProjectionDelta)
            delta.assign(new.to(weight) - weight, torch.zeros_like(delta.bias))


def run_variant(variant: Variant, budget: Budget) -> tuple[dict[str, Gap], int, float]:
    """Held-out gaps by stage, the number of learned parameters, and the seconds it took."""
    model = resolve_model(budget.pipeline)
    adapter = linearize(model, replace(budget.config, **variant.config))
    try:
        if variant.fresh:
            refresh(adapter, budget.settings.seed)
        diffusion, settings = Diffusion(budget.pipeline.scheduler), replace(budget.settings, **variant.settings)
        progress = Distiller(Accelerator(), adapter, diffusion, *budget.data, settings).run()
        size = sum(parameter.numel() for parameter in adapter.parameters())
        return progress.gaps, size, sum(progress.seconds.values())
    finally:
        restore(model)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The share of the raw focused swap's gap closed after each stage."""
    stages, rows = ("raw", *STAGES), []
    for row in results:
        cells = [f"{row['gap_closed'][s]:.1%}" if s in row["gap_closed"] else "-" for s in stages]
        rows.append([row["variant"], *cells, f"{row['parameters']:,}"])
    return markdown(["variant", *stages, "parameters"], rows)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of the gap closed at the end of each variant."""
    from matplotlib.figure import Figure

    names = [row["variant"] for row in results][::-1]
    closed = [100 * list(row["gap_closed"].values())[-1] for row in results][::-1]
    figure = Figure(figsize=(8, 0.4 * len(names) + 1.2), layout="tight")
    axes = figure.add_subplot()
    axes.barh(names, closed, color=["#3569b7" if name.endswith("recipe)") else "#9db7dd" for name in names])
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("denoising-loss gap of the raw swap closed, %")
    axes.set_xlim(min(0.0, *closed) - 2, max(100.0, *closed) + 4)
    figure.savefig(path, dpi=120)


def add_budget_arguments(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """What `prepare` reads: the data, and how long every variant learns from it."""
    parser.add_argument("--train_data_dir", type=Path, default=None, help="captioned images; default: drawn scenes")
    parser.add_argument("--num_scenes", type=int, default=2000, help="scenes drawn without --train_data_dir")
    parser.add_argument("--cache_dir", type=Path, default=None, help="of latents; default: a temporary folder")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--transfer_steps", type=int, default=100)
    parser.add_argument("--max_train_steps", type=int, default=100, help="of finetune")
    parser.add_argument("--evaluation_batches", type=int, default=32, help="of held-out noise draws per measurement")
    parser.add_argument("--transfer_learning_rate", type=float, default=3e-3)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of finetune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    parser.set_defaults(**defaults)


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", default="scenes", help="folder, Hub id, scenes or scenes-sd3"
    )
    parser.add_argument("--include", nargs="*", default=None, help="patterns of the attention layers to convert")
    parser.add_argument("--min_tokens", type=int, default=0)
    parser.add_argument("--variants", nargs="*", default=None, help="substrings of variant names; default: all")
    parser.add_argument("--plot", type=Path, default=None)
    add_budget_arguments(parser)
    return parser.parse_args(arguments)


def prepare(args: argparse.Namespace, temporary: Path) -> Budget:
    """Pipeline, settings and cached data; what can be wrong with the data's folder is found before anything loads.

    Raises:
        OSError, ValueError, InputError: the data, the pipeline, or a setting.
    """
    examples = None if args.train_data_dir is None else image_folder(args.train_data_dir)
    settings = DistillSettings(
        seed=args.seed,
        train_batch_size=args.train_batch_size,
        rank=None,
        evaluation_batches=args.evaluation_batches,
        transfer=StageSettings(args.transfer_steps, args.transfer_learning_rate, "cosine", 10),
        finetune=StageSettings(args.max_train_steps, args.learning_rate, "cosine", 10),
    )
    config = AdapterConfig(min_tokens=args.min_tokens, include=None if args.include is None else tuple(args.include))
    device = Accelerator().device
    pipeline = load_pipeline(args.pretrained_model_name_or_path, dtype="float32", device=device, offline=False)
    model = resolve_model(pipeline)
    model.requires_grad_(False)
    check_sizes([(args.resolution, args.resolution)], pixels_per_token_step(pipeline, model))
    if examples is None:
        captions = sample_captions(args.num_scenes, args.seed + 2, held_out=False)
        render_folder(captions, temporary / "scenes", args.resolution, args.seed + 2)
        examples = image_folder(temporary / "scenes")
    caching = CacheSettings(((args.resolution, args.resolution),), batch_size=32)
    cache = build_cache(pipeline, model, examples, args.cache_dir or temporary / "cache", caching)
    return Budget(pipeline, config, settings, cache.split(max(1, min(256, len(cache) // 10))))


def reporting(run: Callable[[argparse.Namespace, Path], None], args: argparse.Namespace) -> int:
    """Runs with a temporary folder; 0 done, 2 wrong input, told in one line."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            run(args, Path(temporary))
        except (OSError, ValueError, InputError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    return 0


def record(module: str, arguments: Sequence[str] | None) -> dict[str, Any]:
    """How a result was made."""
    command = " ".join([f"python -m eval.experiments.{module}", *(sys.argv[1:] if arguments is None else arguments)])
    return {"command": command, "environment": environment(Accelerator().device)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ablation; 0 done, 2 wrong input."""
    args = parse_args(arguments)
    chosen = [v for v in VARIANTS if args.variants is None or any(part in v.name for part in args.variants)]

    def run(args: argparse.Namespace, temporary: Path) -> None:
        if not chosen:
            raise InputError(f"--variants matches none of: {'; '.join(v.name for v in VARIANTS)}")
        budget, results = prepare(args, temporary), []
        raw: Gap | None = None
        for variant in chosen:
            gaps, size, seconds = run_variant(variant, budget)
            raw = raw or gaps["raw"]
            results.append(
                {
                    "variant": variant.name,
                    "gap_closed": {stage: gap.closed(raw) for stage, gap in gaps.items()},
                    "loss": {stage: gap.student for stage, gap in gaps.items()},
                    "distance_to_teacher": {stage: gap.distance for stage, gap in gaps.items()},
                    "teacher_loss": gaps["raw"].teacher,
                    "parameters": size,
                    "seconds": round(seconds, 1),
                }
            )
            print(table(results[-1:]).splitlines()[-1], flush=True)
        print("\n" + table(results))
        if args.json is not None:
            write_json(args.json, record("ablation", arguments) | {"results": results})
        if args.plot is not None:
            plot(results, args.plot)

    return reporting(run, args)


if __name__ == "__main__":
    sys.exit(main())
