"""Rotary embeddings and the focused map, measured both ways on a trained model: which of the two loses less.

    python -m eval.experiments.rope --json eval/results/rope.json

As handed over: phi(R q) and phi(R k), the map behind the rotation R, as any processor hands query and key to its
product. Features before rotation: R phi(q) and R phi(k) in the numerator, phi(q) and phi(k) in the denominator.

No embedded pipeline has rotary embeddings, so a model is made first: a FluxTransformer2DModel with the weights of the
embedded scenes-sd3 and rotary embeddings instead of its table of positions, trained on until it denoises about as well.
Then all its layers are converted in both ways, with the same budget and batches. Prints two tables, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.accelerator import Accelerator
from diffusers import FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from flatten_diffusion import AdapterConfig, linearize, restore
from flatten_diffusion.adapter import Adapter
from flatten_diffusion.distill import (
    Diffusion,
    Distiller,
    DistillSettings,
    Gap,
    LatentCache,
    LossWeights,
    NoisyBatch,
    NoisyBatches,
)
from flatten_diffusion.distill.capture import LayerCapture, capture_teacher
from flatten_diffusion.distill.conditioning import LAST_TOKEN_COUNTS, predict
from flatten_diffusion.distill.objective import relative_error
from flatten_diffusion.mixers import (
    Context,
    FocusedLinearAttention,
    FocusedLinearConfig,
    LayerShape,
    Mixed,
    describe_grid,
    images_of,
    register_mixer,
)
from flatten_diffusion.mixers.parts.convolution import convolve
from flatten_diffusion.ops import focused_feature_map
from flatten_diffusion.ops.focused_linear.reference import NORMALIZER_EPS
from flatten_eval.errors import InputError
from flatten_eval.files import write_json

from .ablation import add_budget_arguments, markdown, prepare, record, reporting

FEATURES_FIRST = "rope_features_first"
"""Name of the mixer `FeaturesBeforeRotation`."""
WAYS = {"as handed over": "focused_linear", "features before rotation": FEATURES_FIRST}
"""Name of a way -> its mixer."""
_STAGES = ("raw", "transfer", "finetune")
_THETA = 10000.0
_WARMUP = 50


def axes_of(head_dim: int) -> tuple[int, int, int]:
    """Channels that turn with a token's image (always 0 here), row and column, as models of this module have them.

    Raises:
        ValueError: `head_dim` is not a multiple of 6 (three axes of pairs).
    """
    if head_dim % 6:
        raise ValueError(f"head_dim is {head_dim}: three equal axes of channel pairs need a multiple of 6.")
    return head_dim // 3, head_dim // 3, head_dim // 3


def angles(height: int, width: int, head_dim: int) -> torch.Tensor:
    """[height * width, head_dim / 2] in float64: by how much each channel pair of each token is turned.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, eq. 14-15, an axis each.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    parts = []
    for channels, position in zip(axes_of(head_dim), (torch.zeros_like(rows), rows, columns), strict=True):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64) / channels
        parts.append(position.reshape(-1, 1) * _THETA**-exponent)
    return torch.cat(parts, dim=-1)


