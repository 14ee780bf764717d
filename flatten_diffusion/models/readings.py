"""How each family's input says which tokens are the picture's: functions for the `read` column of the family table.

Each takes the owner module and the values of the row's `arguments` (None where absent) and returns a grid, or a
`Reading` where there is more to say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..mixers import Grid, count_tokens, pictures_of
from .layer import Reading

PINNED = "flatten_grid"
"""Attribute of a model: the grid that compiled graphs take for granted, see `Adapter.pin_grid`."""
SIZES_DIFFER = "pictures of different sizes in one batch"


def pixels(module: Any, hidden_states: torch.Tensor) -> Grid:
    """[..., height, width], a token per position."""
    return hidden_states.shape[-2], hidden_states.shape[-1]


def patches(module: Any, hidden_states: torch.Tensor) -> Grid:
    """[..., height, width], a token per square patch."""
    patch = module.config.patch_size
    return hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch


def transformer_2d(module: Any, hidden_states: torch.Tensor) -> Grid:
    """`Transformer2DModel`, which takes pixels, patches or codes."""
    if module.is_input_vectorized:
        return module.height, module.width
    patch = module.patch_size if module.is_input_patches else 1
    return hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch


def square_patches(module: Any, hidden_states: torch.Tensor) -> Grid:
    """As `patches`, for a model that can only be square."""
    patch = module.config.patch_size
    height, width = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
    if height != width:
        raise ValueError(
            f"{type(module).__name__} unpatchifies every output as a square: a {height}x{width} token grid comes out "
            "scrambled in diffusers itself; pass square latents."
        )
    return height, width


def uvit_codes(module: Any, input_ids: torch.Tensor) -> Grid:
    """UVit2D, which may halve its codes."""
    factor = 2 if module.down_block.downsample is not None else 1
    return input_ids.shape[-2] // factor, input_ids.shape[-1] // factor


def signal(module: Any, hidden_states: torch.Tensor) -> Grid:
    """[..., length]: a signal in time, as a picture of one row."""
    return 1, hidden_states.shape[-1]


def video(module: Any, hidden_states: torch.Tensor) -> Grid:
    """[B, C, frames, height, width] in patches, also in time where the model has them."""
    return _video(module, hidden_states.shape[-3], hidden_states.shape[-2], hidden_states.shape[-1])


def frames_first_video(module: Any, hidden_states: torch.Tensor) -> Grid:
    """[B, frames, C, height, width] in patches."""
    return _video(module, hidden_states.shape[1], hidden_states.shape[-2], hidden_states.shape[-1])


def _video(module: Any, frames: int, height: int, width: int) -> Grid:
    patch = module.config.patch_size
    in_time = getattr(module.config, "patch_size_t", None) or 1
    in_time, high, wide = patch if isinstance(patch, (list, tuple)) else (in_time, patch, patch)
    return frames // in_time, height // high, width // wide


def given_video(module: Any, num_frames: int | None, height: int | None, width: int | None) -> Reading:
    """Sizes that the caller passes in tokens."""
    if num_frames is None or height is None or width is None:
        return Reading(None)
    return Reading((num_frames, height, width))


def position_ids(module: Any, img_ids: torch.Tensor) -> Reading:
    """Flux: [N, 3 or more], each token's (picture, row, column, ...); several pictures may follow one another.

    Reads the ids from the device, once per forward pass. A compiled graph cannot: it breaks there, or takes the grid
    that was pinned (see `Adapter.pin_grid`) and checks it on the device.
    """
    ids = img_ids[0] if img_ids.dim() == 3 else img_ids
    if not torch.compiler.is_compiling():
        return Reading(_grid_from_ids(ids))
    pinned: Grid | None = getattr(module, PINNED, None)
    if pinned is None or count_tokens(pinned) != ids.shape[0]:
        return Reading(_read_outside_the_graph(ids))
    torch._assert_async(_agree(ids, pinned), "img_ids are not those of the grid given to pin_grid")
    return Reading(pinned)


def masked_position_ids(module: Any, img_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Reading:
    """Chroma: as Flux, and a key padding mask [B, N] that it turns into N x N."""
    reading = position_ids(module, img_ids)
    reading.key_mask = None if attention_mask is None else attention_mask.to(torch.bool)
    return reading


def _grid_from_ids(ids: torch.Tensor) -> Grid:
    """The pictures whose positions the ids run through row by row."""
    rows: list[list[int]] = ids[:, :3].long().tolist()
    grids: list[tuple[int, int, int]] = []
    start = 0
    while start < len(rows):
        picture, top, left = rows[start]
        width = 1
        while start + width < len(rows) and rows[start + width] == [picture, top, left + width]:
            width += 1
        height = 1
        while rows[start + height * width : start + height * width + 1] == [[picture, top + height, left]]:
            height += 1
        grids.append((1, height, width))
        start += height * width
    if start != len(rows):
        raise ValueError("img_ids do not run through whole pictures row by row: pass the ids that the pipeline makes.")
    return grids[0][1:] if len(grids) == 1 else tuple(grids)


_read_outside_the_graph = torch.compiler.disable(_grid_from_ids)


def _agree(ids: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Whether the ids are those of the grid, as a tensor on their device."""
    pictures = pictures_of(grid)
    agree = ids.new_ones((), dtype=torch.bool)
    for part, (_, height, width) in zip(ids.split([math.prod(p) for p in pictures]), pictures, strict=True):
        index = torch.arange(height * width, device=ids.device)
        agree = agree & (part[:, 1] - part[0, 1] == index // width).all()
        agree = agree & (part[:, 2] - part[0, 2] == index % width).all()
    return agree


def image_shapes(module: Any, img_shapes: Sequence[Any]) -> Reading:
    """QwenImage: for each sample a (frames, height, width), or a list of them where there are reference images."""
    samples = [(sample,) if isinstance(sample[0], int) else tuple(map(tuple, sample)) for sample in img_shapes]
    return _one_size([tuple(tuple(shape) for shape in sample) for sample in samples])


def latent_list(module: Any, x: Sequence[Any], patch_size: int | None, f_patch_size: int | None) -> Reading:
    """Z-Image: a list of [C, frames, height, width], one per sample."""
    if isinstance(x[0], (list, tuple)):
        return Reading(None, softmax="several pictures and captions in one sequence")
    patch, in_time = patch_size or 2, f_patch_size or 1
    return _one_size([((z.shape[1] // in_time, z.shape[2] // patch, z.shape[3] // patch),) for z in x])


def patches_or_sizes(module: Any, hidden_states: torch.Tensor, img_sizes: Any) -> Reading:
    """HiDream: [B, C, height, width], or patches with each sample's (height, width) in `img_sizes`."""
    if hidden_states.dim() == 4:
        return Reading(patches(module, hidden_states))
    sizes = img_sizes.tolist() if isinstance(img_sizes, torch.Tensor) else img_sizes
    return _one_size([((1, int(size[0]), int(size[1])),) for size in sizes])


def _one_size(samples: list[tuple[tuple[int, int, int], ...]]) -> Reading:
    """A batch's pictures, which must have one size for all samples: a convolution on a ragged batch is none."""
    if any(sample != samples[0] for sample in samples):
        return Reading(None, softmax=SIZES_DIFFER)
    pictures = samples[0]
    return Reading(pictures[0] if len(pictures) == 1 else pictures)


def unmasked_patches(module: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> Reading:
    """CogView4, whose text mask diffusers adds to the scores as ones and zeros, which masks nothing."""
    why = "attention_mask is given, which diffusers adds to this model's scores as 0 and 1 instead of masking"
    return Reading(patches(module, hidden_states), softmax=None if attention_mask is None else why)


def causal_text_patches(module: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> Reading:
    """OmniGen: a mask [B, N, N], causal in the text, the same row for every picture token at the end."""
    grid = patches(module, hidden_states)
    if attention_mask is None:
        return Reading(grid)
    mask = attention_mask.to(torch.bool)
    if mask.dim() != 3:
        return Reading(grid, key_mask=mask)
    last = mask[:, -1:]
    # Looked at only where looking costs no graph: reading a tensor's value ends a compiled one.
    if torch.compiler.is_compiling() or not bool((mask[:, -count_tokens(grid) :] == last).all()):
        return Reading(grid, softmax="its attention_mask differs from one picture token to the next, or is compiled")
    return Reading(grid, key_mask=last[:, 0])


def ragged_patches(module: Any, hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor) -> Reading:
    """Lumina2: each sample's picture follows its own number of text tokens."""
    grid = patches(module, hidden_states)
    lengths = encoder_attention_mask.sum(dim=1)
    if len(lengths) == 1 or (not torch.compiler.is_compiling() and bool((lengths == lengths[0]).all())):
        return Reading(grid)
    return Reading(grid, starts=lengths)
