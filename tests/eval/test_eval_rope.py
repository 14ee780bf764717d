"""Rotary embeddings both ways: the rotation is diffusers' own, the mixer is the formula, the run goes through."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from eval.experiments import rope
from flatten_diffusion import AdapterConfig, linearize, restore
from flatten_diffusion.mixers import Context, LayerShape, create_mixer
from flatten_diffusion.ops import focused_feature_map


def positions(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)


def test_rotation_is_that_of_flux_and_can_be_undone() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 35, 3, 48)
    table = FluxPosEmbed(theta=10000, axes_dim=list(rope.axes_of(48)))(positions(5, 7))
    angle = rope.angles(5, 7, 48)
    torch.testing.assert_close(rope.rotate(x, angle), apply_rotary_emb(x, table, sequence_dim=1))
    exact = x.double()
    assert (rope.rotate(exact, angle) - exact).abs().max() > 1
    torch.testing.assert_close(rope.rotate(rope.rotate(exact, angle), -angle), exact, rtol=1e-12, atol=1e-12)


def turned(vector: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """A vector of 12 channels, turned pair by pair as the formula says."""
    turned = vector.clone()
    for axis, position in enumerate((0, row, column)):
        for pair in range(2):
            at, angle = 4 * axis + 2 * pair, position * 10000.0 ** (-pair / 2)
            real, imaginary = vector[at].item(), vector[at + 1].item()
            turned[at] = real * math.cos(angle) - imaginary * math.sin(angle)
            turned[at + 1] = real * math.sin(angle) + imaginary * math.cos(angle)
    return turned


def test_mixer_is_the_formula_token_by_token() -> None:
    torch.manual_seed(1)
    batch, heads, channels, (height, width) = 2, 2, 12, (3, 4)
    tokens = height * width
    query, key, value = (torch.randn(batch, tokens, heads, channels, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[1, 7:] = False
    mixer = create_mixer(rope.FeaturesFirstConfig(kernel_size=3), LayerShape(heads, channels, 24), dtype=torch.float64)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.3)
    angle = rope.angles(height, width, channels)
    given_key = rope.rotate(key, angle)
    given_key[~mask], given_value = torch.nan, value.clone()
    given_value[~mask] = torch.nan
    context = Context((height, width), mask)
    mixed = mixer(rope.rotate(query, angle), given_key, given_value, context).output

    features = [focused_feature_map(x, 3.0, mixer.scale) for x in (query, key)]
    weight, bias = mixer.conv_weight.reshape(heads, channels, 3, 3), mixer.conv_bias.reshape(heads, channels)
    for b in range(batch):
        for h in range(heads):
            for i in range(tokens):
                above, below = torch.zeros(channels, dtype=torch.float64), 0.0
                row, column = divmod(i, width)
                local = bias[h].clone()
                for j in range(tokens):
                    if not mask[b, j]:
                        continue
                    other_row, other_column = divmod(j, width)
                    one = turned(features[0][b, i, h], row, column)
                    other = turned(features[1][b, j, h], other_row, other_column)
                    above += (one @ other) * value[b, j, h]
                    below += features[0][b, i, h] @ features[1][b, j, h]
                    if abs(other_row - row) <= 1 and abs(other_column - column) <= 1:
                        local += weight[h, :, other_row - row + 1, other_column - column + 1] * value[b, j, h]
                torch.testing.assert_close(mixed[b, i, h], above / below + local, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [None, (2, 3, 4), ((1, 3, 4), (1, 2, 2))])
def test_positions_that_are_not_known_are_refused(grid: tuple[int, ...] | None) -> None:
    mixer = create_mixer(rope.FEATURES_FIRST, LayerShape(2, 12, 24))
    x = torch.randn(1, 12, 2, 12)
    with pytest.raises(ValueError, match="one whole image"):
        mixer(x, x, x, Context(grid))
    with pytest.raises(ValueError, match="multiple of 6"):
        create_mixer(rope.FEATURES_FIRST, LayerShape(2, 16, 32))


def test_a_converted_flux_hands_the_mixer_what_it_can_turn_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unrotated query and key that the mixer recovers are those of the layer's own norms."""
    torch.manual_seed(2)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=False, axes_dims_rope=rope.axes_of(12),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 15, 4),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.3, 0.8]),
        "img_ids": positions(3, 5).float(),
        "txt_ids": torch.zeros(5, 3),
    }
    with torch.no_grad():
        native = model(**inputs).sample
        adapter = linearize(model, AdapterConfig(mixer=rope.FEATURES_FIRST))
        assert len(adapter.layers) == 2
        norms: list[torch.Tensor] = []
        for name in ("norm_q", "norm_k"):
            getattr(model.transformer_blocks[0].attn, name).register_forward_hook(lambda *_: norms.append(_[-1]))
        mapped: list[torch.Tensor] = []

        def kept(x: torch.Tensor, *arguments: object) -> torch.Tensor:
            mapped.append(x)
            return focused_feature_map(x, *arguments)

        monkeypatch.setattr(rope, "focused_feature_map", kept)
        converted = model(**inputs).sample
    assert converted.isfinite().all() and not torch.allclose(converted, native)
    for wanted, found in zip(norms, mapped[:2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    restore(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, native)


def test_the_copy_differs_from_its_source_in_nothing_but_positions() -> None:
    torch.manual_seed(3)
    source = SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=12, out_channels=12, num_layers=2, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=24, pooled_projection_dim=8,
        pos_embed_max_size=4, qk_norm="rms_norm",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in source.parameters():  # norms and biases start alike everywhere
            parameter.add_(0.05 * torch.randn_like(parameter))
        source.pos_embed.pos_embed.zero_()
    model = rope.build_rotary_model(source)
    latents, prompt, pooled = torch.randn(2, 12, 4, 3), torch.randn(2, 5, 8), torch.randn(2, 8)
    given = {"encoder_hidden_states": prompt, "pooled_projections": pooled}
    with torch.no_grad():
        wanted = source(latents, timestep=torch.tensor([300.0, 800.0]), **given).sample
        found = model(
            latents.flatten(2).transpose(1, 2), timestep=torch.tensor([0.3, 0.8]), img_ids=torch.zeros(12, 3),
            txt_ids=torch.zeros(5, 3), **given,
        ).sample  # fmt: skip
    torch.testing.assert_close(found.transpose(1, 2).reshape(wanted.shape), wanted, rtol=1e-3, atol=1e-4)


def test_wrong_counts_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "prepare", lambda *args: pytest.fail("loaded the pipeline"))
    assert rope.main(["--transfer_steps", "0"]) == 2
    assert capsys.readouterr().err == "error: --transfer_steps is 0: pass at least 1\n"
    assert rope.main(["--train_minutes", "0"]) == 2
    assert capsys.readouterr().err == "error: --train_minutes is 0.0: pass a positive number\n"


def test_trains_a_model_and_compares_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--num_scenes", "40", "--resolution", "32", "--train_batch_size", "4", "--train_precision", "float32"]
    arguments += ["--train_steps", "2", "--transfer_steps", "2", "--max_train_steps", "2"]
    arguments += ["--model_dir", str(tmp_path / "model")]
    assert rope.main([*arguments, "--json", str(tmp_path / "first.json")]) == 0
    first = json.loads((tmp_path / "first.json").read_text())
    assert "held-out loss: trained" in capsys.readouterr().out
    assert first["training"]["steps"] == 2 and first["training"]["copied"] != first["training"]["trained"]
    handed_over, features_first = first["results"]
    assert handed_over["teacher_loss"] == features_first["teacher_loss"]
    assert handed_over["distance_to_teacher"]["raw"] != features_first["distance_to_teacher"]["raw"]
    for row in first["results"]:
        assert list(row["distance_to_teacher"]) == ["raw", "transfer", "finetune"]
        assert len(row["layers"]) == 6 and all(error > 0 for error in row["layers"].values())

    # The saved model is compared again without training, and gives the same.
    assert rope.main([*arguments, "--json", str(tmp_path / "second.json")]) == 0
    assert "held-out loss" not in capsys.readouterr().out
    second = json.loads((tmp_path / "second.json").read_text())
    assert second["training"] == first["training"]
    for one, other in zip(first["results"], second["results"], strict=True):
        assert one["distance_to_teacher"] == pytest.approx(other["distance_to_teacher"], rel=1e-4)