def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Turn neighbouring channels of x [B, N, H, D] by `angle` [N, D / 2]; minus `angle` undoes it."""
    cos, sin = (part[:, None].to(x.device, x.dtype) for part in (angle.cos(), angle.sin()))
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2)


@dataclass(frozen=True)
class FeaturesFirstConfig(FocusedLinearConfig):
    """Settings of `FeaturesBeforeRotation`."""


@register_mixer(FEATURES_FIRST)
class FeaturesBeforeRotation(FocusedLinearAttention):
    """Focused linear attention whose features are made before the rotation and turned after it:

        out_i = sum_j (R_i phi(q_i)) . (R_j phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j)

    It is given turned queries and keys like every mixer, and turns them back by the grid. Parameters as its base.
    Source: Su et al., "RoFormer", 2021, section 3.3, eq. 19.
    """

    Config = FeaturesFirstConfig
    supports = frozenset({"mask", "text", "window"})

    def __init__(self, config: FeaturesFirstConfig, layer: LayerShape) -> None:
        axes_of(layer.head_dim)
        super().__init__(config, layer)
        self.needs = frozenset({"grid"})

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: Context) -> Mixed:
        """See `Mixer.forward`; one image of one frame. Raises ValueError for another grid."""
        grid, key_mask = context.grid, context.key_mask
        pictures = [] if grid is None else images_of(grid)
        if grid is None or len(pictures) != 1 or pictures[0][0] != 1:
            shown = "none" if grid is None else describe_grid(grid)
            raise ValueError(f"The grid is {shown}: this mixer knows the positions of one whole image only.")
        angle = angles(*pictures[0][1:], self.layer.head_dim)
        dtype = torch.promote_types(query.dtype, torch.float32)
        # As the operator of the base: everything but the projections is computed in float32.
        with torch.autocast(query.device.type, enabled=False):
            query, key, values = query.to(dtype), key.to(dtype), value.to(dtype)
            if key_mask is not None:
                key, values = (x.masked_fill(~key_mask[:, :, None, None], 0.0) for x in (key, values))
            query, key = self.map_features(rotate(query, -angle), rotate(key, -angle))
            query, key = (focused_feature_map(x, self.config.focusing_factor, self.scale) for x in (query, key))
            count = torch.full((len(key), 1, 1, 1), key.shape[1], dtype=dtype, device=key.device)
            if key_mask is not None:
                key = key * key_mask[:, :, None, None]
                count = key_mask.sum(dim=1).clamp(min=1).to(dtype)[:, None, None, None]
            normalizer = torch.einsum("bnhd,bhd->bnh", query, (key / count).sum(dim=1)) + NORMALIZER_EPS
            shares = rotate(query, angle) / normalizer[..., None]
            state = torch.einsum("bmhd,bmhe->bhde", rotate(key, angle) / count, values)
            output = torch.einsum("bnhd,bhde->bnhe", shares, state)
            if self.conv_weight is not None:
                output = output + convolve(values, self.conv_weight, self.conv_bias, grid, key_mask)
        return Mixed(output.to(value.dtype))


# ---- a model with rotary embeddings ----


class PatchedCache(LatentCache):
    """The same examples as a packed model takes them: latents [C / 4, 2 h, 2 w], whose 2 x 2 patches are the tokens.

    The text goes without the zero tokens that stand for T5 (all but one of them).
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for conditioning in self.null.values():
            conditioning.pop(LAST_TOKEN_COUNTS, None)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index)
        item.pop(LAST_TOKEN_COUNTS, None)
        return {**item, "latents": F.pixel_shuffle(item["latents"], 2)}


def patched(data: tuple[LatentCache, LatentCache]) -> tuple[LatentCache, LatentCache]:
    """The same two parts of a cache as `PatchedCache`."""
    return PatchedCache(data[0].folder).split(len(data[1]))


def build_rotary_model(source: Any, seed: int = 0) -> FluxTransformer2DModel:
    """A Flux transformer of joint blocks with the shape and the weights of an SD3 one, but for its positions.

    Args:
        source: SD3Transformer2DModel of patch size 1 with normalised queries and keys.
        seed: of what `source` has not: the text's way out of the last block, which nobody reads.
    """
    config = source.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.num_layers,
            num_single_layers=0,
            attention_head_dim=config.attention_head_dim,
            num_attention_heads=config.num_attention_heads,
            joint_attention_dim=config.joint_attention_dim,
            pooled_projection_dim=config.pooled_projection_dim,
            guidance_embeds=False,
            axes_dims_rope=axes_of(config.attention_head_dim),
        )
    given = dict(source.state_dict())
    weights = {
        "x_embedder.weight": given.pop("pos_embed.proj.weight").flatten(1),
        "x_embedder.bias": given.pop("pos_embed.proj.bias"),
    }
    given.pop("pos_embed.pos_embed")
    last = f"transformer_blocks.{config.num_layers - 1}.norm1_context.linear."
    for name in ("weight", "bias"):
        # The last SD3 block only scales and shifts its text; Flux also has gates and an MLP there: none.
        scale, shift = given.pop(last + name).chunk(2)
        weights[last + name] = torch.cat([shift, scale, *[torch.zeros_like(scale)] * 4])
    missing, unexpected = model.load_state_dict({**given, **weights}, strict=False)
    block = f"transformer_blocks.{config.num_layers - 1}."
    lost = [name for name in missing if not name.startswith((f"{block}attn.to_add_out.", f"{block}ff_context."))]
    if lost or unexpected:
        raise ValueError(f"{type(source).__name__} does not fit: {', '.join([*lost, *unexpected][:4])}.")
    return model


def denoising_loss(model: Any, batches: Sequence[NoisyBatch]) -> float:
    """Mean squared error to what the model is trained to predict."""
    errors = []
    with torch.no_grad():
        for batch in batches:
            answer = predict(model, model, batch.noisy, batch.timesteps, batch.conditioning).float()
            errors.append((answer - batch.target).square().mean().item())
    return sum(errors) / len(errors)


