"""The quickstart with the installed package alone: one small image, converted, and back to the last bit."""

from pathlib import Path

import torch

import flatten_diffusion
import flatten_eval
from flatten_diffusion import linearize, load_adapter, restore
from flatten_diffusion.scenes import ADAPTER_DIR, load_scenes_pipeline

for package in (flatten_diffusion, flatten_eval):
    assert "site-packages" in str(package.__file__), package.__file__
assert not list(Path.cwd().iterdir()), "the smoke test runs in an empty folder"
pipe = load_scenes_pipeline()
pipe.set_progress_bar_config(disable=True)


def draw() -> bytes:
    generator = torch.Generator().manual_seed(0)
    # At its native 128 pixels the adapter that ships leaves all to softmax.
    options = {"height": 256, "width": 256, "num_inference_steps": 2}
    image = pipe("a red circle on a white background", generator=generator, **options).images[0]
    assert image.size == (256, 256)
    return image.tobytes()


original = draw()
adapter = linearize(pipe)
assert adapter.layers and draw() != original
restore(pipe)
assert draw() == original
load_adapter(pipe, ADAPTER_DIR)
assert draw() != original
restore(pipe)
assert draw() == original
print("the wheel draws, converts and restores")
