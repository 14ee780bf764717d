from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from flatten_diffusion.highres import HighRes, staged_sizes

TWO = [(32, 32), (64, 64)]


@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        ((4096, 4096), [(1024, 1024), (2048, 2048), (4096, 4096)]),
        ((3072, 3072), [(1024, 1024), (2048, 2048), (3072, 3072)]),  # 1.5 is left
        ((1536, 1536), [(1024, 1024), (1536, 1536)]),
        ((2304, 2304), [(1024, 1024), (2304, 2304)]),  # 1.125 is not worth a stage
        ((1088, 1088), [(1088, 1088)]),
        ((512, 512), [(512, 512)]),
        ((2048, 4096), [(720, 1456), (1440, 2912), (2048, 4096)]),
    ],
    ids=str,
)
def test_the_way_to_a_target(target: tuple[int, int], sizes: list[tuple[int, int]]) -> None:
    assert staged_sizes(target, (1024, 1024), 16) == sizes


@pytest.mark.parametrize("height", range(64, 2048, 48))
def test_stages_grow_by_no_more_than_two_and_a_half(height: int) -> None:
    sizes = staged_sizes((height, 640), (64, 64), 8)
    for before, after in pairwise(sizes):
        assert before[0] <= after[0] and before[1] <= after[1] and before != after
        assert (after[0] * after[1]) / (before[0] * before[1]) < 2.5**2 * 1.1
    assert sizes[-1] == (height, 640)


def test_a_target_too_narrow() -> None:
    with pytest.raises(ValueError, match="too narrow"):
        staged_sizes((8, 65536), (64, 64), 8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "either sizes"),
        ({"sizes": TWO, "target": (64, 64)}, "either sizes"),
        ({"sizes": []}, "sizes is"),
        ({"sizes": [(32, 32), (32,)]}, "height, width"),
        ({"sizes": [(32, 0)]}, "whole numbers"),
        ({"sizes": [(32, 32.0)]}, "whole numbers"),
        ({"sizes": [(32, 10**6)]}, "whole numbers"),
        ({"sizes": [(64, 64), (32, 128)]}, "stage grow"),
        ({"sizes": [(64, 64), (64, 64)]}, "stage grow"),
        ({"target": 512}, "target holds"),
        ({"sizes": TWO, "steps": 0}, "steps is 0"),
        ({"sizes": TWO, "strength": 0}, "strength is 0"),
        ({"sizes": TWO, "strength": 1.5}, "strength is 1.5"),
        ({"sizes": TWO, "strength": float("nan")}, "strength is nan"),
        ({"sizes": TWO, "strength": "much"}, "strength is 'much'"),
        ({"sizes": TWO, "strength": (0.5, 0.5)}, "2 numbers for 1 later"),
        ({"sizes": TWO, "strength": 0.05, "steps": 10}, "is no step"),
        ({"sizes": TWO, "upsample": "fourier"}, "pixel, latent"),
        ({"sizes": TWO, "tile": 64, "tiled_vae": False}, "leave one"),
        ({"sizes": TWO, "tiled_vae": 1}, "True or False"),
        ({"sizes": TWO, "feed_forward_chunk": -1}, "feed_forward_chunk is -1"),
        ({"sizes": TWO, "time_shift": 0}, "time_shift is 0"),
        ({"sizes": TWO, "time_shift": "far"}, "time_shift is 'far'"),
        ({"sizes": TWO, "rotary_scaling": "yarn"}, "rotary_scaling is 'yarn'"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        HighRes(**options)
    assert "\n" not in str(refused.value)


def test_lists_become_tuples_and_settings_hash_and_go_to_json() -> None:
    settings = HighRes(sizes=[[32, 32], [64, 64], [128, 128]], strength=[0.6, 0.3])  # type: ignore[list-item]
    assert settings == HighRes(sizes=((32, 32), (64, 64), (128, 128)), strength=(0.6, 0.3))
    assert len({settings}) == 1
    assert settings.to_dict()["sizes"] == [[32, 32], [64, 64], [128, 128]]
    assert [settings.strength_of(stage, 3) for stage in (1, 2, 3)] == [1.0, 0.6, 0.3]