def train(
    model: Any, batches: NoisyBatches, learning_rate: float, *, bf16: bool = False, minutes: float | None = None
) -> list[float]:
    """Train all of `model`, a step per batch; it ends as the running average of its weights.

    Args:
        bf16: products in bfloat16 (autocast); weights stay float32.
        minutes: after which it ends with fewer steps, the learning rate come down by then all the same.

    Returns:
        The loss of each step.
    """
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = EMAModel(parameters.values(), decay=0.99, update_after_step=-1)
    losses: list[float] = []
    started, done = time.monotonic(), 0.0
    bar = tqdm(batches, total=len(batches), desc="train", mininterval=10)
    for step, batch in enumerate(bar):
        spent = 0.0 if minutes is None else (time.monotonic() - started) / 60 / minutes
        done = max(done, step / len(batches), spent)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        with torch.autocast(batch.noisy.device.type, torch.bfloat16, enabled=bf16):
            answer = predict(model, model, batch.noisy, batch.timesteps, batch.conditioning)
        loss = (answer.float() - batch.target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        average.step(parameters.values())
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}")
    average.copy_to(parameters.values())
    return losses


def trained_model(
    args: argparse.Namespace, pipeline: Any, data: tuple[LatentCache, LatentCache], accelerator: Accelerator
) -> tuple[Any, dict[str, Any]]:
    """The model with rotary embeddings, from --model_dir or trained now, and how it was trained.

    Raises:
        OSError, ValueError: --model_dir holds something else.
    """
    folder: Path | None = args.model_dir
    if folder is not None and (folder / "config.json").is_file():
        model = FluxTransformer2DModel.from_pretrained(folder, local_files_only=True).to(accelerator.device)
        return model.requires_grad_(False), json.loads((folder / "training.json").read_text(encoding="utf-8"))
    diffusion, source = Diffusion(pipeline.scheduler), pipeline.transformer
    settings: dict[str, Any] = {"seed": args.seed, "device": accelerator.device}
    held_out, plain = (
        list(NoisyBatches(part, diffusion, args.train_batch_size, range(8), stage="judge", **settings))
        for part in (patched(data)[1], data[1])
    )
    seen: dict[str, Any] = {"scenes-sd3": denoising_loss(source, plain)}
    model = build_rotary_model(source, args.seed).to(accelerator.device)
    seen["copied"] = denoising_loss(model, held_out)
    print(f"held-out loss: scenes-sd3 {seen['scenes-sd3']:.4f}, copied {seen['copied']:.4f}", flush=True)
    started = time.monotonic()
    batches = NoisyBatches(
        patched(data)[0], diffusion, args.train_batch_size, range(args.train_steps), stage="rope",
        caption_dropout=0.1, **settings,
    )  # fmt: skip
    bf16 = args.train_precision == "bf16"
    losses = train(model, batches, args.train_learning_rate, bf16=bf16, minutes=args.train_minutes)
    seen["trained"] = denoising_loss(model, held_out)
    parts = [losses[start : start + 100] for start in range(0, len(losses), 100)]
    seen["train losses"] = [round(sum(part) / len(part), 5) for part in parts]
    seen["steps"], seen["seconds"] = len(losses), round(time.monotonic() - started, 1)
    seen["precision"] = args.train_precision
    print(f"held-out loss: trained {seen['trained']:.4f}", flush=True)
    model.requires_grad_(False)
    if folder is not None:
        model.save_pretrained(folder)
        write_json(folder / "training.json", seen)
    return model, seen


# ---- the two ways ----


def layer_errors(adapter: Adapter, batches: Sequence[NoisyBatch]) -> dict[str, float]:
    """Each layer's squared error at the image's tokens, before the output projection, by the square of the
    teacher's, all layers given the teacher's inputs."""
    errors: dict[str, list[float]] = {}

    def consume(call: LayerCapture) -> None:
        rows = call.student_rows()
        assert rows is not None  # every layer is converted at every size
        errors.setdefault(call.name, []).append(relative_error(rows, call.rows).item())

    model = adapter.model
    with torch.no_grad(), capture_teacher(adapter, consume):
        for batch in batches:
            predict(model, model, batch.noisy, batch.timesteps, batch.conditioning)
    return {name: sum(values) / len(values) for name, values in errors.items()}


def run_way(
    mixer: str,
    model: Any,
    diffusion: Diffusion,
    data: tuple[LatentCache, LatentCache],
    settings: DistillSettings,
    accelerator: Accelerator,
) -> tuple[dict[str, Gap], dict[str, Any]]:
    """Held-out gaps by stage, and what else was seen; the model is as before afterwards."""
    adapter = linearize(model, AdapterConfig(mixer=mixer))
    try:
        held_out = NoisyBatches(
            data[1], diffusion, settings.train_batch_size, range(4), seed=settings.seed, stage="layers",
            device=accelerator.device,
        )  # fmt: skip
        before = layer_errors(adapter, list(held_out))
        progress = Distiller(accelerator, adapter, diffusion, *data, settings).run()
        after = layer_errors(adapter, list(held_out))
        seconds = {stage: round(value, 1) for stage, value in progress.seconds.items()}
        seen = {"layers": before, "layers at the end": after, "seconds": seconds, "skipped steps": progress.skipped}
        return progress.gaps, seen
    finally:
        restore(model)


