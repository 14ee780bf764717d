"""Mixers by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .base import FEATURES, LayerShape, Mixer, MixerConfig

_REGISTRY: dict[str, type[Mixer]] = {}
_MixerType = TypeVar("_MixerType", bound=type[Mixer])


class MixerNames(list[str]):
    """Names of mixers; prints as a table of what each is, costs and supports."""

    def __str__(self) -> str:
        rows = [("mixer", "tokens", "supports", "")]
        rows += [(n, _REGISTRY[n].cost, ", ".join(sorted(_REGISTRY[n].supports)), _REGISTRY[n].summary) for n in self]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def register_mixer(name: str) -> Callable[[_MixerType], _MixerType]:
    """Class decorator: makes a mixer and its config available under `name`. Raises ValueError when it is taken."""

    def register(cls: _MixerType) -> _MixerType:
        if name in _REGISTRY:
            raise ValueError(f"Mixer {name!r} is taken by {_REGISTRY[name].__name__}: choose another name.")
        if not cls.supports <= FEATURES:
            raise ValueError(
                f"{cls.__name__} supports {sorted(cls.supports - FEATURES)}: choose out of {sorted(FEATURES)}."
            )
        if any(other.Config is cls.Config for other in _REGISTRY.values()):
            raise ValueError(f"{cls.__name__} has the config of another mixer: give it one of its own.")
        cls.Config.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def list_mixers() -> MixerNames:
    """Names that `AdapterConfig(mixer=...)` accepts, sorted; print it for what each is, costs and supports."""
    return MixerNames(sorted(_REGISTRY))


def mixer_class(name: object) -> type[Mixer]:
    """The registered class. Raises ValueError when `name` is not one of `list_mixers()`."""
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ValueError(f"Unknown mixer {str(name)[:80]!r}: choose one of {', '.join(list_mixers())}.")
    return _REGISTRY[name]


def mixer_config(value: MixerConfig | str | Mapping[str, Any]) -> MixerConfig:
    """A config from itself, a name (its defaults), or JSON types with a "name". Raises ValueError for what is none."""
    if isinstance(value, MixerConfig):
        mixer_class(value.name)
        return value
    if isinstance(value, Mapping):
        settings = dict(value)
        return mixer_class(settings.pop("name", None)).Config.from_dict(settings)
    return mixer_class(value).Config()


def create_mixer(
    config: MixerConfig | str,
    layer: LayerShape,
    *,
    seed: str = "",
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Mixer:
    """A new mixer. What starts at random is drawn from `seed`: the same for the same seed, and no global random state
    moves."""
    config = mixer_config(config)
    with seeded(seed):
        mixer = mixer_class(config.name)(config, layer)
    return mixer.to(device=device, dtype=dtype)


@contextmanager
def seeded(seed: str) -> Iterator[None]:
    """Inside, random numbers on the CPU are those of `seed`; the state outside is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6], "big"))
        yield
