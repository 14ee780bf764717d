"""Conditioning of any text-to-image or -video pipeline: recorded from the pipeline's own call of its denoiser.

For model classes without a row in `conditioning.FAMILIES`. The pipeline is started on the prompts, unguided, and
stopped at its denoiser; what the denoiser was given beside the noisy sample and the timestep is the conditioning. What
grows with the number of prompts is kept per sample, the rest (positions, rotary tables, sizes) once per image size.
The latents stay in the layout that the denoiser takes, so only data that the teacher draws itself can be used.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .buckets import Size

Conditioning = dict[str, torch.Tensor]
SHARED = "shared:"
"""Prefix of what all samples of one image size have in common."""
_TIMESTEP = f"{SHARED}timestep map"
_SCALARS = {"bool": bool, "int": int, "float": float}


# What was found out by comparing calls, which takes two runs of the text encoders: names of the rows, and the rest.
_layouts: WeakKeyDictionary[nn.Module, dict[str, tuple[list[str], Conditioning]]] = WeakKeyDictionary()


class _Recorded(Exception):
    """Raised inside the denoiser to leave the pipeline's loop."""


def can_record(model: nn.Module) -> bool:
    """Whether `model` is a denoiser by its signature: a sample first, a timestep, and what a text encoder gives."""
    names = _parameters(model)
    text = any(name.startswith("encoder_hidden_states") for name in names)
    return text and "controlnet_cond" not in names and any(name in names for name in ("timestep", "timesteps"))


@torch.no_grad()
def record_rows(pipeline: Any, model: nn.Module, prompts: Sequence[str], size: Size) -> Conditioning:
    """What belongs to each prompt: CPU tensors, a row per prompt.

    Raises:
        ValueError: the pipeline cannot be recorded; says why.
    """
    rows, _ = _layout(pipeline, model, size)
    call = _calls(pipeline, model, prompts, size, 1)[0]
    return {name: call[name] for name in rows}


@torch.no_grad()
def record_shared(pipeline: Any, model: nn.Module, size: Size) -> Conditioning:
    """What all prompts have in common at `size`: CPU tensors by names that begin with `SHARED`."""
    _, shared = _layout(pipeline, model, size)
    return shared


def is_shared(name: str) -> bool:
    """Whether a conditioning tensor has no row per sample."""
    return name.startswith(SHARED)


def replay(
    model: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
) -> dict[str, Any]:
    """Keyword arguments for the denoiser as its pipeline would pass them; timesteps as the scheduler counts them."""
    factor, offset = conditioning[_TIMESTEP]
    flat = {name.removeprefix(SHARED): tensor for name, tensor in conditioning.items() if name != _TIMESTEP}
    arguments = _nest(flat)
    arguments[sample_name(model)] = noisy
    timestep = _timestep_name(model)
    arguments[timestep] = (timesteps * factor + offset).to(arguments[timestep].dtype)
    return arguments


@torch.no_grad()
def draw_recorded(
    pipeline: Any,
    model: nn.Module,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: Size,
    steps: int,
    guidance: float,
) -> torch.Tensor:
    """Latents that the pipeline draws, in the layout of the denoiser, a seed per prompt; float32 on CPU."""
    last: list[torch.Tensor] = []

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last[:] = [tensors["latents"]]
        return {}

    options = _options(pipeline, model, prompts, size, steps)
    options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    if "guidance_scale" in options:
        options["guidance_scale"] = guidance
    pipeline(**options, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["latents"])
    return last[0].float().cpu()


@torch.no_grad()
def sampling_shift(pipeline: Any, model: nn.Module, size: Size) -> float | None:
    """By how much the pipeline itself shifts its timesteps for images of `size`: s, where its median one is that of
    s u / (1 + (s - 1) u) over u from 0 to 1. None where its scheduler does not look at the size."""
    if not pipeline.scheduler.config.get("use_dynamic_shifting"):
        return None
    _calls(pipeline, model, [""], size, 1, default_of(pipeline, "num_inference_steps"))
    median = pipeline.scheduler.timesteps.double().quantile(0.5).item() / pipeline.scheduler.config.num_train_timesteps
    return median / (1 - median)