def compare(
    model: Any,
    diffusion: Diffusion,
    data: tuple[LatentCache, LatentCache],
    settings: DistillSettings,
    accelerator: Accelerator,
) -> list[dict[str, Any]]:
    """A row per way of `WAYS`; the share of the gap closed is of the first one's raw gap in all."""
    rows: list[dict[str, Any]] = []
    reference: Gap | None = None
    for name, mixer in WAYS.items():
        gaps, seen = run_way(mixer, model, diffusion, data, settings, accelerator)
        reference = reference or gaps["raw"]
        rows.append(
            {
                "way": name,
                "mixer": mixer,
                "distance_to_teacher": {stage: gap.distance for stage, gap in gaps.items()},
                "loss_above_teacher": {stage: gap.student - gap.teacher for stage, gap in gaps.items()},
                "gap_closed": {stage: gap.closed(reference) for stage, gap in gaps.items()},
                "teacher_loss": gaps["raw"].teacher,
                **seen,
            }
        )
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The distance to the teacher and, behind it, the loss above the teacher's, after each stage."""
    return markdown(
        ["way", *_STAGES],
        [
            [
                row["way"],
                *(f"{row['distance_to_teacher'][s]:.5f} (+{row['loss_above_teacher'][s]:.5f})" for s in _STAGES),
            ]
            for row in rows
        ],
    )


def layer_table(rows: Sequence[dict[str, Any]]) -> str:
    """Each layer's relative error, raw and at the end of each way."""
    titles = [f"{row['way']}, {moment}" for row in rows for moment in ("raw", "distilled")]
    cells = [
        [name, *(f"{row[moment][name]:.4f}" for row in rows for moment in ("layers", "layers at the end"))]
        for name in rows[0]["layers"]
    ]
    return markdown(["layer", *titles], cells)


# ---- command line ----


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_dir", type=Path, default=None, help="keeps the trained model; one that is there is not trained again"
    )
    parser.add_argument("--train_steps", type=int, default=1200, help="of the model with rotary embeddings")
    parser.add_argument("--train_minutes", type=float, default=None, help="ends it earlier, with fewer steps")
    parser.add_argument("--train_learning_rate", type=float, default=1e-3)
    parser.add_argument("--train_precision", choices=("bf16", "float32"), default="bf16", help="of that training only")
    add_budget_arguments(
        parser, num_scenes=3200, transfer_steps=60, max_train_steps=60, evaluation_batches=8, learning_rate=4e-4,
        pretrained_model_name_or_path="scenes-sd3", include=None, min_tokens=0,
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, then compare; 0 done, 2 wrong input."""

    def run(args: argparse.Namespace, temporary: Path) -> None:
        for name in ("train_steps", "transfer_steps", "max_train_steps"):
            if getattr(args, name) < 1:
                raise InputError(f"--{name} is {getattr(args, name)}: pass at least 1")
        if args.train_minutes is not None and not args.train_minutes > 0:
            raise InputError(f"--train_minutes is {args.train_minutes}: pass a positive number")
        accelerator, budget = Accelerator(), prepare(args, temporary)
        model, training = trained_model(args, budget.pipeline, budget.data, accelerator)
        stages, weights = ("transfer", "finetune"), LossWeights(target=0.0, features=0.0)
        settings = replace(budget.settings, stages=stages, weights=weights)
        rows = compare(model, Diffusion(budget.pipeline.scheduler), patched(budget.data), settings, accelerator)
        print("\n".join(["", table(rows), "", layer_table(rows)]))
        measured = {
            "model": "FluxTransformer2DModel: the weights of scenes-sd3, rotary embeddings instead of its position "
            "table, trained on; every layer linear",
            "training": "mean squared error to the flow-matching target on held-out scenes",
            "distance_to_teacher, loss_above_teacher": "on held-out scenes, the same noise for both",
            "layers": "relative squared error at the image's tokens before the output projection",
            "gap_closed": "of the raw loss gap of the first way",
        }
        if args.json is not None:
            found = {"measured": measured, "training": training, "results": rows}
            write_json(args.json, record("rope", arguments) | found)

    return reporting(run, parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
