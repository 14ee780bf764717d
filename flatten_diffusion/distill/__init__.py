"""Distillation: calibrate (closed form), transfer (per layer), finetune (end to end), and the data they need."""

from .batches import NoisyBatch, NoisyBatches
from .cache import CacheSettings, LatentCache, build_cache
from .calibrate import CalibrationSettings, LayerFit, calibrate
from .diffusion import Diffusion
from .distiller import STAGES, Distiller, DistillSettings, Progress, StageSettings
from .objective import Gap, LossWeights, Objective, measure_gap
from .sources import Example, hub_dataset, image_folder, prompt_file, prompts_as_examples
from .transfer import transfer_step

__all__ = [
    "STAGES",
    "CacheSettings",
    "CalibrationSettings",
    "Diffusion",
    "DistillSettings",
    "Distiller",
    "Example",
    "Gap",
    "LatentCache",
    "LayerFit",
    "LossWeights",
    "NoisyBatch",
    "NoisyBatches",
    "Objective",
    "Progress",
    "StageSettings",
    "build_cache",
    "calibrate",
    "hub_dataset",
    "image_folder",
    "measure_gap",
    "prompt_file",
    "prompts_as_examples",
    "transfer_step",
]
