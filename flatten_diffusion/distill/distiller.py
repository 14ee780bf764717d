"""The three stages in order, on one process or many: steps, checkpoints, resuming, and what each stage gained."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import KW_ONLY, MISSING, asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.accelerator import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm

from ..adapter import Adapter, AdapterConfig
from ..files import parse_json, write_text
from ..mixers import PROJECTIONS
from .batches import NoisyBatch, NoisyBatches
from .bounds import check_numbers, number
from .cache import LatentCache
from .calibrate import CalibrationSettings, calibrate
from .capture import FeatureTap
from .checkpoint import Checkpoint, load_latest, save_checkpoint
from .diffusion import Diffusion
from .identity import component_digest
from .objective import Gap, LossWeights, Objective, measure_gap
from .transfer import transfer_step

logger = logging.get_logger(__name__)

STAGES = ("calibrate", "transfer", "finetune")


@dataclass(frozen=True)
class StageSettings:
    """One gradient stage: optimizer steps, peak learning rate, schedule (a name of diffusers' `get_scheduler`).

    Raises:
        ValueError: a number out of range, or a schedule that does not exist or needs more than these numbers.
    """

    steps: int = number(MISSING, 0, 10**9)
    learning_rate: float = number(MISSING, 1e-12, 10.0)
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = number(0, 0, 10**9)

    def __post_init__(self) -> None:
        check_numbers(self)
        self.schedule()

    def schedule(self) -> Callable[[int], float]:
        """Step -> factor of the learning rate."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        steps = {"num_warmup_steps": self.lr_warmup_steps, "num_training_steps": self.steps}
        try:
            return get_scheduler(self.lr_scheduler, optimizer, **steps).lr_lambdas[0]
        except (ValueError, AttributeError) as error:
            known = ", ".join(kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT)
            raise ValueError(f"lr_scheduler {self.lr_scheduler!r} cannot be used: choose one of {known}.") from error


@dataclass(frozen=True)
class DistillSettings:
    """Everything that decides the result, and thus must not change when a run is resumed.

    Attributes:
        stages: which of `STAGES`, in their order.
        train_batch_size: samples per process and pass; gradient_accumulation_steps passes make an optimizer step.
        caption_dropout: share of captions left empty, as in the teacher's own training, so that the unconditional
            branch of guidance is distilled too.
        projections: which of a layer's projections learn an addition in the gradient stages; rank: of its LoRA
            factors, None for full matrices.
        calibration_batches, evaluation_batches: of `train_batch_size` per process.
        ema_decay: of the averaged weights that `finetune` ends with; None for no average.
        patience: steps in a row whose loss is not finite before the run stops.
    """

    stages: tuple[str, ...] = STAGES
    seed: int = number(0, 0, 2**32 - 1)
    train_batch_size: int = number(16, 1, 2**16)
    gradient_accumulation_steps: int = number(1, 1, 2**16)
    caption_dropout: float = number(0.1, 0.0, 1.0)
    max_grad_norm: float = number(1.0, 1e-9, 1e9)
    adam_weight_decay: float = number(0.0, 0.0, 1.0)
    projections: tuple[str, ...] = PROJECTIONS
    rank: int | None = number(16, 1, 2**12)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    calibration_batches: int = number(12, 1, 2**16)
    evaluation_batches: int = number(8, 1, 2**16)
    transfer: StageSettings = StageSettings(300, 3e-3)
    finetune: StageSettings = StageSettings(1000, 3e-4)
    weights: LossWeights = field(default_factory=LossWeights)
    ema_decay: float | None = number(0.99, 0.0, 0.999999)
    patience: int = number(5, 1, 2**16)

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise ValueError(f"Unknown stage {', '.join(unknown) or 'list'}: choose out of {', '.join(STAGES)}.")
        object.__setattr__(self, "stages", tuple(stage for stage in STAGES if stage in self.stages))
        object.__setattr__(self, "projections", tuple(self.projections))
        if not set(self.projections) <= set(PROJECTIONS):
            raise ValueError(f"projections are {', '.join(self.projections)}: choose out of {', '.join(PROJECTIONS)}.")
        check_numbers(self)


@dataclass
class Progress:
    """Where a run stands: the running stage, its finished steps, what finished stages reached, and what went wrong."""

    stage: str = ""
    step: int = 0
    total_steps: int = 0
    finished: list[str] = field(default_factory=list)
    gaps: dict[str, Gap] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: int = 0

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.stage} step {self.step}"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """The inverse of dataclasses' `asdict`."""
        return cls(**{**values, "gaps": {name: Gap(**gap) for name, gap in values["gaps"].items()}})


