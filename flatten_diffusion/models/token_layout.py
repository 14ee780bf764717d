"""How each family's input says which tokens are the image's: functions for the `read` column of the family table.

Each takes the owner module and the values of the row's `arguments` (None where absent) and returns a grid, or a
`TokenLayout` where there is more to say.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..mixers import Grid, count_tokens, images_of
from .layer import TokenLayout

PINNED = "flatten_grid"
"""Attribute of a model: the grid that compiled graphs take for granted, see `Adapter.pin_grid`."""
_NOT_PINNED = "img_ids are not those of the grid given to pin_grid"
SIZES_DIFFER = "images of different sizes in one batch"


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
    """[..., length]: a signal in time, as an image of one row."""
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


def given_video(module: Any, num_frames: int | None, height: int | None, width: int | None) -> TokenLayout:
    """Sizes that the caller passes in tokens."""
    if num_frames is None or height is None or width is None:
        return TokenLayout(None)
    return TokenLayout((num_frames, height, width))


def position_ids(module: Any, img_ids: torch.Tensor | None) -> TokenLayout:
    """Flux: [N, 3 or more], each token's (image, row, column, ...); several images may follow one another.

    Ids may step by anything and be rounded (bfloat16 keeps whole numbers up to 256): their order is what is read, from
    the device, once per forward pass. A compiled graph cannot: it breaks there, or takes the grid that was pinned (see
    `Adapter.pin_grid`) and checks it on the device.

    Raises ValueError where the ids do not run through whole images, or are rounded so far that they do not tell.
    """
    if img_ids is None:
        return TokenLayout(None)
    ids = img_ids[0] if img_ids.dim() == 3 else img_ids
    if not torch.compiler.is_compiling():
        return TokenLayout(_grid_from_ids(ids))
    pinned: Grid | None = getattr(module, PINNED, None)
    if pinned is None or count_tokens(pinned) != ids.shape[0]:
        return TokenLayout(_read_outside_the_graph(ids))
    torch._assert_async(_agree(ids, pinned), _NOT_PINNED)
    return TokenLayout(pinned)


def masked_position_ids(module: Any, img_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> TokenLayout:
    """Chroma: as Flux, and a key padding mask [B, N] that it turns into N x N."""
    reading = position_ids(module, img_ids)
    reading.key_mask = None if attention_mask is None else attention_mask.to(torch.bool)
    return reading


def _grid_from_ids(ids: torch.Tensor) -> Grid:
    """The images that the ids run through row by row: rows end where columns start over, whatever the numbers."""
    table = ids[:, :3].detach().to("cpu", torch.float64)
    picture, row, column = table.unbind(1)
    breaks = (picture.diff() != 0) | (row.diff() != 0) | (column.diff() < 0)
    starts = [0, *(breaks.nonzero()[:, 0] + 1).tolist(), len(table)]
    lengths = [stop - start for start, stop in itertools.pairwise(starts)]
    digits = (
        7 if torch.equal(table, table.bfloat16().double()) else 10 if torch.equal(table, table.half().double()) else 22
    )
    grids: list[tuple[int, int, int]] = []
    first = 0
    while first < len(lengths):
        start, width = starts[first], lengths[first]
        alike = next((i for i, length in enumerate(lengths[first:]) if length != width), len(lengths) - first)
        block = table[start : start + alike * width].unflatten(0, (alike, width))
        same = (block[..., 0] == block[0, 0, 0]).all(1) & (block[..., 2] == block[0, :, 2]).all(1)
        same[1:] &= _one_step_on(block[:, 0, 1], block[0, :, 2], digits)
        height = int(same.long().cumprod(0).sum())
        after = first + height
        cut = after < len(lengths) and lengths[after] < width and _goes_on(table, starts[after], start, width, height)
        if cut or not table[start].isfinite().all():
            raise ValueError(_NO_IMAGES.format(dtype=str(ids.dtype).removeprefix("torch.")))
        grids.append((1, height, width))
        first = after
    return grids[0][1:] if len(grids) == 1 else tuple(grids)


_NO_IMAGES = (
    "img_ids do not run through whole images row by row, as far as {dtype} tells: pass the ids that the pipeline "
    "makes, in float32."
)


def _one_step_on(rows: torch.Tensor, columns: torch.Tensor, digits: int) -> torch.Tensor:
    """[H - 1]: whether each row lies a step below the one before it, as far as `digits` binary digits tell."""
    steps, along = rows.diff(), columns.diff()
    unit = next((up.median() for up in (steps[steps > 0], along[along > 0]) if len(up)), rows.new_zeros(()))
    spacing = torch.exp2(rows[1:].abs().clamp(min=2.0**-6).log2().floor() - digits)
    return (steps <= 1.5 * unit + 2 * spacing) & ((steps > 0) | ((steps == 0) & (2 * spacing >= unit) & (unit > 0)))


def _goes_on(table: torch.Tensor, at: int, start: int, width: int, height: int) -> bool:
    """Whether a shorter row at `at` is the beginning of the image's next one: the ids end within it."""
    column = table[start : start + width, 2]
    ahead = table[at : at + width]
    own = ahead[(ahead[:, 0] == table[at, 0]) & (ahead[:, 1] == table[at, 1])][:, 2]
    whole = torch.equal(own, column[: len(own)]) and bool(table[at, 0] == table[start, 0])
    return whole and bool(table[at, 1] >= table[start + (height - 1) * width, 1])


