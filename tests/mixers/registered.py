"""What the tests run for every registered mixer: its example configs, and tensors of awkward sizes."""

from __future__ import annotations

import torch

import flatten_diffusion.mixers  # noqa: F401  (registers)
from flatten_diffusion.mixers import Context, LayerShape, Mixer, MixerConfig, create_mixer
from flatten_diffusion.mixers.registry import _REGISTRY

OWN = {name: cls for name, cls in _REGISTRY.items() if cls.__module__.startswith("flatten_diffusion.")}
"""Without those that other tests register."""
EXAMPLES = [
    (f"{name}-{index}", config) for name, cls in sorted(OWN.items()) for index, config in enumerate(cls.examples)
]
IDS = [name for name, _ in EXAMPLES]
CONFIGS = [config for _, config in EXAMPLES]


def stirred(config: MixerConfig, shape: LayerShape, dtype: torch.dtype = torch.float64, std: float = 0.2) -> Mixer:
    """A mixer whose parameters are none of their starting values."""
    mixer = create_mixer(config, shape, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return mixer


def tensors(
    grid: tuple[int, int], shape: LayerShape, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Context]:
    """Query, key and value as views of one tensor, and the context of a grid."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, grid[0] * grid[1], 3, shape.heads, shape.head_dim)
    query, key, value = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).unbind(2)
    hidden = torch.randn(batch, grid[0] * grid[1], shape.channels, generator=generator, dtype=torch.float64).to(dtype)
    return query, key, value, Context(grid, hidden_states=hidden)
