"""Whether two sets of images are of the same prompts and seeds, image by image of one name."""

from __future__ import annotations

from typing import Any

from ..errors import InputError, RefusedComparison
from ..images import ImageReader, ImageSet, check_headers, load_captions

# What decides an image besides the model, as `generate` writes it into each PNG.
_SAME = ("prompt", "seed", "generator_seed", "negative_prompt", "steps", "guidance")
_REMEDY = "draw both sets from the same prompts and seeds (flatten-eval generate)"


def require_pairs(original: ImageSet, converted: ImageSet, smallest: int) -> list[str]:
    """Checks headers, names, sizes, and what the images say of their prompts and seeds.

    Args:
        smallest: pixels that each side needs.

    Returns:
        Warnings: what the images do not say.

    Raises:
        InputError: unreadable headers, or pictures too small.
        RefusedComparison: names, sizes, prompts, seeds or settings of a pair differ.
    """
    only = sorted(set(original.names) ^ set(converted.names))
    both = f"{original.path} and {converted.path}"
    if only:
        lonely = f"{len(only)} images have no partner of the same name (first: {only[0]})"
        raise RefusedComparison(f"{both} do not pair up: {lonely}; {_REMEDY}")
    for images in (original, converted):
        for width, height in sorted(check_headers(images)):
            if min(width, height) < smallest:
                shown = f"{smallest}x{smallest}, not {width}x{height}"
                raise InputError(f"{images.path}: these metrics need images of at least {shown}")
    silent: list[int] = []
    converted_already = set()
    with ImageReader(original) as first, ImageReader(converted) as second:
        for index, name in enumerate(original.names):
            sizes = ["{}x{}".format(*reader.size(name)) for reader in (first, second)]
            _require_equal(both, name, "size", *sizes)
            one, other = first.settings(name), second.settings(name)
            if one is None or other is None:
                silent.append(index)
                continue
            for key in _SAME:
                _require_equal(both, name, key, one.get(key), other.get(key))
            converted_already |= {one["adapter"]} if one.get("adapter") is not None else set()
    warnings = _captions(original, converted, silent) if silent else []
    if converted_already:
        warnings.append(
            f"{original.path.name}: drawn with the adapter {sorted(map(str, converted_already))[0]}: not the original"
        )
    return warnings


def _captions(original: ImageSet, converted: ImageSet, silent: list[int]) -> list[str]:
    """Compares the captions of the images at these indices, which have no settings in them."""
    share = f"{len(silent)} of {len(original)} pairs do not say their seeds"
    try:
        one, other = load_captions(original, None), load_captions(converted, None)
    except InputError:
        return [f"{share} or prompts: they are paired by name alone"]
    both = f"{original.path} and {converted.path}"
    for index in silent:
        _require_equal(both, original.names[index], "caption", one[index], other[index])
    return [f"{share}: they are paired by name and caption"]


def _require_equal(both: str, name: str, what: str, one: Any, other: Any) -> None:
    if one != other:
        shown = [("the pipeline's own" if value is None else repr(value)[:80]) for value in (one, other)]
        raise RefusedComparison(
            f"{both} do not pair up: {name}: {what} is {shown[0]} in one and {shown[1]} in the other; {_REMEDY}"
        )
