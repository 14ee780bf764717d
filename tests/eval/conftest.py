"""Small images and tiny random pipelines of real classes, built offline."""

from __future__ import annotations

import json
import string
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from .pieces import ROOT, child_environment, command_line, draw

# A feature that depends on every pixel, for any size; written to a file so that processes can import it.
FEATURES = """
import torch
import torch.nn.functional as F

def cells(images):
    assert images.dtype == torch.uint8, images.dtype
    return F.adaptive_avg_pool2d(images.double() / 255, 3).flatten(1).float()

def poisoned(images):
    return cells(images) * float("nan")

def integers(images):
    return torch.zeros(len(images), 4, dtype=torch.int64)

def failing(images):
    raise RuntimeError("no such layer")
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATTEN_EVAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def features(tmp_path: Path) -> Path:
    path = tmp_path / "own_features.py"
    path.write_text(FEATURES)
    return path


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, count: int, height: int = 20, width: int = 28, seed: int = 0, shift: float = 0.0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for index in range(count):
            picture = draw(seed * 100_000 + index, height, width, shift)
            Image.fromarray(picture).save(folder / f"{index:04d}.png", compress_level=1)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random StableDiffusionPipeline, saved as a diffusers folder; native size 32 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    characters = string.ascii_lowercase + string.digits + ",."
    tokens = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens), hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, pad_token_id=len(tokens) - 1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import StableDiffusionPipeline

    from flatten_diffusion import linearize

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline, local_files_only=True)
    folder = tmp_path_factory.mktemp("adapter")
    linearize(pipeline).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP model and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_pipeline / "tokenizer")
    size = len(tokenizer)
    text = {
        "vocab_size": size, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "bos_token_id": size - 2, "eos_token_id": size - 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 24, "patch_size": 8,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(2)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture
def launch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own, or in several that talk over gloo."""

    def start(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
        command = command_line(*arguments, processes=processes)
        return subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=240)

    return start


@pytest.fixture
def run_json(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a command in this process, on the CPU; the JSON it wrote."""

    def run(*arguments: object) -> dict[str, Any]:
        from flatten_eval.cli import main

        target = tmp_path / "result.json"
        assert main([*map(str, arguments), "--device", "cpu", "--offline", "--json", str(target)]) == 0
        result: dict[str, Any] = json.loads(target.read_text())
        return result

    return run


@pytest.fixture
def run_error(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command that must fail; its exit code and the one line it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        from flatten_eval.cli import main

        capsys.readouterr()
        code = main([*map(str, arguments), "--device", "cpu", "--offline"])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flatten-eval:")]
        assert len(lines) == 1, lines
        return code, lines[0]

    return run
