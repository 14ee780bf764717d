"""Into linear attention and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.utils import logging
from torch import nn

from ..mixers import PROJECTIONS, Mixer, MixerSpec, ProjectionDelta, create_mixer
from ..models import (
    AUTO,
    LAYER,
    MIXER,
    ConvertedLayer,
    CrossoverHook,
    Finding,
    FocusedLinearAttnProcessor,
    GridHook,
    Projection,
    ReboundProcessor,
    find_projection,
    heads_of,
    inner_dim_of,
    native_processor,
    place_of,
    rebind,
    remove_crossover_hook,
    remove_hooks,
    softmax_below_on,
    stays_here,
    survey,
)
from ..models.grid import GuardHook
from .config import AdapterConfig
from .handle import ADAPTER, OURS, Adapter

logger = logging.get_logger(__name__)

_CONVERTIBLE = (AttnProcessor2_0, FusedAttnProcessor2_0)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def resolve_model(model_or_pipeline: Any) -> nn.Module:
    """The denoiser: a pipeline's `unet` or `transformer`, without torch.compile's or data-parallel wrappers.

    Raises:
        TypeError: neither a module nor a pipeline that holds one under these names.
    """
    model = model_or_pipeline
    if not isinstance(model, nn.Module):
        found = [getattr(model, name, None) for name in ("unet", "transformer")]
        model = next((part for part in found if isinstance(part, nn.Module)), None)
    if model is None:
        raise TypeError(
            f"{type(model_or_pipeline).__name__} is no module and has neither .unet nor .transformer: "
            "pass the model to convert."
        )
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def linearize(model_or_pipeline: Any, config: AdapterConfig | None = None) -> Adapter:
    """Replace the softmax self-attention of a diffusers model by learnable focused linear attention, in place.

    Every self-attention layer of the known families that holds a picture gets a mixer as the submodule
    `flatten_mixer` of its attention module; what it learns starts where it adds nothing. The token grid is read from
    the model's real input at each forward pass, so any size and aspect ratio works, also under gradient checkpointing
    enabled by the model's own `enable_gradient_checkpointing`. Where picture and text share one sequence (SD3, Flux),
    attention from picture to picture becomes linear, and wherever text is query or key it stays softmax (see
    `AdapterConfig.joint`). Key padding is honoured; calls with any other mask, cross-attention, temporal attention and
    layers outside the known families stay softmax, bit for bit: see `Adapter.report`.

    The new parameters have the dtype and device of their layer and require gradients. Freezing the model afterwards
    (peft's `add_adapter` does) freezes them too: `adapter.requires_grad_()` undoes that. They appear in the model's
    `state_dict`; save them with `Adapter.save_pretrained`, since diffusers' `from_pretrained` would drop them.

    Args:
        model_or_pipeline: a model, or a pipeline with `.unet` or `.transformer`; other parts of a pipeline (a
            ControlNet) are converted by passing them.
        config: see `AdapterConfig`; None means its defaults.

    Returns:
        The adapter: parameters, `disabled()`, `report()`, `save_pretrained()`. Also at `model.flatten_adapter`.

    Raises:
        TypeError: no model found.
        ValueError: the model is converted already, no layer can be converted, a pattern matches nothing, or a layer
            to convert runs sliced, xFormers or custom attention. Nothing is changed then.
    """
    model = resolve_model(model_or_pipeline)
    config = AdapterConfig() if config is None else config
    findings = survey(model)
    check_unconverted(model, findings)
    chosen = _choose(model, findings, config)
    check_processors(chosen)
    return attach(model, config, findings, build_mixers(chosen, config))


def restore(model_or_pipeline: Any) -> None:
    """Undo `linearize`, `load_adapter`, or `set_attn_processor(FocusedLinearAttnProcessor())`, exactly.

    After `linearize` or `load_adapter`, every original processor object is put back on the layer it came from, and
    submodules, hooks and attributes are removed: outputs are bit-equal to before. A processor that something else put
    on a converted layer since is replaced too, with a warning; on other layers it stays (an IP-Adapter, say).
    `set_attn_processor` keeps no originals: each layer then gets the default that diffusers gives a new layer of its
    kind (AttnProcessor2_0; AttnAddedKVProcessor2_0 with added projections; FusedAttnProcessor2_0 while fused), which
    is bit-equal to before if the layer ran its default before.

    Raises:
        TypeError: no model found.
        ValueError: nothing to restore.
    """
    model = resolve_model(model_or_pipeline)
    adapter: Adapter | None = model.__dict__.get(ADAPTER)
    findings = survey(model)
    if adapter is None and not any(_is_ours(finding) for finding in findings):
        raise ValueError(f"This {type(model).__name__} is not converted: there is nothing to restore.")
    originals: Mapping[str, Any] = {} if adapter is None else adapter.originals
    if adapter is not None:
        _detach(model, adapter)
    for finding in findings:
        if _is_ours(finding):  # put there by set_attn_processor, on layers that the adapter left alone too
            attn: Any = finding.attn
            _set_processor(attn, originals[finding.name] if finding.name in originals else native_processor(attn))


def check_unconverted(model: nn.Module, findings: Sequence[Finding]) -> None:
    """Raise ValueError when any layer of the model runs this library's processor already."""
    converted = ADAPTER in model.__dict__ or any(hasattr(f.attn, LAYER) for f in findings)
    if converted or any(_is_ours(finding) for finding in findings):
        raise ValueError(f"This {type(model).__name__} is converted already: call restore() on it first.")


def check_processors(chosen: Sequence[Finding]) -> None:
    """Raise ValueError when a layer to convert cannot be taken over exactly."""
    for finding in chosen:
        attn: Any = finding.attn
        name = type(attn.processor).__name__
        native = () if finding.family is None else finding.family.native
        if native and name not in native:
            raise ValueError(
                f"{finding.name} runs {name}: put {' or '.join(native)} back first (unload IP-Adapters, disable what "
                "else replaced it), or exclude the layer."
            )
        if native:
            rebind(attn.processor)  # raises when its source is of no use
        elif type(attn.processor) not in _CONVERTIBLE:
            raise ValueError(
                f"{finding.name} runs {name}: put AttnProcessor2_0() back first (disable attention slicing, xFormers "
                "or the custom processor), or exclude the layer."
            )
        hook = getattr(_query(attn).module(attn), "_hf_hook", None)
        if getattr(hook, "offload", False):
            raise ValueError(f"{finding.name} is offloaded layer by layer: convert before enabling sequential offload.")


def _query(attn: nn.Module) -> Projection:
    """The projection that tells a layer's device and dtype."""
    query = find_projection(attn, "q")
    assert query is not None, "every layer of a known family has a query projection"
    return query


def build_mixers(chosen: Sequence[Finding], config: AdapterConfig) -> dict[str, Mixer]:
    """A fresh mixer per layer, by name, on the layer's device and in its dtype; nothing is attached yet."""
    mixers = {}
    for finding in chosen:
        attn: Any = finding.attn
        weight = _query(attn).module(attn).weight
        # Quantised and float8-stored weights do not tell the dtype that the layer computes in.
        dtype = weight.dtype if weight.dtype in _FLOATS else _compute_dtype(attn)
        power = config.focusing_factors.get(finding.name, config.focusing_factor)
        joint = None if finding.place == "alone" else config.joint
        mapped = finding.name in config.feature_maps
        heads = heads_of(attn)
        head_dim = inner_dim_of(attn) // heads
        spec = MixerSpec(heads, head_dim, power, config.kernel_size, joint, mapped, config.window)
        mixer = create_mixer(config.mixer, spec, device=weight.device, dtype=dtype)
        add_deltas(attn, mixer, config)
        mixers[finding.name] = mixer
    return mixers


def add_deltas(attn: Any, mixer: Mixer, config: AdapterConfig) -> None:
    """Give a mixer the projection deltas of `config` that it lacks; they add nothing yet.

    A layer without such a projection of its own (Flux's single streams leave "out" to the block) goes without.
    """
    parameter = next(mixer.parameters(), None)
    for name in config.deltas:
        projection = find_projection(attn, name)
        if name in mixer.deltas or projection is None:
            continue
        weight = projection.module(attn).weight if parameter is None else parameter
        delta = ProjectionDelta(projection.in_features(attn), projection.out_features(attn), config.delta_rank)
        mixer.deltas[name] = delta.to(device=weight.device, dtype=weight.dtype)
    # Always in this order, whatever came first: parameter order decides rounding in sums over all of them.
    mixer.deltas = nn.ModuleDict({name: mixer.deltas[name] for name in PROJECTIONS if name in mixer.deltas})


def projection_of(attn: Any, name: str) -> Any:
    """The linear module that holds the projection `name` (out of `PROJECTIONS`), LoRA around it included.

    Raises:
        ValueError: the layer has no such projection of its own.
    """
    projection = find_projection(attn, name)
    if projection is None:
        raise ValueError(f"{type(attn).__name__} has no {name} projection of its own.")
    return projection.module(attn)


def attach(
    model: nn.Module,
    config: AdapterConfig,
    findings: Sequence[Finding],
    mixers: Mapping[str, Mixer],
    always_linear: Collection[str] = (),
) -> Adapter:
    """Put `mixers` on their layers and install processors and hooks. Everything was checked before: cannot fail.

    `always_linear` names layers that are linear at every size although the config leaves that to measurement.
    """
    if config.min_tokens == AUTO:  # timed here, before the model is touched; for `report` also where it decides nothing
        for mixer in mixers.values():
            if stays_here(place_of(mixer)[0]):
                softmax_below_on(*place_of(mixer), config.mixer, mixer.spec)
    plain = FocusedLinearAttnProcessor()
    rebound: dict[int, ReboundProcessor] = {}
    originals = {finding.name: finding.attn.processor for finding in findings}
    layers: list[tuple[nn.Module, ConvertedLayer]] = []
    hooked: dict[tuple[str, Any, tuple[str, ...]], tuple[Finding, list[ConvertedLayer]]] = {}
    for finding in findings:
        if finding.name not in mixers:
            continue
        attn = finding.attn
        native: Any = attn.processor
        min_tokens = config.min_tokens if isinstance(config.min_tokens, int) else 0
        layer = ConvertedLayer(finding.name, native, min_tokens, finding.place)
        layer.auto = config.min_tokens == AUTO and finding.name not in always_linear
        mixer = mixers[finding.name].train(attn.training)
        attn.add_module(MIXER, mixer)
        setattr(attn, LAYER, layer)
        if finding.family is not None and finding.family.native:
            _set_processor(attn, rebound.setdefault(id(native), rebind(native)))
        else:
            _set_processor(attn, plain)
        layers.append((attn, layer))
        # Without a convolution too: the hook is also what replays a layer's state under checkpointing.
        if finding.family is not None and finding.family.read is not None:
            key = (finding.owner_name, finding.family.read, finding.family.arguments)
            hooked.setdefault(key, (finding, []))[1].append(layer)
    for finding, below in hooked.values():
        assert finding.owner is not None and finding.family is not None and finding.family.read is not None
        hook = GridHook(finding.family.read, finding.argument_positions, below)
        finding.owner.register_forward_pre_hook(hook, with_kwargs=True)
    model.register_forward_pre_hook(GuardHook(layers, OURS))
    automatic = [(layer, mixers[layer.name]) for _, layer in layers if layer.auto]
    if automatic:
        model.register_forward_pre_hook(CrossoverHook(config.mixer, automatic), with_kwargs=True)
    adapter = Adapter(model, config, dict(mixers), originals)
    setattr(model, ADAPTER, adapter)
    return adapter


def _choose(model: nn.Module, findings: Sequence[Finding], config: AdapterConfig) -> list[Finding]:
    names = [finding.name for finding in findings]
    for pattern in (*(config.include or ()), *config.exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"Pattern {pattern!r} matches none of the {len(names)} attention layers of {type(model).__name__}"
                + (f": they are named like {names[0]!r}." if names else ".")
            )
    image = [f for f in findings if f.reason is None and (f.offered is None or _included(f.name, config))]
    if not image:
        reasons = sorted({why for finding in findings if (why := finding.reason or finding.offered) is not None})
        raise ValueError(
            f"{type(model).__name__} has no layer that can be converted: "
            + ("; ".join(reasons) if reasons else "it has no attention layers")
            + "."
        )
    unknown = sorted(set(config.focusing_factors) - {finding.name for finding in image})
    if unknown:
        raise ValueError(f"focusing_factors names {unknown[0]!r}, which {type(model).__name__} cannot convert.")
    chosen = [finding for finding in image if selected(finding.name, config)]
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


def _detach(model: nn.Module, adapter: Adapter) -> None:
    adapter.unmerge()
    replaced = []
    for name, attn in adapter.attention_modules():
        if not isinstance(attn.processor, OURS):
            replaced.append(f"{name} ({type(attn.processor).__name__})")
        _set_processor(attn, adapter.originals[name])
        delattr(attn, MIXER)
        delattr(attn, LAYER)
    remove_hooks(model)
    remove_crossover_hook(model)
    delattr(model, ADAPTER)
    adapter.forget()
    if replaced:
        logger.warning(f"restore replaced processors that were set after the conversion: {', '.join(replaced)}.")


def _is_ours(finding: Finding) -> bool:
    return isinstance(finding.attn.processor, OURS)


def _set_processor(attn: Any, processor: Any) -> None:
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:  # MochiAttention
        attn.processor = processor


def _compute_dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.dtype in _FLOATS), torch.float32)