@dataclass(eq=False, repr=False)
class Distiller:
    """Brings a freshly converted model back to the quality of its original.

    Args:
        accelerator: Accelerate's; its mixed precision and processes are used.
        adapter: of the model, just made by `linearize`; base parameters must not require gradients.
        diffusion: the teacher's forward process.
        train, held_out: cached examples; the gap is measured on the second.
        settings: see `DistillSettings`.
        output_dir: for checkpoints and history.jsonl; None writes nothing.
        checkpointing_steps: optimizer steps between checkpoints; checkpoints_total_limit: how many are kept.
        on_step: called after each optimizer step with (distiller, losses), for logging and validation.
    """

    accelerator: Accelerator
    adapter: Adapter
    diffusion: Diffusion
    train: LatentCache
    held_out: LatentCache
    settings: DistillSettings
    _: KW_ONLY
    output_dir: Path | None = None
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = 3
    dataloader_num_workers: int = 0
    on_step: Callable[[Distiller, dict[str, float]], None] | None = None

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.objective = Objective(self.adapter, self.adapter.model, self.diffusion, self.settings.weights)
        self.optimizer: Any = None
        self.ema: EMAModel | None = None
        self._sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self._evaluation: list[NoisyBatch] | None = None
        self._bad_in_a_row = 0
        # Now, while its weights are whole on each process.
        self._teacher = ""
        if self.output_dir is not None:
            self._teacher = component_digest(self.adapter.model, list(self.adapter.parameters()))

    # ---- the whole run ----

    def run(self, resume: bool = False) -> Progress:
        """All stages of the settings. With `resume`, from the newest readable checkpoint in `output_dir`, if any.

        Raises:
            ValueError: that checkpoint was made with other settings, another model or other data.
            FloatingPointError: losses, the adapter or what it gives are not finite; checkpoints are from before that.
        """
        checkpoint = self.load_checkpoint() if resume else None
        self._cut_history()
        self._float_parameters()
        if "raw" not in self.progress.gaps:
            self.progress.gaps["raw"] = self.evaluate()
            if not math.isfinite(self.progress.gaps["raw"].teacher):
                raise FloatingPointError("The teacher's own loss is not finite: train in bfloat16 or float32.")
        for stage in self.settings.stages:
            if stage in self.progress.finished:
                continue
            if self.progress.stage != stage:
                self.progress.stage, self.progress.step = stage, 0
            started = time.monotonic()
            if stage == "calibrate":
                self._calibrate()
            else:
                same = checkpoint is not None and checkpoint.state["progress"]["stage"] == stage
                self._train(stage, checkpoint if same else None)
            checkpoint = None
            self.progress.seconds[stage] = self.progress.seconds.get(stage, 0.0) + time.monotonic() - started
            self.progress.finished.append(stage)
            self.progress.gaps[stage] = gap = self.evaluate()
            if not math.isfinite(gap.student):
                raise FloatingPointError(f"{stage} ended with a held-out loss that is not finite: {_REMEDY}.")
            self._save()
        return self.progress

    def load_checkpoint(self) -> Checkpoint | None:
        """Adapter and progress become those of the newest readable checkpoint in `output_dir`, if any, which is
        returned. Raises ValueError when it was made with other settings, another model or other data."""
        checkpoint = None if self.output_dir is None else load_latest(self.output_dir)
        if checkpoint is not None:
            self._restore_progress(checkpoint)
        return checkpoint

    def evaluate(self) -> Gap:
        """Teacher against student on the held-out examples, always the same noise; all processes together."""
        with self.accelerator.autocast():
            return measure_gap(self.objective, self._evaluation_batches(), self._sum)

    def _evaluation_batches(self) -> list[NoisyBatch]:
        if self._evaluation is None:
            count = range(self.settings.evaluation_batches)
            self._evaluation = list(self._batches(self.held_out, count, "evaluate"))
        return self._evaluation

    # ---- stages ----

    def _calibrate(self) -> None:
        self._add_deltas(("out",))
        batches = self._batches(self.train, range(self.settings.calibration_batches), "calibrate")
        runs = [partial(self._run, batch) for batch in batches]
        judges = [partial(self._run, batch) for batch in self._evaluation_batches()[:2]]
        for fit in calibrate(self.adapter, runs, self.settings.calibration, self._sum, judges):
            logger.info(f"{fit.name}: {fit.choice}; missing {fit.before:.1%} -> {fit.after:.1%}")

    def _train(self, stage: str, checkpoint: Checkpoint | None) -> None:
        plan: StageSettings = getattr(self.settings, stage)
        self._add_deltas(self.settings.projections)
        self._prepare(stage, plan)
        if checkpoint is not None:
            self._restore_optimizer(checkpoint)
        accumulation = self.settings.gradient_accumulation_steps
        passes = range(self.progress.step * accumulation, plan.steps * accumulation)
        batches = iter(self._batches(self.train, passes, stage))
        factor = plan.schedule()
        compute = self._transfer_losses if stage == "transfer" else self._finetune_losses
        bar = tqdm(
            total=plan.steps, initial=self.progress.step, desc=stage, disable=not self.accelerator.is_local_main_process
        )
        while self.progress.step < plan.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = plan.learning_rate * factor(self.progress.step)
            losses = self._optimizer_step(compute, [next(batches) for _ in range(accumulation)])
            self.progress.step += 1
            self.progress.total_steps += 1
            bar.update(1)
            bar.set_postfix(loss=f"{losses['loss']:.4f}")
            self._record(losses)
            if self.progress.total_steps % self.checkpointing_steps == 0:
                self._save()
        bar.close()
        if self.ema is not None:
            self.ema.copy_to(self.adapter.parameters())
        self.optimizer, self.ema = None, None

    def _optimizer_step(
        self, compute: Callable[[NoisyBatch], dict[str, torch.Tensor]], batches: list[NoisyBatch]
    ) -> dict[str, float]:
        """One update from these passes; none when a loss or gradient is not finite in any process."""
        self.optimizer.zero_grad()
        sums: dict[str, torch.Tensor] = {}
        for batch in batches:
            accumulation = self.accelerator.accumulate(self.objective.network) if self._sharded else nullcontext()
            with accumulation, self.accelerator.autocast():
                losses = compute(batch)
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.double() / len(batches)
        names = sorted(sums)
        values = self._sum(torch.stack([sums[name].cpu() for name in names])) / self.accelerator.num_processes
        finite = bool(values.isfinite().all())
        finite = finite and self._apply_gradients()
        if finite and self.ema is not None:
            self.ema.step(self.adapter.parameters())
        self._count_bad(not finite, batches[-1])
        return dict(zip(names, values.tolist(), strict=True))

    def _apply_gradients(self) -> bool:
        """Average over processes, clip, and step; False when the gradient is not finite and nothing was done."""
        parameters, scaler = list(self.adapter.parameters()), self.accelerator.scaler
        if self._sharded:
            self.accelerator.clip_grad_norm_(parameters, self.settings.max_grad_norm)
            self.optimizer.step()
            return True
        self._average_gradients()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(parameters, self.settings.max_grad_norm)
        if scaler is not None:  # skips an overflowing step itself, and lowers its scale until none overflows
            scaler.step(self.optimizer)
            scaler.update()
            return bool(scaler.get_scale() > 1e-6)
        if not norm.isfinite():
            return False
        self.optimizer.step()
        return True

    def _transfer_losses(self, batch: NoisyBatch) -> dict[str, torch.Tensor]:
        losses = transfer_step(self.adapter, lambda: self._run(batch), self.accelerator.backward)
        if not losses:
            raise ValueError("No layer of this model runs linear at this size: lower min_tokens or train larger.")
        return {"loss": torch.stack(list(losses.values())).mean()}

    def _finetune_losses(self, batch: NoisyBatch) -> dict[str, torch.Tensor]:
        loss, parts = self.objective.loss(batch)
        self.accelerator.backward(loss)
        return {"loss": loss.detach(), **parts}

    def _run(self, batch: NoisyBatch) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.objective.predict(batch.noisy, batch.timesteps, batch.conditioning)

    # ---- parts ----

    def _add_deltas(self, names: tuple[str, ...]) -> None:
        self.adapter.add_deltas(names, self.settings.rank)
        self._float_parameters()

    def _float_parameters(self) -> None:
        """float32 whatever the model's dtype: half-precision parameters would lose small updates."""
        for parameter in self.adapter.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    def _prepare(self, stage: str, plan: StageSettings) -> None:
        parameters = list(self.adapter.requires_grad_(True).parameters())
        optimizer = torch.optim.AdamW(
            parameters, lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=self.settings.adam_weight_decay
        )
        self.accelerator.gradient_accumulation_steps = self.settings.gradient_accumulation_steps  # backward() divides
        if self._sharded:
            if stage == "transfer":
                raise ValueError("Transfer needs whole layers in each process: run it without FSDP or DeepSpeed first.")
            self.objective.network, self.optimizer = self.accelerator.prepare(self.adapter.model, optimizer)
        else:
            self.optimizer = optimizer  # no wrapper: an adapter's gradients are a few MB, averaged in one go
        decay = self.settings.ema_decay if stage == "finetune" else None
        # After n steps it decays by min(decay, (1 + n) / (10 + n)).
        self.ema = None if decay is None else EMAModel(self.adapter.parameters(), decay, update_after_step=-1)

    def _average_gradients(self) -> None:
        if self._sharded or self.accelerator.num_processes == 1:
            return
        parameters = list(self.adapter.parameters())
        for parameter in parameters:
            if parameter.grad is None:  # a layer that stayed softmax in this pass
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self.accelerator.reduce(parameters_to_vector(gradients), reduction="mean")
        vector_to_parameters(flat, gradients)

    def _count_bad(self, bad: bool, batch: NoisyBatch) -> None:
        self._bad_in_a_row = self._bad_in_a_row + 1 if bad else 0
        if not bad:
            return
        self.progress.skipped += 1
        logger.warning(f"{self.progress.where}: the loss or a gradient is not finite; the step is skipped.")
        if self._bad_in_a_row >= self.settings.patience:
            count = f"{self.progress.where}: {self._bad_in_a_row} steps in a row"
            raise FloatingPointError(f"{count} without a finite loss: {self._diagnose(batch)}.")

    def _diagnose(self, batch: NoisyBatch) -> str:
        """The first thing that is not finite, and what to do about it."""
        for name, parameter in self.adapter.named_parameters():
            if not parameter.isfinite().all():
                return f"{name} is not finite; lower the learning rate and resume from an earlier checkpoint"
        if not batch.noisy.isfinite().all():
            return "the latents are not finite; delete the cache and check the images"
        with torch.no_grad(), self.accelerator.autocast():
            if not self.objective.teacher(batch).isfinite().all():
                return "the teacher's own prediction is not finite; train in bfloat16 or float32"
            with FeatureTap(self.adapter) as tap:
                self.objective.student(batch)
        for name, output in tap.outputs.items():
            if not output.isfinite().all():
                return f"{name} is the first layer with an output not finite; {_REMEDY}"
        return "every output is finite, a gradient is not; lower the learning rate or max_grad_norm"

    def _batches(self, cache: LatentCache, steps: range, stage: str) -> NoisyBatches:
        return NoisyBatches(
            cache,
            self.diffusion,
            self.settings.train_batch_size,
            steps,
            seed=self.settings.seed,
            stage=stage,
            caption_dropout=self.settings.caption_dropout,
            device=self.accelerator.device,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_workers=self.dataloader_num_workers,
        )

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        total: torch.Tensor = self.accelerator.reduce(tensor.to(self.accelerator.device), reduction="sum")
        return total.to(tensor.device)

    # ---- records and checkpoints ----

    def _record(self, losses: dict[str, float]) -> None:
        """One line of history.jsonl, then `on_step`."""
        if self.output_dir is not None and self.accelerator.is_main_process:
            row = {"stage": self.progress.stage, "step": self.progress.step, "total": self.progress.total_steps}
            finite = {name: value if math.isfinite(value) else None for name, value in losses.items()}
            with (self.output_dir / _HISTORY).open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, **finite}) + "\n")
        if self.on_step is not None:
            self.on_step(self, losses)

    def _save(self) -> None:
        """A checkpoint, unless the adapter is not finite, which is an error."""
        tensors = {f"adapter/{name}": _whole(tensor) for name, tensor in self.adapter.named_parameters()}
        bad = [name.removeprefix("adapter/") for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if bad:
            raise FloatingPointError(f"{self.progress.where}: {bad[0]} is not finite: {_REMEDY}.")
        if self.output_dir is None:
            return
        tensors.update({name: _whole(tensor) for name, tensor in self._running().items()})
        scaler = self.accelerator.scaler
        state = {
            "progress": asdict(self.progress),
            "settings": self._fingerprint(),
            "adapter_config": self.adapter.config.to_dict(),
            "ema_steps": 0 if self.ema is None else self.ema.optimization_step,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        if self.accelerator.is_main_process:  # finished stages count as a step, so that each state has its own number
            number = self.progress.total_steps + len(self.progress.finished)
            save_checkpoint(self.output_dir, number, tensors, state, self.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def _running(self) -> dict[str, torch.Tensor]:
        """What a stage under way has beside the adapter: the optimizer's state and the average."""
        tensors, named = {}, list(self.adapter.named_parameters())
        if self.optimizer is not None and self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            state = getattr(self.optimizer, "optimizer", self.optimizer).state
            for name, parameter in named:
                tensors.update({f"optimizer/{name}/{key}": value for key, value in state.get(parameter, {}).items()})
        averages = [] if self.ema is None else self.ema.shadow_params
        return {**tensors, **{f"ema/{name}": average for (name, _), average in zip(named, averages, strict=False)}}

    def _restore_progress(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.state["settings"]
        changed = sorted(key for key, value in self._fingerprint().items() if saved.get(key) != value)
        if changed:
            raise ValueError(
                f"The checkpoint in {self.output_dir} was made with another {', '.join(changed)}: "
                "use the same settings, or another output folder."
            )
        self.progress = Progress.from_json(checkpoint.state["progress"])
        self.adapter.reconfigure(AdapterConfig.from_dict(checkpoint.state["adapter_config"]))
        self._float_parameters()
        with torch.no_grad():
            for name, parameter in self.adapter.named_parameters():
                parameter.copy_(checkpoint.tensors[f"adapter/{name}"])

    def _restore_optimizer(self, checkpoint: Checkpoint) -> None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            logger.warning("DeepSpeed keeps its optimizer state to itself: resuming with a fresh one.")
        else:
            for name, parameter in self.adapter.named_parameters():
                prefix = f"optimizer/{name}/"
                state = {key[len(prefix) :]: t for key, t in checkpoint.tensors.items() if key.startswith(prefix)}
                if state:
                    getattr(self.optimizer, "optimizer", self.optimizer).state[parameter] = {
                        key: _like(tensor, parameter) if tensor.dim() else tensor for key, tensor in state.items()
                    }
        if self.ema is not None:
            self.ema.optimization_step = checkpoint.state["ema_steps"]
            for (name, _), average in zip(self.adapter.named_parameters(), self.ema.shadow_params, strict=True):
                average.copy_(_like(checkpoint.tensors[f"ema/{name}"], average))
        if self.accelerator.scaler is not None and checkpoint.state["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])

    def _cut_history(self) -> None:
        """Lines of steps that the checkpoint does not know will be written again."""
        path = None if self.output_dir is None else self.output_dir / _HISTORY
        if path is None or not path.is_file() or not self.accelerator.is_main_process:
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                if parse_json(line, path.name)["total"] <= self.progress.total_steps:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):  # cut off by a kill, or no line of ours
                continue
        write_text(path, "".join(kept))

    def _fingerprint(self) -> dict[str, Any]:
        settings = json.loads(json.dumps(asdict(self.settings)))
        del settings["stages"]  # more may be added to a run that is done
        config = self.adapter.config.to_dict()
        return {
            **settings,
            "conversion": {name: config[name] for name in ("mixer", "window", "min_tokens")},
            "layers": self.adapter.layers,
            "teacher": self._teacher,
            "scheduler": self.diffusion.identity(),
            "examples (content, size or drawing)": [len(self.train), len(self.held_out), self.train.identity],
            "total batch size": self.settings.train_batch_size * self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
        }


_HISTORY = "history.jsonl"
_REMEDY = "lower the learning rate, or train in bfloat16 or float32"


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered; others as they are."""
    gather = getattr(tensor, "full_tensor", None)
    whole: torch.Tensor = tensor if gather is None else gather()
    return whole.detach()


def _like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """On the device of `model`, sharded where that is."""
    mesh = getattr(model, "device_mesh", None)
    if mesh is None:
        return tensor.to(model.device)
    from torch.distributed.tensor import distribute_tensor

    placements: Any = getattr(model, "placements", None)
    return distribute_tensor(tensor.to(model.device), mesh, placements)
