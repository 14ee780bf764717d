"""Into linear attention and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.utils import logging
from torch import nn

from ..mixers import LayerMixer, mixer_class
from ..models import (
    AUTO,
    LAYER,
    MIXER,
    AdapterAttnProcessor,
    AutotuneHook,
    ConvertedLayer,
    EndHook,
    FocusedLinearAttnProcessor,
    GridHook,
    GuardHook,
    Kind,
    LayerInfo,
    WrappedProcessor,
    find_attention_layers,
    find_projection,
    remove_hooks,
    softmax_below_on,
    stays_here,
    wrap,
)
from ..models.guiders import register_like
from .adapter import Adapter
from .config import AdapterConfig, resolve_config
from .handle import ADAPTER, OURS, build_layer, place_of
from .offloading import is_offloaded, is_offloaded_in_groups

logger = logging.get_logger(__name__)

_CONVERTIBLE = (AttnProcessor2_0, FusedAttnProcessor2_0)


DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer")
"""Names under which pipelines hold what predicts: Wan 2.2 has two, one for each half of the steps; Ideogram 4 one for
each side of guidance."""


class Denoisers(nn.ModuleDict):
    """The denoisers of a pipeline that has several, by their name there: converted, saved and restored as one."""


def resolve_model(model_or_pipeline: Any) -> nn.Module:
    """The denoiser, without torch.compile's or data-parallel wrappers; `Denoisers` of a pipeline that has several.

    Raises:
        TypeError: neither a module nor a pipeline that holds one under the names of `DENOISERS`.
    """
    if isinstance(model_or_pipeline, nn.Module):
        return _unwrapped(model_or_pipeline)
    found = {name: getattr(model_or_pipeline, name, None) for name in DENOISERS}
    parts = {name: _unwrapped(part) for name, part in found.items() if isinstance(part, nn.Module)}
    if not parts:
        raise TypeError(
            f"{type(model_or_pipeline).__name__} is no module and has neither .unet nor .transformer: "
            "pass the model to convert."
        )
    return next(iter(parts.values())) if len(parts) == 1 else Denoisers(parts)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def parts_of(model: nn.Module) -> list[nn.Module]:
    """The models that are called: those of `Denoisers`, or the one."""
    return list(model.values()) if isinstance(model, Denoisers) else [model]


def linearize(model_or_pipeline: Any, config: AdapterConfig | str | None = None) -> Adapter:
    """Replace the softmax self-attention of a diffusers model by learnable focused linear attention, in place.

    Every self-attention layer of the known families that holds an image gets a mixer as the submodule
    `flatten_mixer` of its attention module; what it learns starts where it adds nothing. The token grid is read from
    the model's real input at each forward pass, so any size and aspect ratio works, also under gradient checkpointing
    enabled by the model's own `enable_gradient_checkpointing`. Where image and text share one sequence (SD3, Flux),
    attention from image to image becomes linear, and wherever text is query or key it stays softmax (see
    `flatten_diffusion.mixers.TextJoin`). Key padding is honoured; calls with any other mask, cross-attention, temporal
    attention and layers outside the known families stay softmax, bit for bit: see `Adapter.report`.

    The new parameters have the dtype and device of their layer and require gradients. Freezing the model afterwards
    (peft's `add_adapter` does) freezes them too: `adapter.requires_grad_()` undoes that. They appear in the model's
    `state_dict`; save them with `Adapter.save_pretrained`, since diffusers' `from_pretrained` would drop them. They
    stand among the others in `model.parameters()`: an EMA that was made before does not fit any more, and
    `ControlNetModel.from_unet` wants the model as it was.

    Args:
        model_or_pipeline: a model, or a pipeline with `.unet` or `.transformer`, all of whose denoisers are converted
            (Wan 2.2 has two; layers are then named "transformer.blocks.0.attn1" and so on); other parts of a pipeline
            (a ControlNet) are converted by passing them.
        config: see `AdapterConfig`; None means its defaults. "training-free" stands for pyramid attention wherever that
            is faster: images stay near the original's without any training, for several times the time of focused
            linear attention.

    Returns:
        The adapter: parameters, `disabled()`, `report()`, `save_pretrained()`. Also at `model.flatten_adapter`.

    Raises:
        TypeError: no model found, or no config.
        ValueError: the model is converted already, no layer can be converted, a pattern matches nothing, or a layer
            to convert runs sliced, xFormers or custom attention. Nothing is changed then.
    """
    model = resolve_model(model_or_pipeline)
    config = resolve_config(config)
    found = find_attention_layers(model)
    check_unconverted(model, found)
    chosen = _choose(model, found, config)
    check_in_place(model)
    check_processors(chosen)
    check_supported(chosen, config)
    return attach(model, config, found, build_layers(chosen, config))


def restore(model_or_pipeline: Any) -> None:
    """Undo `linearize`, `load_adapter`, or `set_attn_processor(FocusedLinearAttnProcessor())`, exactly.

    After `linearize` or `load_adapter`, every original processor object is put back on the layer it came from, and
    submodules, hooks and attributes are removed: outputs are bit-equal to before. A processor that something else put
    on a converted layer since is replaced too, with a warning; on other layers it stays (an IP-Adapter, say).
    `set_attn_processor` alone keeps no originals: each layer then gets the default that diffusers gives a new layer of
    its kind (AttnProcessor2_0; AttnAddedKVProcessor2_0 with added projections; FusedAttnProcessor2_0 while fused),
    which is bit-equal to before if the layer ran its default before.

    Raises:
        TypeError: no model found.
        ValueError: nothing to restore.
    """
    model = resolve_model(model_or_pipeline)
    adapter: Adapter | None = next((p.__dict__[ADAPTER] for p in parts_of(model) if ADAPTER in p.__dict__), None)
    if adapter is not None:
        model = adapter.model  # with all its parts, whichever was passed
    found = find_attention_layers(model)
    if not _is_converted(model, found):
        raise ValueError(f"This {type(model).__name__} is not converted: there is nothing to restore.")
    if adapter is not None:
        adapter.unmerge()
        adapter.settle()
    replaced = _take_off(model, found, {} if adapter is None else adapter.kept)
    if adapter is not None:
        adapter.forget()
    if replaced:
        logger.warning(f"restore replaced processors that were set after the conversion: {', '.join(replaced)}.")


def check_unconverted(model: nn.Module, found: Sequence[LayerInfo]) -> None:
    """Raise ValueError when any layer of the model runs this library's processor already."""
    if _is_converted(model, found):
        raise ValueError(f"This {type(model).__name__} is converted already: call restore() on it first.")


def _is_converted(model: nn.Module, found: Sequence[LayerInfo]) -> bool:
    """Whether anything of a conversion is on the model, were it only half done."""
    traces = any(hasattr(f.attn, LAYER) or hasattr(f.attn, MIXER) or _is_ours(f) for f in found)
    return traces or any(ADAPTER in part.__dict__ for part in parts_of(model))


def check_in_place(model: nn.Module) -> None:
    """Raise ValueError where groups of modules are moved in and out: what is added later would stay behind."""
    if is_offloaded_in_groups(model):
        raise ValueError(f"This {type(model).__name__} is offloaded in groups: convert before enabling group offload.")


def check_processors(chosen: Sequence[LayerInfo]) -> None:
    """Raise ValueError when a layer to convert cannot be taken over exactly."""
    for info in chosen:
        attn: Any = info.attn
        name = type(attn.processor).__name__
        native = () if info.architecture is None else info.architecture.native
        if native and name not in native:
            raise ValueError(
                f"{info.name} runs {name}: put {' or '.join(native)} back first (unload IP-Adapters, disable what "
                "else replaced it), or exclude the layer."
            )
        if native:
            wrap(attn.processor)  # raises when its source is of no use
        elif type(attn.processor) not in _CONVERTIBLE:
            raise ValueError(
                f"{info.name} runs {name}: put AttnProcessor2_0() back first (disable attention slicing, xFormers "
                "or the custom processor), or exclude the layer."
            )
        query = find_projection(attn, "q")
        _check_weight(info.name, None if query is None else query.module(attn).weight)
        if query is not None and is_offloaded(query.module(attn)):
            raise ValueError(f"{info.name} is offloaded layer by layer: convert before enabling sequential offload.")


def _check_weight(name: str, weight: torch.Tensor | None) -> None:
    if getattr(weight, "device_mesh", None) is not None:
        raise ValueError(f"{name} is sharded already: convert the model first, then shard it (fully_shard, a TP plan).")
    if weight is not None and weight.is_inference():
        raise ValueError(f"{name} was made under torch.inference_mode(), which allows no training: load it outside.")


def check_supported(chosen: Sequence[LayerInfo], config: AdapterConfig) -> None:
    """Raise ValueError when a layer's mixer cannot do what the layer or the config asks of it at every call."""
    for info in chosen:
        name = config.mixer_of(info.name).name
        supports = mixer_class(name).supports
        if config.window and "window" not in supports:
            raise ValueError(f"{info.name}: {name} cannot be combined with windows: convert with window=0.")
        if info.place != "alone" and "text" not in supports:
            raise ValueError(
                f"{info.name}: {name} cannot be joined with other tokens (text): exclude the layer, or choose "
                "another mixer."
            )


def build_layers(chosen: Sequence[LayerInfo], config: AdapterConfig) -> dict[str, LayerMixer]:
    """What each layer is to carry, by name; nothing is attached yet."""
    return {f.name: build_layer(f.name, f.attn, f.place != "alone", config) for f in chosen}


def attach(
    model: nn.Module,
    config: AdapterConfig,
    found: Sequence[LayerInfo],
    layers: Mapping[str, LayerMixer],
    always_converted: Collection[str] = (),
) -> Adapter:
    """Put `layers` on their attention modules and install processors and hooks. Everything was checked before; where it
    is interrupted all the same, the model is as it was.

    `always_converted` names layers that run their mixer at every size although the config leaves that to measurement.
    """
    if config.min_tokens == AUTO:  # timed here, before the model is touched; for `report` also where it decides nothing
        for info in found:
            if info.name in layers and stays_here(place_of(info.attn)[0]):
                softmax_below_on(*place_of(info.attn), Kind.of(layers[info.name]))
    try:
        adapter = _attach(model, config, [f for f in found if f.name in layers], layers, always_converted)
        adapter.kept = {f.name: f.attn.processor for f in found if f.name not in layers}
        return adapter
    except BaseException:
        _take_off(model, found, {})
        raise


def _attach(
    model: nn.Module,
    config: AdapterConfig,
    found: Sequence[LayerInfo],
    layers: Mapping[str, LayerMixer],
    always_converted: Collection[str],
) -> Adapter:
    plain = AdapterAttnProcessor()
    register_like(AdapterAttnProcessor, AttnProcessor2_0)
    wrapped: dict[int, WrappedProcessor] = {}
    states: list[tuple[nn.Module, ConvertedLayer]] = []
    hooked: dict[tuple[str, Any, tuple[str, ...]], tuple[LayerInfo, list[ConvertedLayer]]] = {}
    min_tokens = config.min_tokens if isinstance(config.min_tokens, int) else 0
    for info in found:
        attn = info.attn
        native: Any = attn.processor
        state = ConvertedLayer(info.name, native, min_tokens, info.place)
        state.auto = config.min_tokens == AUTO and info.name not in always_converted
        setattr(attn, LAYER, state)
        attn.add_module(MIXER, layers[info.name].train(attn.training))
        if info.architecture is not None and info.architecture.native:
            _set_processor(attn, wrapped.setdefault(id(native), wrap(native)))
        else:
            _set_processor(attn, plain)
        states.append((attn, state))
        # Without need of a grid too: the hook is also what replays a layer's state under checkpointing.
        if info.architecture is not None and info.architecture.read is not None:
            key = (info.owner_name, info.architecture.read, info.architecture.arguments)
            hooked.setdefault(key, (info, []))[1].append(state)
    for info, below in hooked.values():
        assert info.owner is not None and info.architecture is not None and info.architecture.read is not None
        hook = GridHook(info.architecture.read, info.argument_positions, below)
        info.owner.register_forward_pre_hook(hook, with_kwargs=True)
        info.owner.register_forward_hook(EndHook(below), always_call=True)
    automatic = [(state, layers[state.name], place_of(attn)) for attn, state in states if state.auto]
    adapter = Adapter(model, config, [info.name for info in found])
    for part in parts_of(model):
        part.register_forward_pre_hook(GuardHook(states, OURS))
        if automatic:
            part.register_forward_pre_hook(AutotuneHook(automatic), with_kwargs=True)
        setattr(part, ADAPTER, adapter)
    return adapter


def _choose(model: nn.Module, found: Sequence[LayerInfo], config: AdapterConfig) -> list[LayerInfo]:
    names = [info.name for info in found]
    for pattern in (*(config.include or ()), *config.exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"Pattern {pattern!r} matches none of the {len(names)} attention layers of {type(model).__name__}"
                + (f": they are named like {names[0]!r}." if names else ".")
            )
    image = [f for f in found if f.reason is None and (f.offered is None or _included(f.name, config))]
    if not image:
        reasons = sorted({why for info in found if (why := info.reason or info.offered) is not None})
        raise ValueError(
            f"{type(model).__name__} has no layer that can be converted: "
            + ("; ".join(reasons) if reasons else "it has no attention layers")
            + "."
        )
    unknown = sorted(set(config.overrides) - {info.name for info in image})
    if unknown:
        raise ValueError(f"overrides names {unknown[0]!r}, which {type(model).__name__} cannot convert.")
    chosen = [info for info in image if selected(info.name, config)]
    if not chosen:
        raise ValueError(f"include and exclude leave none of the {len(image)} convertible layers: widen them.")
    return chosen


def selected(name: str, config: AdapterConfig) -> bool:
    """Whether the patterns of `config` select the layer `name`."""
    included = config.include is None or _included(name, config)
    return included and not any(fnmatchcase(name, pattern) for pattern in config.exclude)


def _included(name: str, config: AdapterConfig) -> bool:
    """Whether `include` names the layer; None names nothing."""
    return any(fnmatchcase(name, pattern) for pattern in config.include or ())


def _take_off(model: nn.Module, found: Sequence[LayerInfo], kept: Mapping[str, Any]) -> list[str]:
    """Everything that a conversion put on the model, whole or half; returns what else was replaced by it.

    `kept`: processors that other layers ran at the conversion, for those that run one of ours by now.
    Each step can be repeated: a restore that was interrupted is finished by the next.
    """
    replaced = []
    for info in found:
        attn: Any = info.attn
        state: ConvertedLayer | None = getattr(attn, LAYER, None)
        if state is not None:
            if not _is_ours(info) and attn.processor is not state.native and not _unfused(attn, state):
                replaced.append(f"{info.name} ({type(attn.processor).__name__})")
            if not _unfused(attn, state):
                _set_processor(attn, state.native)
        elif _is_ours(info):  # put there by set_attn_processor, or by diffusers, which had kept it
            ours = attn.processor
            native = ours.native if isinstance(ours, WrappedProcessor) else ours.native_of(attn)
            _set_processor(attn, kept.get(info.name, native))
        if hasattr(attn, MIXER):
            delattr(attn, MIXER)
        if state is not None:
            delattr(attn, LAYER)
    remove_hooks(model)
    for part in parts_of(model):
        part.__dict__.pop(ADAPTER, None)
    return replaced


def _unfused(attn: Any, state: ConvertedLayer) -> bool:
    """Whether projections that were fused at the conversion were unfused since, which put the right processor back."""
    now = type(attn.processor).__name__
    return "Fused" in type(state.native).__name__ and now == type(state.native).__name__.replace("Fused", "")


def _is_ours(info: LayerInfo) -> bool:
    return isinstance(info.attn.processor, (FocusedLinearAttnProcessor, WrappedProcessor))


def _set_processor(attn: Any, processor: Any) -> None:
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:  # MochiAttention
        attn.processor = processor
