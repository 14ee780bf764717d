"""The embedded pipeline: small, offline, really trained, and convertible."""

import pytest
import torch

from flatten_diffusion import linearize, restore
from flatten_diffusion.scenes import fact_accuracy, load_scenes_pipeline, sample_captions
from flatten_diffusion.scenes.pipeline import PIPELINE_DIR


@pytest.fixture(scope="module")
def pipe():
    loaded = load_scenes_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe, captions, steps=20):
    generator = [torch.Generator().manual_seed(index) for index in range(len(captions))]
    return pipe(captions, num_inference_steps=steps, guidance_scale=2.0, generator=generator).images


def test_it_is_small_and_has_a_model_card():
    files = [path for path in PIPELINE_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25 * 2**20
    assert all(path.suffix in {".json", ".safetensors", ".txt", ".md"} for path in files)
    assert (PIPELINE_DIR / "README.md").is_file()


def test_it_draws_unseen_captions(pipe):
    captions = sample_captions(12, seed=4, held_out=True)
    images = draw(pipe, captions)
    assert images[0].size == (128, 128)
    held = [fact_accuracy(image, caption) for image, caption in zip(images, captions, strict=True)]
    # The value measured on 200 captions is in the model card; another picture's caption sets the floor.
    shuffled = [fact_accuracy(image, captions[index - 1]) for index, image in enumerate(images)]
    assert sum(held) / len(held) > 0.5
    assert sum(held) - sum(shuffled) > 0.2 * len(held)


def test_conversion_is_reversible_to_the_last_bit(pipe):
    captions = ["a red circle on a white background"]
    before = draw(pipe, captions, steps=2)[0].tobytes()
    adapter = linearize(pipe)
    assert draw(pipe, captions, steps=2)[0].tobytes() != before
    with adapter.disabled():
        assert draw(pipe, captions, steps=2)[0].tobytes() == before
    restore(pipe)
    assert draw(pipe, captions, steps=2)[0].tobytes() == before


def test_other_sizes_are_drawn(pipe):
    options = {"height": 96, "width": 160, "num_inference_steps": 2}
    assert pipe("a blue star on a gray background", **options).images[0].size == (160, 96)