_read_outside_the_graph = torch.compiler.disable(_grid_from_ids)


def _agree(ids: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Whether the ids run through the grid row by row, as a tensor on their device; rounded ids do too."""
    pictures = images_of(grid)
    agree = ids.new_ones((), dtype=torch.bool)
    for part, (_, height, width) in zip(ids.split([math.prod(p) for p in pictures]), pictures, strict=True):
        row, column = part[:, 1].unflatten(0, (height, width)), part[:, 2].unflatten(0, (height, width))
        agree = agree & (row == row[:, :1]).all() & (column == column[:1]).all()
        for ids_along in (row[:, 0], column[0]):
            agree = (
                agree
                & (ids_along.diff() >= 0).all()
                & (ids_along[-1:] - ids_along[:1] >= (len(ids_along) > 1) * 1e-6).all()
            )
    return agree


def image_shapes(module: Any, img_shapes: Sequence[Any]) -> TokenLayout:
    """QwenImage: for each sample a (frames, height, width), or a list of them where there are reference images."""
    samples = [(sample,) if isinstance(sample[0], int) else tuple(map(tuple, sample)) for sample in img_shapes]
    return _one_size([tuple(tuple(shape) for shape in sample) for sample in samples])


def latent_list(module: Any, x: Sequence[Any], patch_size: int | None, f_patch_size: int | None) -> TokenLayout:
    """Z-Image: a list of [C, frames, height, width], one per sample."""
    if isinstance(x[0], (list, tuple)):
        return TokenLayout(None, softmax="several images and captions in one sequence")
    patch, in_time = patch_size or 2, f_patch_size or 1
    return _one_size([((z.shape[1] // in_time, z.shape[2] // patch, z.shape[3] // patch),) for z in x])


def patches_or_sizes(module: Any, hidden_states: torch.Tensor, img_sizes: Any) -> TokenLayout:
    """HiDream: [B, C, height, width], or patches with each sample's (height, width) in `img_sizes`."""
    if hidden_states.dim() == 4:
        return TokenLayout(patches(module, hidden_states))
    sizes = img_sizes.tolist() if isinstance(img_sizes, torch.Tensor) else img_sizes
    return _one_size([((1, int(size[0]), int(size[1])),) for size in sizes])


def _one_size(samples: list[tuple[tuple[int, int, int], ...]]) -> TokenLayout:
    """A batch's images, which must have one size for all samples: a convolution on a ragged batch is none."""
    if any(sample != samples[0] for sample in samples):
        return TokenLayout(None, softmax=SIZES_DIFFER)
    pictures = samples[0]
    return TokenLayout(pictures[0] if len(pictures) == 1 else pictures)


def unmasked_patches(module: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> TokenLayout:
    """CogView4, whose text mask diffusers adds to the scores as ones and zeros, which masks nothing."""
    why = "attention_mask is given, which diffusers adds to this model's scores as 0 and 1 instead of masking"
    return TokenLayout(patches(module, hidden_states), softmax=None if attention_mask is None else why)


def causal_text_patches(module: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> TokenLayout:
    """OmniGen: a mask [B, N, N], causal in the text, the same row for every image token at the end."""
    grid = patches(module, hidden_states)
    if attention_mask is None:
        return TokenLayout(grid)
    mask = attention_mask.to(torch.bool)
    if mask.dim() != 3:
        return TokenLayout(grid, key_mask=mask)
    last = mask[:, -1:]
    # Looked at only where looking costs no graph: reading a tensor's value ends a compiled one.
    if torch.compiler.is_compiling() or not bool((mask[:, -count_tokens(grid) :] == last).all()):
        return TokenLayout(grid, softmax="its attention_mask differs from one image token to the next, or is compiled")
    return TokenLayout(grid, key_mask=last[:, 0])


def ragged_patches(module: Any, hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor) -> TokenLayout:
    """Lumina2: each sample's image follows its own number of text tokens."""
    grid = patches(module, hidden_states)
    lengths = encoder_attention_mask.sum(dim=1)
    if len(lengths) == 1 or (not torch.compiler.is_compiling() and bool((lengths == lengths[0]).all())):
        return TokenLayout(grid)
    return TokenLayout(grid, starts=lengths)


# ---- images ----


def pixels_alone(module: Any, x: torch.Tensor, context: torch.Tensor | None) -> TokenLayout:
    """As `pixels`, for a block that attends over the image where it is given no text."""
    return TokenLayout(pixels(module, x), softmax=None if context is None else "cross-attention")


def all_patches(module: Any, hidden_states: torch.Tensor) -> TokenLayout:
    """As `patches`, for Lumina-Next, which masks nothing with a mask [B, heads, N, N]."""
    grid = patches(module, hidden_states)
    return TokenLayout(grid, key_mask=torch.ones(1, count_tokens(grid), dtype=torch.bool, device=hidden_states.device))


def sized_patches(module: Any, hidden_states: torch.Tensor) -> Grid:
    """[B, C, height, width] or [B, C, frames, height, width], a patch size for each of the last sizes."""
    sizes = [size // patch for size, patch in zip(hidden_states.shape[2:], module.config.patch_size, strict=True)]
    return (sizes[0], sizes[1]) if len(sizes) == 2 else (sizes[0], sizes[1], sizes[2])


def both_position_ids(module: Any, img_ids: torch.Tensor, image_cond_ids: torch.Tensor | None) -> TokenLayout:
    """Flux3: the image, then reference images where there are any."""
    return position_ids(module, img_ids if image_cond_ids is None else torch.cat([img_ids, image_cond_ids], dim=-2))


def last_position_ids(module: Any, ids: torch.Tensor, hidden_states: torch.Tensor) -> TokenLayout:
    """Krea 2: position ids of the text, then of the image's tokens [B, N, C]."""
    return position_ids(module, ids[..., ids.shape[-2] - hidden_states.shape[1] :, :])


def indicated_position_ids(
    module: Any, ids: torch.Tensor, indicator: torch.Tensor, segment_ids: torch.Tensor
) -> TokenLayout:
    """Ideogram 4: [padding, text, image], the tokens' kinds in `indicator`; attention within equal segments."""
    pinned: Grid | None = getattr(module, PINNED, None)
    if torch.compiler.is_compiling() and pinned is not None:
        picture = count_tokens(pinned)
    else:
        picture = _count_outside_the_graph(indicator)
    reading = position_ids(module, ids[:, ids.shape[1] - picture :])
    reading.key_mask = segment_ids == segment_ids[:, -1:]
    return reading


@torch.compiler.disable
def _count_outside_the_graph(indicator: torch.Tensor) -> int:
    """How many tokens are of the last one's kind."""
    return int((indicator[0] == indicator[0, -1]).sum())


def target_shape(
    module: Any, img_shapes: Sequence[Any], img_mask: torch.Tensor, hidden_states: torch.Tensor
) -> TokenLayout:
    """QwenImage 2.1: the last image of each sample; text and references before it are calls of their own."""
    reading = _one_size([(tuple(sample[-1]),) for sample in img_shapes])
    # Where `img_mask` is set, four image tokens take the place of one.
    reading.keys = img_mask.shape[1] + hidden_states.shape[1] - hidden_states.shape[1] // 4
    return reading


def patches_around_gist(
    module: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None,
    context_latents: Sequence[torch.Tensor] | None,
) -> TokenLayout:
    """Bria Fibo 2: image and references after the gist of the prompt, before it where its length differs."""
    grids = tuple((1, *patches(module, latents)) for latents in (hidden_states, *(context_latents or ())))
    grid: Grid = grids[0][1:] if len(grids) == 1 else grids
    return TokenLayout(
        grid, starts=None if encoder_attention_mask is None else _after_gist(module, encoder_attention_mask)
    )


@torch.compiler.disable  # counts are read from the device, as the model itself does
def _after_gist(module: Any, mask: torch.Tensor) -> torch.Tensor | None:
    """[B] zeros where the images stand first, since samples differ in their gist; None where they stand last."""
    config, home = module.config, inspect.getmodule(type(module))
    lengths = mask.sum(dim=1)
    counts: list[int] = home.compute_gist_count(  # type: ignore[union-attr]
        lengths.tolist(),
        min_gist=config.min_num_gist_tokens,
        max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len,
        max_text_len=config.gist_max_text_len,
    )
    return torch.zeros_like(lengths) if min(counts) < max(counts) else None


# ---- videos ----


def stacked_video(module: Any, hidden_states: torch.Tensor) -> Grid:
    """JoyImage: as `video`, or [B, images, C, frames, height, width]."""
    frames, height, width = hidden_states.shape[-3:]
    return _video(module, frames * (hidden_states.shape[1] if hidden_states.dim() == 6 else 1), height, width)


def channels_last_video(module: Any, hidden_states: torch.Tensor) -> Grid:
    """[B, frames, height, width, C] in patches."""
    return _video(module, hidden_states.shape[1], hidden_states.shape[2], hidden_states.shape[3])


def dense_channels_last_video(module: Any, hidden_states: torch.Tensor, sparse_params: Any) -> TokenLayout:
    """Kandinsky 5, which may be told to attend sparsely."""
    why = "sparse attention (NABLA) chooses its blocks by content"
    return TokenLayout(channels_last_video(module, hidden_states), softmax=None if sparse_params is None else why)


def packed_video(module: Any, shapes: Sequence[Sequence[int]], und_len: int, sequence_length: int) -> TokenLayout:
    """Cosmos 3: a causal prompt, a call of its own, then videos, whose shapes in tokens are given."""
    pictures = tuple((int(shape[0]), int(shape[1]), int(shape[2])) for shape in shapes)
    grid: Grid = pictures[0] if len(pictures) == 1 else pictures
    other = sequence_length - und_len != count_tokens(grid)
    why = "sound or action tokens stand between the video's"
    return TokenLayout(grid, keys=sequence_length, softmax=why if other else None)


def packed_position_ids(module: Any, ids: torch.Tensor, video_indices: torch.Tensor) -> TokenLayout:
    """MiniMax H3: [text, references, audio, video], positions [N, (time, row, column)] of all of them."""
    if not torch.compiler.is_compiling():
        return _packed(ids, video_indices)
    pinned: Grid | None = getattr(module, PINNED, None)
    if pinned is None or count_tokens(pinned) > video_indices.shape[0]:
        return _packed_outside_the_graph(ids, video_indices)
    frames = tuple((1, height, width) for count, height, width in images_of(pinned) for _ in range(count))
    torch._assert_async(_agree(ids[ids.shape[0] - count_tokens(pinned) :], frames), _NOT_PINNED)
    return TokenLayout(pinned)


def _packed(ids: torch.Tensor, video_indices: torch.Tensor) -> TokenLayout:
    """The video after the last gap in its indices; each time is a frame."""
    gaps = (video_indices.diff() != 1).nonzero()
    last = video_indices[int(gaps[-1]) + 1 if len(gaps) else 0 :]
    if int(last[-1]) != ids.shape[0] - 1:
        raise ValueError("video_indices do not end with the sequence: pass those that the pipeline makes.")
    grid = _grid_from_ids(ids[int(last[0]) :])
    frames = set(images_of(grid))
    if len(frames) > 1:
        return TokenLayout(grid)
    _, height, width = frames.pop()
    return TokenLayout((len(last) // (height * width), height, width))


_packed_outside_the_graph = torch.compiler.disable(_packed)


def video_after_history(module: Any, hidden_states: torch.Tensor, *history: torch.Tensor | None) -> TokenLayout:
    """Helios: [B, C, frames, height, width] after long, middle and short history, in ever finer patches.

    `history`: the short, middle and long latents, and their indices; one without indices is left out.
    """
    patch = module.config.patch_size
    short, middle, long = (
        None if latents is None or indices is None else _patched(latents, [size * times for size in patch])
        for latents, indices, times in zip(history[:3], history[3:], (1, 2, 4), strict=True)
    )
    parts = [part for part in (long, middle, short, _patched(hidden_states, patch)) if part is not None]
    return TokenLayout(parts[0] if len(parts) == 1 else tuple(parts))


def framepack(module: Any, hidden_states: torch.Tensor, *history: torch.Tensor | None) -> TokenLayout:
    """HunyuanVideo-Framepack: history in coarse patches, clean latents, then the video; text after them.

    `history`: the clean latents, those at half and at quarter size, and their indices.
    """
    embedder = module.clean_x_embedder
    clean, half, quarter = (
        None if latents is None or indices is None else _patched(latents, patch.kernel_size)
        for latents, indices, patch in zip(
            history[:3], history[3:], (embedder.proj, embedder.proj_2x, embedder.proj_4x), strict=True
        )
    )
    own = _patched(hidden_states, (module.config.patch_size_t, *2 * (module.config.patch_size,)))
    parts = [part for part in (quarter, half, clean, own) if part is not None]
    return TokenLayout(parts[0] if len(parts) == 1 else tuple(parts))


def _patched(latents: torch.Tensor, patch: Sequence[int]) -> tuple[int, int, int]:
    """[B, C, frames, height, width] in patches, padded to whole ones."""
    frames, height, width = (-(-size // step) for size, step in zip(latents.shape[-3:], patch, strict=True))
    return frames, height, width


def video_before_sorted_text(
    module: Any,
    hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor,
    encoder_attention_mask_2: torch.Tensor,
    image_embeds: torch.Tensor,
) -> TokenLayout:
    """HunyuanVideo 1.5: image and text tokens sorted so that those that count stand first; an N x N mask of them."""
    grid = video(module, hidden_states)
    images = image_embeds.shape[1]
    counting = (
        encoder_attention_mask.bool().sum(1) + encoder_attention_mask_2.bool().sum(1) + images * image_embeds.any()
    )
    others = encoder_attention_mask.shape[1] + encoder_attention_mask_2.shape[1] + images
    index = torch.arange(count_tokens(grid) + others, device=counting.device)
    return TokenLayout(grid, key_mask=index < count_tokens(grid) + counting[:, None])


# ---- audio ----


def tokens_in_time(module: Any, hidden_states: torch.Tensor | None) -> TokenLayout:
    """[B, length, C]: a signal as an image of one row; None where the pass has none."""
    return TokenLayout(None if hidden_states is None else (1, hidden_states.shape[1]))


def patches_in_time(module: Any, hidden_states: torch.Tensor) -> Grid:
    """[B, length, C] in patches, padded to whole ones."""
    return 1, -(-hidden_states.shape[1] // module.patch_size)


def signal_patches(module: Any, hidden_states: torch.Tensor) -> Grid:
    """[B, C, length] in patches."""
    return 1, hidden_states.shape[-1] // module.config.patch_size
