from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flatten_diffusion import linearize
from flatten_diffusion.distill import CacheSettings, LatentCache, build_cache, image_folder, prompts_as_examples
from flatten_diffusion.distill.buckets import to_pixels
from flatten_diffusion.distill.cache import fingerprint

from .tiny import drawn_cache, tiny_pipeline

SETTINGS = CacheSettings(((32, 32), (16, 48)), shard_size=3, batch_size=2)


def colour_card(path: Path, index: int, size: tuple[int, int] = (32, 32)) -> None:
    Image.new("RGB", size, (30 * index, 255 - 30 * index, 90)).save(path)
    path.with_suffix(".txt").write_text(f"card {index}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for index in range(5):
        colour_card(tmp_path / "data" / f"{index}.png", index, (90, 30) if index == 3 else (32, 32))
    return tmp_path / "data"


def build(pipeline: Any, folder: Path, cache: Path, **processes: int) -> LatentCache:
    return build_cache(pipeline, pipeline.unet, image_folder(folder), cache, SETTINGS, **processes)


def rows(cache: LatentCache) -> list[dict[str, torch.Tensor]]:
    return [cache[index] for index in range(len(cache))]


def equal(one: LatentCache, other: LatentCache) -> bool:
    return one.sizes == other.sizes and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(rows(one), rows(other), strict=True)
    )