def default_of(pipeline: Any, name: str) -> Any:
    """The default of an argument of the pipeline's call."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


def _layout(pipeline: Any, model: nn.Module, size: Size) -> tuple[list[str], Conditioning]:
    """Names of what has a row per prompt, and the rest; found by comparing one prompt with two."""
    known, key = _layouts.setdefault(model, {}), f"{size} {pipeline.scheduler.config}"
    if key not in known:
        known[key] = _find_layout(pipeline, model, size)
    return known[key]


def _find_layout(pipeline: Any, model: nn.Module, size: Size) -> tuple[list[str], Conditioning]:
    first, second = _calls(pipeline, model, [""], size, 2)
    double = _calls(pipeline, model, ["", ""], size, 1)[0]
    sample, timestep = sample_name(model), _timestep_name(model)
    rows, shared = [], {}
    for name, tensor in first.items():
        if name in (sample, timestep):
            continue
        if double[name].shape == tensor.shape:
            shared[SHARED + name] = tensor
        elif double[name].shape == (2, *tensor.shape[1:]):
            rows.append(name)
        else:
            raise _cannot(model, f"its argument {name!r} has neither a row per prompt nor one shape")
    moments = pipeline.scheduler.timesteps[:2].double().cpu()
    values = torch.stack([call[timestep].double().flatten()[0] for call in (first, second)])
    if moments[0] == moments[1] or values[0] == values[1]:
        raise _cannot(model, "its pipeline calls it more than once per step even without guidance")
    factor = (values[1] - values[0]) / (moments[1] - moments[0])
    shared[_TIMESTEP] = torch.stack([factor, values[0] - factor * moments[0]]).float()
    shared[SHARED + timestep] = first[timestep]  # for its dtype
    return rows, shared


def _calls(
    pipeline: Any, model: nn.Module, prompts: Sequence[str], size: Size, count: int, steps: int = 2
) -> list[Conditioning]:
    """The denoiser's arguments in its first `count` calls, flat, on CPU; defaults left out."""
    recorded: list[dict[str, Any]] = []
    names = _parameters(model)

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded.append({**dict(zip(names, args, strict=False)), **kwargs})
        if len(recorded) == count:
            raise _Recorded

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        pipeline(**_options(pipeline, model, prompts, size, steps), generator=torch.Generator().manual_seed(0))
    except _Recorded:
        pass
    except (TypeError, ValueError, AttributeError) as error:
        raise _cannot(model, f"{type(pipeline).__name__} fails on a prompt alone ({str(error)[:200]})") from error
    finally:
        handle.remove()
    if len(recorded) < count:
        raise _cannot(model, f"{type(pipeline).__name__} does not call it")
    calls: list[Conditioning] = [{} for _ in recorded]
    for flat, given in zip(calls, recorded, strict=True):
        for name, value in given.items():
            empty = value is None or (isinstance(value, dict) and not value)
            if name != "return_dict" and not empty and not (name in names and value is names[name].default):
                _flatten(model, name, value, flat)
    if any(len(call[sample_name(model)]) != len(prompts) for call in calls):
        raise _cannot(model, f"{type(pipeline).__name__} guides without being asked to")
    return calls


def _options(pipeline: Any, model: Any, prompts: Sequence[str], size: Size, steps: int) -> dict[str, Any]:
    """Arguments of an unguided call; guidance that is an input of the model stays the pipeline's default."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    options: dict[str, Any] = {"prompt": list(prompts), "num_inference_steps": steps, "output_type": "latent"}
    options.update({name: side for name, side in zip(("height", "width"), size, strict=True) if name in accepted})
    embedded = any(model.config.get(name) for name in ("guidance_embeds", "time_cond_proj_dim"))
    if "guidance_scale" in accepted and not embedded:
        options["guidance_scale"] = 1.0
    return options


def _flatten(module: nn.Module, path: str, value: Any, flat: Conditioning) -> None:
    """Tensors by path; tuples, lists and numbers become parts of the path that `_nest` undoes."""
    if isinstance(value, torch.Tensor):
        flat[path] = value.detach().cpu()
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            _flatten(module, f"{path}/{index}", part, flat)
    elif type(value).__name__ in _SCALARS:
        flat[f"{path}/{type(value).__name__}"] = torch.tensor([value])
    else:
        raise _cannot(module, f"its argument {path!r} is {type(value).__name__}, no tensor")


def _nest(flat: Conditioning) -> dict[str, Any]:
    """The inverse of `_flatten`; every sequence becomes a tuple."""
    tree: dict[str, Any] = {}
    for path, tensor in flat.items():
        *parents, leaf = path.split("/")
        value: Any = tensor
        if leaf in _SCALARS:
            value = _SCALARS[leaf](tensor.item())
            *parents, leaf = parents
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return {name: _tuples(value) for name, value in tree.items()}


def _tuples(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return tuple(_tuples(node[index]) for index in sorted(node, key=int))


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    # The class's own forward: offloading replaces the instance's by a wrapper of another signature.
    parameters = dict(inspect.signature(type(model).forward).parameters)
    parameters.pop("self", None)
    return parameters


def sample_name(model: nn.Module) -> str:
    """The name of the noisy sample's argument."""
    return next(iter(_parameters(model)))


def _timestep_name(model: nn.Module) -> str:
    return "timestep" if "timestep" in _parameters(model) else "timesteps"


def _cannot(model: nn.Module, reason: str) -> ValueError:
    return ValueError(f"{type(model).__name__} cannot be distilled by recording its pipeline: {reason}.")
