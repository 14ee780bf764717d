"""The training script of the embedded pipeline, run whole at a toy size: it ends, resumes, and refuses wrong use."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", minversion="5", reason="the tokenizer is built with transformers 5")
from eval.experiments import train_scenes


def run(*arguments):
    train_scenes.main([*map(str, arguments)])


def toy(folder, *more):
    sizes = ["--resolution", 32, "--vae_crop", 32, "--num_scenes", 24, "--vae_batch_size", 2, "--train_batch_size", 2]
    steps = ["--vae_train_steps", 3, "--checkpointing_steps", 2, "--validation_steps", 100]
    return ["--output_dir", folder, *sizes, *steps, *more]


def test_all_stages_leave_a_pipeline_that_loads_and_draws(tmp_path):
    from diffusers import StableDiffusionPipeline

    run(*toy(tmp_path, "--max_train_steps", 2, "--default_size", 64))
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "export", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle on a white background", num_inference_steps=2).images[0].size == (64, 64)
    assert not list(tmp_path.glob(".*.tmp"))
    assert (tmp_path / "vae-checkpoints" / "checkpoint-2").is_dir()


def test_a_second_run_continues_from_the_newest_checkpoint(tmp_path):
    run(*toy(tmp_path, "--max_train_steps", 2, "--stages", "vae,denoiser"))
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 2
    latents = (tmp_path / "latents-32x32.safetensors").read_bytes()
    for file in (tmp_path / "pipeline").rglob("*"):
        if file.is_file():
            file.unlink()
    run(*toy(tmp_path, "--max_train_steps", 4, "--stages", "denoiser"))
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 4
    assert (tmp_path / "latents-32x32.safetensors").read_bytes() == latents
    assert sorted(path.name for path in (tmp_path / "denoiser-checkpoints").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_the_joint_architecture_goes_on_from_a_smaller_one(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    first, second = tmp_path / "first", tmp_path / "second"
    joint = ["--architecture", "sd3", "--max_train_steps", 2]
    run(*toy(first, *joint, "--position_spacing", 2))
    larger = ["--resolution", 64, "--stages", "denoiser", "--initial_pipeline", first / "pipeline"]
    run(*toy(second, *joint, *larger))
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(second / "export", torch_dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle on a white background", num_inference_steps=2).images[0].size == (64, 64)
    weights = Path("pipeline", "transformer", "diffusion_pytorch_model.safetensors")
    started, ended = load_file(first / weights), load_file(second / weights)
    moved = (started["pos_embed.proj.weight"] - ended["pos_embed.proj.weight"]).abs().max()
    assert 0 < moved < 0.01  # two small steps on
    assert not torch.allclose(started["pos_embed.pos_embed"], ended["pos_embed.pos_embed"])


def test_damaged_checkpoints_and_latents_end_in_one_line(tmp_path):
    run(*toy(tmp_path, "--max_train_steps", 2, "--stages", "denoiser"))
    (tmp_path / "pipeline").rename(tmp_path / "done")
    again = toy(tmp_path, "--max_train_steps", 4, "--stages", "denoiser")
    weights = tmp_path / "denoiser-checkpoints" / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"checkpoint-2: cannot be read \(.*\): remove it") as raised:
        run(*again)
    assert "\n" not in str(raised.value)
    latents = tmp_path / "latents-32x32.safetensors"
    latents.write_bytes(latents.read_bytes()[:500])
    with pytest.raises(SystemExit, match=r"latents-32x32.safetensors: cannot be read \(.*\): remove it to redraw"):
        run(*again)


def test_several_sizes_are_learned_in_buckets(tmp_path):
    buckets = ["--buckets", "32:2:8:1", "64x32:1:6:4:0.3"]
    run(*toy(tmp_path, "--max_train_steps", 6, "--stages", "denoiser", *buckets))
    shapes = [load_file(tmp_path / f"latents-{name}.safetensors")["latents"].shape for name in ("32x32", "64x32")]
    assert [tuple(shape) for shape in shapes] == [(8, 12, 4, 4), (6, 12, 4, 8)]
    chosen = [train_scenes.Bucket.parse(text) for text in buckets[1:]]
    drawn = [train_scenes.draw_bucket(chosen, share, 0, step) for share in (0.0, 0.29, 0.3) for step in range(50)]
    assert not any(drawn[:100]) and 25 < sum(drawn[100:]) < 50
    gone = [train_scenes.Bucket.parse(text) for text in ("32:2:8:1", "64:1:6:4:0:0.3")]
    assert any(train_scenes.draw_bucket(gone, 0.2, 0, step) for step in range(50))
    assert not any(train_scenes.draw_bucket(gone, 0.3, 0, step) for step in range(50))
    assert drawn[100:] == [train_scenes.draw_bucket(chosen, 0.9, 0, step) for step in range(50)]


def test_larger_pictures_are_learned_from_more_noise():
    diffusion = train_scenes.Diffusion(train_scenes.build_pipeline(32).scheduler)
    torch.manual_seed(0)
    means = [train_scenes.draw_timesteps(diffusion, 4000, side).float().mean() for side in (128, 256, 512)]
    # t = u^p has the mean 1 / (1 + p), here with p = 0.6, 0.455 and 0.345.
    assert torch.tensor(means) / 1000 == pytest.approx(torch.tensor([0.625, 0.687, 0.744]), abs=0.003)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--stages", "unet"],
        ["--resolution", 100],
        ["--default_size", 100],
        ["--vae_crop", 12],
        ["--initial_pipeline", "nowhere"],
        ["--buckets", "100:1:1:1"],
        ["--buckets", "128:1"],
        ["--buckets", "128:1:1:1:0.5"],
        ["--buckets", "128:1:1:1:0:0.5"],
        ["--buckets", "128:1:1:1:0.5:0.2"],
    ],
)
def test_wrong_use_is_refused_before_anything_runs(tmp_path, wrong, capsys):
    with pytest.raises(SystemExit) as raised:
        run("--output_dir", tmp_path / "out", *wrong)
    assert raised.value.code == 2
    assert wrong[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_either_stage_can_come_first(tmp_path):
    run(*toy(tmp_path, "--max_train_steps", 2, "--stages", "denoiser"))
    assert not (tmp_path / "export").exists()
    run(*toy(tmp_path, "--stages", "vae"))
    trained = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    exported = load_file(tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in trained.items())
    assert (tmp_path / "export" / "model_index.json").is_file()
