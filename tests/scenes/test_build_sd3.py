"""The joint pipeline before training: positions, the merged padding tokens, and where weights can be started from."""

import json

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", minversion="5", reason="the tokenizer is built with transformers 5")

from eval.experiments.scenes_build import build_pipeline, start_from
from eval.experiments.train_scenes import T5_TOKENS, CountedLastKey, JointDenoiser, denoiser_of
from flatten_diffusion.scenes import PIPELINE_DIR

CAPTIONS = ["a red circle on a white background", "two blue stars on a navy background"]


@pytest.fixture(scope="module")
def pipe():
    built = build_pipeline(32, 0, "sd3")
    torch.manual_seed(1)
    with torch.no_grad():  # fresh blocks are the identity, in which no attention shows
        for name, parameter in built.transformer.named_parameters():
            if not parameter.any():
                parameter.normal_(std=0.2) if "weight" in name else parameter.zero_()
    return built


@torch.no_grad()
def test_one_weighted_token_stands_for_all_that_are_equal(pipe):
    text, _, pooled, _ = pipe.encode_prompt(CAPTIONS, None, None, do_classifier_free_guidance=False)
    assert text.shape[1] == 24 + T5_TOKENS
    generator = torch.Generator().manual_seed(0)
    noisy, timesteps = torch.randn(2, 12, 4, 6, generator=generator), torch.tensor([300.0, 700.0])
    expected = pipe.transformer(noisy, text, pooled, timesteps).sample
    tokens = pipe.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    denoiser = denoiser_of(pipe)
    assert isinstance(denoiser, JointDenoiser)
    merged = denoiser(noisy, timesteps, tokens)
    assert torch.allclose(merged, expected, rtol=1e-4, atol=1e-5)
    unweighted = pipe.transformer(noisy, text[:, :25], pooled, timesteps).sample
    assert (unweighted - expected).abs().max() > 10 * (merged - expected).abs().max()


def test_a_fresh_model_is_the_identity_and_still_learns():
    built = build_pipeline(32, 0, "sd3")
    tokens = built.tokenizer(CAPTIONS[:1], padding="max_length", return_tensors="pt").input_ids
    prediction = denoiser_of(built)(torch.randn(1, 12, 4, 4), torch.tensor([500.0]), tokens)
    assert not prediction.any()
    (prediction - 1).square().sum().backward()
    assert built.transformer.proj_out.weight.grad.any()


def test_twice_the_spacing_at_half_the_size_covers_the_same_range():
    small = build_pipeline(64, 0, "sd3", position_spacing=2).transformer.pos_embed
    large = build_pipeline(128, 0, "sd3").transformer.pos_embed
    coarse = small.cropped_pos_embed(8, 8).reshape(8, 8, -1)
    fine = large.cropped_pos_embed(16, 16).reshape(16, 16, -1)
    between = (fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]) / 4
    # The mean of neighbours is the middle's embedding, but for the fastest waves: cos(1/2) of it.
    assert torch.allclose(coarse, between, atol=0.13)
    assert not torch.allclose(coarse, fine[:8, :8], atol=0.5)


def test_a_second_text_encoder_starts_as_the_first_word_for_word():
    built = build_pipeline(32, 0, "sd3")
    start_from(built, PIPELINE_DIR)
    one, other = built.text_encoder.state_dict(), built.text_encoder_2.state_dict()
    words = "text_model.embeddings.token_embedding.weight"
    different = {name for name in one if not torch.equal(one[name], other[name])}
    # But for the projection, which the UNet's encoder lacks, and words that its vocabulary lacks.
    assert different <= {"text_projection.weight", words}
    theirs = json.loads((PIPELINE_DIR / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    table = load_file(PIPELINE_DIR / "text_encoder" / "model.safetensors")[words].float()
    for word, row in built.tokenizer.get_vocab().items():
        if word in theirs:
            assert torch.equal(one[words][row], table[theirs[word]]) and torch.equal(other[words][row], one[words][row])
    untouched = build_pipeline(32, 0, "sd3").transformer.state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in built.transformer.state_dict().items())


def test_nothing_to_start_from(tmp_path):
    built = build_pipeline(32, 0, "sd3")
    with pytest.raises(FileNotFoundError, match="no pipeline to start from"):
        start_from(built, tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="none of its weights fits"):
        start_from(built, tmp_path)


def test_an_unknown_architecture():
    with pytest.raises(ValueError, match="use unet or sd3"):
        build_pipeline(32, 0, "dit")


def test_a_mask_of_ones_own_cannot_be_counted() -> None:
    query = torch.randn(1, 1, 3, 8)
    with CountedLastKey(torch.tensor([4])), pytest.raises(RuntimeError, match="feed all tokens"):
        torch.nn.functional.scaled_dot_product_attention(query, query, query, torch.zeros(3, 3))
