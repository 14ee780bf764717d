import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention

from flatten_diffusion import AdapterConfig, FocusedLinearConfig, linearize
from flatten_diffusion.models import ARCHITECTURES, find_attention_layers

from .tiny import CONVERTIBLE, build


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_every_attention_layer_is_found_and_judged(name):
    tiny = build(name)
    findings = find_attention_layers(tiny.model)
    assert len(findings) == tiny.total
    assert sum(finding.reason is None for finding in findings) == tiny.converted
    for finding in findings:
        temporal = any(word in finding.name for word in ("temporal", "motion", "temp_attentions", "transformer_in"))
        crosses = getattr(finding.attn, "is_cross_attention", False)
        if temporal:
            assert finding.reason is not None and "frames" in finding.reason
        elif crosses:
            assert finding.reason == "cross-attention"


@pytest.mark.parametrize("name", [name for name in CONVERTIBLE if name != "unet2d"])
def test_the_grid_of_each_layer_is_the_real_one(name):
    tiny = build(name)
    adapter = linearize(tiny.model)
    with torch.no_grad():
        tiny()
        assert {row.grid for row in adapter.report().converted} == tiny.grids
        if name not in ("dit", "latte"):
            tiny(**tiny.turned())
            assert {row.grid for row in adapter.report().converted} == {grid[::-1] for grid in tiny.grids}


def test_a_image_input_needs_no_record_of_its_grid():
    tiny = build("unet2d")
    adapter = linearize(tiny.model)
    seen = []
    for _, mixer in adapter.mixers():
        mixer.register_forward_pre_hook(lambda module, args: seen.append(args[3].grid))
    with torch.no_grad():
        tiny()
    assert set(seen) == {(8, 12)} and len(seen) == 4
    assert all(row.grid is None for row in adapter.report())


def test_gligen_attention_over_grounding_tokens_stays():
    tiny = build("sd15")
    block = next(m for m in tiny.model.modules() if isinstance(m, BasicTransformerBlock))
    gated = BasicTransformerBlock(16, 2, 8, cross_attention_dim=24, attention_type="gated")
    block.fuser = gated.fuser
    reasons = {finding.name: finding.reason for finding in find_attention_layers(tiny.model)}
    (fuser,) = [name for name in reasons if name.endswith("fuser.attn")]
    assert reasons[fuser] == "attends over image and grounding tokens together"


def test_an_unknown_family_says_so():
    plain = Attention(query_dim=16, heads=2, dim_head=8)
    joint = Attention(query_dim=16, heads=2, dim_head=8, added_kv_proj_dim=16, context_pre_only=False)
    reasons = [finding.reason for finding in find_attention_layers(torch.nn.Sequential(plain, joint))]
    assert "outside the families this version knows" in reasons[0]
    assert reasons[1] == "joint text-image attention"


def test_attention_inside_an_autoencoder_is_known_too():
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4)
    assert len([finding for finding in find_attention_layers(vae) if finding.reason is None]) >= 1


def test_non_square_dit_is_named_instead_of_scrambled():
    tiny = build("dit")
    adapter = linearize(tiny.model)
    with torch.no_grad(), pytest.raises(ValueError, match="square"):
        tiny(hidden_states=torch.randn(2, 4, 4, 16))
    with torch.no_grad(), adapter.disabled():
        tiny()


def test_no_two_rows_of_an_owner_name_the_same_layers():
    rows = [
        {(architecture.owner, path) for path in (*architecture.image, *architecture.joint, *architecture.kept)}
        for architecture in ARCHITECTURES
    ]
    assert len(set.union(*rows)) == sum(map(len, rows))


def test_without_a_convolution_no_grid_is_needed():
    tiny = build("sd15")
    adapter = linearize(tiny.model, AdapterConfig(mixer=FocusedLinearConfig(kernel_size=0)))
    attn = tiny.model.get_submodule(adapter.layers[0])
    with torch.no_grad():
        assert attn(torch.randn(1, 23, 16)).isfinite().all()
        tiny()
        assert attn(torch.randn(1, 23, 16)).isfinite().all()
