import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flatten_diffusion import focused_linear_attention, list_mixers
from flatten_diffusion.mixers import FocusedLinearAttention, Mixer, MixerSpec, create_mixer, register_mixer

ROOT = Path(__file__).parents[2]
SPEC = MixerSpec(heads=3, head_dim=5, focusing_factor=2.5, kernel_size=3)


def _tensors(dtype=torch.float32, grid=(3, 7)):
    torch.manual_seed(0)
    return [torch.randn(2, grid[0] * grid[1], 3, 5).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_mixer_is_the_parameter_free_operator(dtype):
    mixer = create_mixer("focused_linear", SPEC, dtype=dtype)
    query, key, value = _tensors(dtype)
    expected = focused_linear_attention(query, key, value, focusing_factor=2.5)
    assert torch.equal(mixer.scale, torch.ones_like(mixer.scale))
    torch.testing.assert_close(mixer(query, key, value, (3, 7)), expected, rtol=1e-3, atol=1e-3)


def test_the_learned_parts_against_a_direct_computation():
    mixer = create_mixer("focused_linear", SPEC, dtype=torch.float64)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_()
    query, key, value = _tensors(torch.float64)

    def focus(x):
        x = (x.flatten(2).relu() + 1e-6) / mixer.log_scale.exp()
        powered = x**2.5
        return (powered / powered.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)).unflatten(-1, (3, 5))

    weights = torch.einsum("bnhd,bmhd->bhnm", focus(query), focus(key))
    weights = weights / (weights.mean(-1, keepdim=True) + 1e-6) / weights.shape[-1]
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, value)
    for head in range(3):
        picture = value[:, :, head].transpose(1, 2).unflatten(-1, (3, 7))
        own = slice(5 * head, 5 * head + 5)
        local = F.conv2d(picture, mixer.conv_weight[own], mixer.conv_bias[own], padding=1, groups=5)
        expected[:, :, head] += local.flatten(2).transpose(1, 2)
    torch.testing.assert_close(mixer(query, key, value, (3, 7)), expected, rtol=1e-9, atol=1e-9)


def test_a_gradient_reaches_every_parameter():
    mixer = create_mixer("focused_linear", SPEC)
    mixer(*_tensors(), (3, 7)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_without_a_convolution_there_is_no_grid_to_know():
    mixer = create_mixer("focused_linear", MixerSpec(3, 5, kernel_size=0))
    assert [name for name, _ in mixer.named_parameters()] == ["log_scale"]
    assert not mixer.uses_grid
    assert mixer(*_tensors()).shape == (2, 21, 3, 5)


def test_the_grid_is_needed_and_checked():
    mixer = create_mixer("focused_linear", SPEC)
    with pytest.raises(ValueError, match="grid"):
        mixer(*_tensors())
    with pytest.raises(ValueError, match="grid"):
        mixer(*_tensors(), (5, 5))


def test_the_registry():
    # In an interpreter of its own: other tests register mixers beside it.
    code = "from flatten_diffusion import list_mixers; print(list_mixers())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "['focused_linear']"
    assert "focused_linear" in list_mixers()
    assert isinstance(create_mixer("focused_linear", SPEC), FocusedLinearAttention)
    with pytest.raises(ValueError, match="Unknown mixer 'nothing'.*focused_linear"):
        create_mixer("nothing", SPEC)
    with pytest.raises(ValueError, match="taken by FocusedLinearAttention"):
        register_mixer("focused_linear")(Mixer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_feature_maps_against_mapped_tokens(dtype):
    plain, mapped = (create_mixer("focused_linear", SPEC, dtype=dtype) for _ in range(2))
    query, key, value = _tensors(dtype)
    mapped.add_feature_maps()
    assert mapped.spec.feature_maps and not plain.spec.feature_maps
    assert torch.equal(mapped(query, key, value, (3, 7)), plain(query, key, value, (3, 7)))  # zeros change nothing
    with torch.no_grad():
        for parameter in mapped.query_map.parameters():
            parameter.normal_()
        mapped.key_map.bias.fill_(2.0)
    weight, bias = mapped.query_map.weight, mapped.query_map.bias
    by_hand = torch.stack([query[:, :, h] @ (torch.eye(5) + weight[h]).to(dtype) + bias[h] for h in range(3)], dim=2)
    expected = plain(by_hand, key + 2, value, (3, 7))
    torch.testing.assert_close(
        mapped(query, key, value, (3, 7)),
        expected,
        rtol=2e-2 if dtype != torch.float64 else 1e-9,
        atol=1e-2 if dtype != torch.float64 else 1e-9,
    )
    before = mapped.query_map
    mapped.add_feature_maps()
    assert mapped.query_map is before
    mapped(query, key, value, (3, 7)).float().square().sum().backward()
    for name, parameter in mapped.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
