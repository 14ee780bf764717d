"""The pyramid's settings: what they refuse, and as JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from flatten_diffusion import AdapterConfig
from flatten_diffusion.mixers import PyramidConfig, mixer_config
from flatten_diffusion.ops.pyramid import keys_per_query


def test_stages_come_back_from_json() -> None:
    config = AdapterConfig(mixer=PyramidConfig(window=4, opened=(3, 2), kernel_size=5))
    text = json.dumps(config.to_dict())
    assert '"opened": [3, 2]' in text and AdapterConfig.from_dict(json.loads(text)) == config
    assert mixer_config({"name": "pyramid", "opened": []}) == PyramidConfig(opened=())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"window": 64}, "window is 64: pass a whole number, at least 1 and at most 32"),
        ({"ring": 3}, "ring is 3 and the window 8: pass one of its divisors"),
        ({"far": 3}, "far is 3 and the window 8"),
        ({"budget": 5000}, "budget is 5000"),
        ({"opened": 8}, "opened is 8: pass up to 8 whole numbers from 1 to 256 in a tuple"),
        ({"opened": (0,)}, "opened is "),
        ({"opened": (1,) * 9}, "opened is "),
        ({"opened": ["x" * 1000]}, "opened is "),
        ({"opened_cell": 1}, "Unknown setting 'opened_cell'"),
        ({"kernel_size": 2}, "kernel_size is 2: pass an odd number up to 31"),
        ({"kernel_size": True}, "kernel_size is True"),
    ],
)
def test_refuses_in_one_line(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(named)}") as error:
        mixer_config({"name": "pyramid", **settings})
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_the_defaults_see_few_keys_of_a_large_image() -> None:
    assert keys_per_query([(1, 128, 128)], PyramidConfig()) <= 450
