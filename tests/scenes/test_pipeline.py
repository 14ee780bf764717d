"""The embedded pipelines: small, offline, really trained, and convertible."""

import functools
import re

import numpy as np
import pytest
import torch

from flatten_diffusion import AdapterConfig, linearize, load_adapter, restore
from flatten_diffusion.adapter.convert import resolve_model
from flatten_diffusion.distill import Diffusion
from flatten_diffusion.distill.conditioning import encode_prompts, predict
from flatten_diffusion.scenes import (
    ADAPTER_DIR,
    PIPELINE_DIR,
    SD3_ADAPTER_DIR,
    SD3_PIPELINE_DIR,
    fact_accuracy,
    load_embedded,
    load_scenes_pipeline,
    load_sd3_scenes_pipeline,
    render,
    sample_captions,
)
from flatten_diffusion.scenes.latents import image_latents

FOLDERS = {"scenes": (PIPELINE_DIR, ADAPTER_DIR), "scenes-sd3": (SD3_PIPELINE_DIR, SD3_ADAPTER_DIR)}


@functools.cache
def load(name):
    loaded = load_embedded(name)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe, captions, steps=20, size=128):
    generator = [torch.Generator().manual_seed(index) for index in range(len(captions))]
    options = {"num_inference_steps": steps, "guidance_scale": 2.0, "height": size, "width": size}
    return pipe(captions, generator=generator, **options).images


@pytest.mark.parametrize("name", FOLDERS)
def test_it_is_small_and_has_a_model_card(name):
    folder, _ = FOLDERS[name]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert all(path.suffix in {".json", ".safetensors", ".txt", ".md"} for path in files)
    assert (folder / "README.md").is_file()


@pytest.mark.parametrize("folder", [folder for pair in FOLDERS.values() for folder in pair], ids=lambda path: path.name)
def test_nothing_that_ships_names_a_path_of_the_machine_it_was_made_on(folder):
    """No key that holds one, and no text like /root/runs or C:\\Users (a word, then a separator, after a root)."""
    absolute = re.compile(r"(?<![\w:/.])(?:/[\w.-]+/[\w.-]+|~/|[A-Za-z]:[\\\\/]+\w)")
    assert absolute.search('"/root/runs/vae"') and absolute.search("in /home/x.") and absolute.search('"C:\\\\Users"')
    texts = [path for path in folder.rglob("*") if path.suffix in {".json", ".md"} and path.name != "tokenizer.json"]
    assert len(texts) > 1
    for path in texts:
        content = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in content, path
        assert not absolute.search(content), (path, absolute.search(content))


# The values measured on 200 captions are in the model cards; another image's caption sets the floor.
@pytest.mark.parametrize(("name", "count", "steps", "least"), [("scenes", 12, 20, 0.75), ("scenes-sd3", 8, 12, 0.55)])
def test_it_draws_unseen_captions(name, count, steps, least):
    captions = sample_captions(count, seed=4, held_out=True)
    images = draw(load(name), captions, steps)
    assert images[0].size == (128, 128)
    held = [fact_accuracy(image, caption) for image, caption in zip(images, captions, strict=True)]
    shuffled = [fact_accuracy(image, captions[index - 1]) for index, image in enumerate(images)]
    assert sum(held) / len(held) > least
    assert sum(held) - sum(shuffled) > 0.2 * len(held)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("convert", [linearize, load_adapter])
def test_conversion_is_reversible_to_the_last_bit(name, convert):
    # Shipped adapters leave small calls to softmax.
    pipe, captions, size = load(name), ["a red circle on a white background"], {"scenes": 256, "scenes-sd3": 128}[name]
    before = draw(pipe, captions, steps=2, size=size)[0].tobytes()
    adapter = convert(pipe, *([FOLDERS[name][1]] if convert is load_adapter else []))
    assert draw(pipe, captions, steps=2, size=size)[0].tobytes() != before
    with adapter.disabled():
        assert draw(pipe, captions, steps=2, size=size)[0].tobytes() == before
    restore(pipe)
    assert draw(pipe, captions, steps=2, size=size)[0].tobytes() == before


# The share of the raw swap's distance that is left, at the size that each was distilled at.
@torch.no_grad()
@pytest.mark.parametrize(("name", "size", "layers", "most"), [("scenes", 256, 7, 0.5), ("scenes-sd3", 128, 6, 0.15)])
def test_its_distilled_adapter_predicts_what_the_original_does(name, size, layers, most):
    pipe = load(name)
    model = resolve_model(pipe)
    captions = sample_captions(8, seed=4, held_out=True, size=size)
    pictures = np.stack([np.asarray(render(caption, size, index)) for index, caption in enumerate(captions)])
    clean = image_latents(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.arange(50, 850, 100)
    noisy = Diffusion(pipe.scheduler).add_noise(clean, noise, timesteps)
    conditioning = encode_prompts(pipe, model, captions, (size, size))

    def prediction():
        return predict(model, model, noisy, timesteps, conditioning)

    original = prediction()
    adapter = load_adapter(pipe, FOLDERS[name][1])
    distilled = (prediction() - original).square().mean()
    restore(pipe)
    linearize(pipe, AdapterConfig(min_tokens=adapter.config.min_tokens))
    raw = (prediction() - original).square().mean()
    restore(pipe)
    assert len(adapter.layers) == layers
    assert 0 < distilled < most * raw


def test_other_sizes_are_drawn():
    options = {"height": 96, "width": 160, "num_inference_steps": 2}
    for name in FOLDERS:
        assert load(name)("a blue star on a gray background", **options).images[0].size == (160, 96)


def test_embedded_pipelines_go_by_name():
    assert type(load("scenes-sd3")) is type(load_sd3_scenes_pipeline())
    assert type(load("scenes")) is type(load_scenes_pipeline())
    with pytest.raises(ValueError, match="use scenes or scenes-sd3"):
        load_embedded("scenes-sdxl")