def test_holds_what_the_pipeline_would_compute(folder: Path, tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    cache = build(pipeline, folder, tmp_path / "cache")
    assert cache.sizes == [(32, 32), (32, 32), (32, 32), (16, 48), (32, 32)]
    assert cache.broken == []
    for index, size in ((1, (32, 32)), (3, (16, 48))):
        with torch.no_grad():
            pixels = to_pixels(Image.open(folder / f"{index}.png"), size)[None]
            latents = pipeline.vae.encode(pixels).latent_dist.mode()[0] * 0.5
            prompt = pipeline.encode_prompt(f"card {index}", "cpu", 1, False)[0][0]
            empty = pipeline.encode_prompt("", "cpu", 1, False)[0]
        item = cache[index]
        assert item["latents"].shape == (4, size[0] // 4, size[1] // 4)
        assert torch.allclose(item["latents"], latents, atol=2e-3)  # stored in half precision
        assert torch.allclose(item["encoder_hidden_states"], prompt, atol=4e-3)
        assert torch.allclose(cache.null[size]["encoder_hidden_states"].float(), empty, atol=4e-3)


def test_is_reused_and_goes_stale(folder: Path, tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    first = build(pipeline, folder, tmp_path / "cache")
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert build(tiny_pipeline(), folder, tmp_path / "cache").folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times

    changes = [
        lambda: (folder / "0.txt").write_text("another caption"),
        lambda: colour_card(folder / "1.png", 7),
        lambda: os.remove(folder / "4.png"),
        lambda: pipeline.vae.encoder.conv_in.weight.data.mul_(1.01),
        lambda: pipeline.text_encoder.get_input_embeddings().weight.data.mul_(1.01),
        lambda: pipeline.text_encoder.get_input_embeddings().weight.data[7].mul_(1.01),
        lambda: pipeline.vae.register_to_config(scaling_factor=0.7),
        lambda: pipeline.vae.register_to_config(shift_factor=0.1),
        lambda: setattr(pipeline.tokenizer, "model_max_length", 12),
        lambda: pipeline.tokenizer.add_tokens("<card>"),
    ]
    seen = {first.folder}
    for change in changes:
        change()
        now = build(pipeline, folder, tmp_path / "cache").folder
        assert now not in seen
        seen.add(now)
    examples = image_folder(folder)
    assert fingerprint(pipeline, pipeline.unet, examples, SETTINGS) != fingerprint(
        pipeline, pipeline.unet, examples, CacheSettings(((32, 32),))
    )


def test_a_lora_and_its_strength_make_another_cache(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    pipeline, examples, seen = tiny_pipeline(), image_folder(folder), set()
    seen.add(fingerprint(pipeline, pipeline.unet, examples, SETTINGS))
    pipeline.text_encoder = copy.deepcopy(pipeline.text_encoder)
    pipeline.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for strength in (1.0, 0.5):
        for part in pipeline.text_encoder.modules():
            if isinstance(part, peft.tuners.lora.LoraLayer):
                part.scaling["default"] = strength
        seen.add(fingerprint(pipeline, pipeline.unet, examples, SETTINGS))
    pipeline.text_encoder.disable_adapters()
    seen.add(fingerprint(pipeline, pipeline.unet, examples, SETTINGS))
    assert len(seen) == 4


def test_a_saved_pipeline_finds_its_cache_again(folder: Path, tmp_path: Path) -> None:
    pipeline, examples = tiny_pipeline(), [*image_folder(folder), *prompts_as_examples(["a"])]
    before = fingerprint(pipeline, pipeline.unet, examples, SETTINGS)
    pipeline.encode_prompt(["a red circle", "a"], "cpu", 1, False)  # leaves its mark on the tokenizer
    pipeline.save_pretrained(tmp_path / "moved")
    loaded = type(pipeline).from_pretrained(tmp_path / "moved")
    assert fingerprint(loaded, loaded.unet, examples, SETTINGS) == before


def test_offloaded_weights_are_not_taken_for_others(folder: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.vae = pipeline.vae.to("meta")
    with pytest.raises(ValueError, match="AutoencoderKL is offloaded"):
        fingerprint(pipeline, pipeline.unet, image_folder(folder), SETTINGS)


def test_a_converted_model_does_not_draw_its_own_data(folder: Path, tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    linearize(pipeline)
    with pytest.raises(ValueError, match="converted already"):
        build_cache(pipeline, pipeline.unet, prompts_as_examples(["a"]), tmp_path, SETTINGS)
    assert len(build(pipeline, folder, tmp_path)) == 5


def test_the_denoiser_matters_only_to_drawn_latents(folder: Path) -> None:
    pipeline = tiny_pipeline()
    pictures, drawn = image_folder(folder), prompts_as_examples(["a"])
    before = [fingerprint(pipeline, pipeline.unet, examples, SETTINGS) for examples in (pictures, drawn)]
    pipeline.unet.conv_in.weight.data.mul_(1.01)
    after = [fingerprint(pipeline, pipeline.unet, examples, SETTINGS) for examples in (pictures, drawn)]
    assert before[0] == after[0] and before[1] != after[1]


def test_broken_images_are_named_and_skipped(folder: Path, tmp_path: Path) -> None:
    (folder / "1.png").write_bytes(b"no image")
    (folder / "2.png").write_bytes((folder / "0.png").read_bytes()[:60])
    rows = [json.dumps({"file_name": f"{index}.png", "text": ""}) for index in range(7)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    cache = build(tiny_pipeline(), folder, tmp_path / "cache")
    assert len(cache) == 3
    assert [line.split(":")[0] for line in cache.broken] == ["1.png", "2.png", "5.png", "6.png"]


def test_nothing_usable_is_an_error(folder: Path, tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    for path in folder.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="None of the 5 images"):
        build(pipeline, folder, tmp_path / "cache")
    with pytest.raises(ValueError, match="no examples"):
        build_cache(pipeline, pipeline.unet, [], tmp_path / "cache", SETTINGS)


def test_processes_share_the_work_and_agree_with_one(folder: Path, tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    alone = build(pipeline, folder, tmp_path / "alone")
    examples = image_folder(folder)
    built: list[str] = []

    def other_process() -> None:  # what the second process does meanwhile
        if not built:
            built.append("once")
            build_cache(
                pipeline, pipeline.unet, examples, tmp_path / "both", SETTINGS, process_index=1, num_processes=2
            )

    shared = build_cache(
        pipeline, pipeline.unet, examples, tmp_path / "both", SETTINGS, num_processes=2, wait=other_process
    )
    assert equal(alone, shared)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "zeros"])
def test_a_killed_or_damaged_build_goes_on(folder: Path, tmp_path: Path, damage: str) -> None:
    pipeline = tiny_pipeline()
    whole = build(pipeline, folder, tmp_path / "cache")
    first, second = sorted(whole.folder.glob("shard-*"))
    kept = first.stat().st_mtime_ns
    data = second.read_bytes()
    flipped = data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
    second.write_bytes({"truncated": data[:-10], "flipped": flipped, "zeros": data[:-600] + bytes(600)}[damage])
    assert second.read_bytes() != data
    (whole.folder / "null.safetensors").unlink()
    again = build(pipeline, folder, tmp_path / "cache")
    assert first.stat().st_mtime_ns == kept
    assert equal(whole, again) and again.identity == whole.identity
    assert not list(whole.folder.glob("*.partial")) and not list(whole.folder.glob(".*"))


def test_the_teacher_draws_for_prompts(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    cache = drawn_cache(pipeline, tmp_path, count=5, buckets=((32, 32), (16, 48)))
    assert cache.sizes == [(32, 32), (16, 48), (32, 32), (16, 48), (32, 32)]
    alone = pipeline(
        "two green stars",
        num_inference_steps=1,
        guidance_scale=3.0,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(2),
        output_type="latent",
    ).images[0]
    assert torch.allclose(cache[2]["latents"], alone, rtol=2e-3, atol=2e-3)


def test_images_turned_by_their_exif_go_to_the_bucket_they_are_seen_in(folder: Path, tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 90))
    image.getexif()[0x0112] = 6  # to be shown lying
    image.save(folder / "0.png", exif=image.getexif())
    assert build(tiny_pipeline(), folder, tmp_path / "cache").sizes[0] == (16, 48)


@pytest.mark.parametrize("wrong", [{"buckets": ((32, 10**5),)}, {"draw_steps": 0}, {"guidance_scale": float("nan")}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="up to 16384|draw_steps is 0|guidance_scale is nan"):
        CacheSettings(**{"buckets": ((32, 32),), **wrong})


def test_split_keeps_every_example_once(tmp_path: Path) -> None:
    cache = drawn_cache(tiny_pipeline(), tmp_path, count=10)
    train, held_out = cache.split(3)
    assert (len(train), len(held_out)) == (7, 3)
    both = [item["latents"] for part in (train, held_out) for item in rows(part)]
    assert len({tensor.sum().item() for tensor in both}) == 10
    for bad in (0, 10):
        with pytest.raises(ValueError, match="held-out"):
            cache.split(bad)
