import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from flatten_diffusion import focused_linear_attention, list_mixers
from flatten_diffusion.mixers import (
    Context,
    FocusedLinearAttention,
    FocusedLinearConfig,
    LayerShape,
    Mixer,
    create_mixer,
    register_mixer,
)
from flatten_diffusion.mixers.parts.convolution import convolve

ROOT = Path(__file__).parents[2]
CONFIG = FocusedLinearConfig(focusing_factor=2.5, kernel_size=3)
SHAPE = LayerShape(3, 5, 15)


def _fresh(config=CONFIG, dtype=None):
    return create_mixer(config, SHAPE, dtype=dtype)


def _mixed(mixer, query, key, value, grid=None, **context):
    return mixer(query, key, value, Context(grid, **context)).output


def _tensors(dtype=torch.float32, grid=(3, 7)):
    torch.manual_seed(0)
    return [torch.randn(2, grid[0] * grid[1], 3, 5).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_mixer_is_the_parameter_free_operator(dtype):
    mixer = _fresh(dtype=dtype)
    query, key, value = _tensors(dtype)
    expected = focused_linear_attention(query, key, value, focusing_factor=2.5)
    assert torch.equal(mixer.scale, torch.ones_like(mixer.scale))
    torch.testing.assert_close(_mixed(mixer, query, key, value, (3, 7)), expected, rtol=1e-3, atol=1e-3)


def test_the_learned_parts_against_a_direct_computation():
    mixer = _fresh(dtype=torch.float64)
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
    torch.testing.assert_close(_mixed(mixer, query, key, value, (3, 7)), expected, rtol=1e-9, atol=1e-9)


def test_a_gradient_reaches_every_parameter():
    mixer = _fresh()
    _mixed(mixer, *_tensors(), (3, 7)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_without_a_convolution_there_is_no_grid_to_know():
    mixer = _fresh(FocusedLinearConfig(kernel_size=0))
    assert [name for name, _ in mixer.named_parameters()] == ["log_scale"]
    assert not mixer.needs
    assert _mixed(mixer, *_tensors()).shape == (2, 21, 3, 5)


def test_the_grid_is_needed_and_checked():
    mixer = _fresh()
    with pytest.raises(ValueError, match="grid"):
        _mixed(mixer, *_tensors())
    with pytest.raises(ValueError, match="grid"):
        _mixed(mixer, *_tensors(), (5, 5))


def test_the_registry():
    # In an interpreter of its own: other tests register mixers beside it.
    code = "from flatten_diffusion import list_mixers; print(list(list_mixers()))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    listed = ast.literal_eval(answer.stdout)
    assert listed == sorted(listed) and {"agent", "focused_linear", "pyramid"} < set(listed) and "other" not in listed
    assert "focused_linear" in list_mixers()
    assert isinstance(_fresh(), FocusedLinearAttention)
    with pytest.raises(ValueError, match="Unknown mixer 'nothing'.*focused_linear"):
        create_mixer("nothing", SHAPE)
    with pytest.raises(ValueError, match="taken by FocusedLinearAttention"):
        register_mixer("focused_linear")(Mixer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_feature_maps_against_mapped_tokens(dtype):
    plain, mapped = (_fresh(dtype=dtype) for _ in range(2))
    query, key, value = _tensors(dtype)
    mapped.add_feature_maps()
    assert mapped.config.feature_maps and not plain.config.feature_maps
    assert torch.equal(
        _mixed(mapped, query, key, value, (3, 7)), _mixed(plain, query, key, value, (3, 7))
    )  # zeros change nothing
    with torch.no_grad():
        for parameter in mapped.query_map.parameters():
            parameter.normal_()
        mapped.key_map.bias.fill_(2.0)
    weight, bias = mapped.query_map.weight, mapped.query_map.bias
    by_hand = torch.stack([query[:, :, h] @ (torch.eye(5) + weight[h]).to(dtype) + bias[h] for h in range(3)], dim=2)
    expected = _mixed(plain, by_hand, key + 2, value, (3, 7))
    torch.testing.assert_close(
        _mixed(mapped, query, key, value, (3, 7)),
        expected,
        rtol=2e-2 if dtype != torch.float64 else 1e-9,
        atol=1e-2 if dtype != torch.float64 else 1e-9,
    )
    before = mapped.query_map
    mapped.add_feature_maps()
    assert mapped.query_map is before
    _mixed(mapped, query, key, value, (3, 7)).float().square().sum().backward()
    for name, parameter in mapped.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def _stirred(kernel_size):
    mixer = create_mixer(FocusedLinearConfig(kernel_size=kernel_size), LayerShape(2, 4, 8))
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


@pytest.mark.parametrize(
    ("grid", "pictures"),
    [
        ((3, 4, 5), [(4, 5)] * 3),
        (((1, 4, 6), (1, 3, 3)), [(4, 6), (3, 3)]),
        (((2, 4, 3), (1, 2, 5)), [(4, 3), (4, 3), (2, 5)]),
    ],
)
def test_the_convolution_never_leaves_a_frame_or_a_image(grid, pictures):
    torch.manual_seed(0)
    mixer = _stirred(5)
    value = torch.randn(2, sum(h * w for h, w in pictures), 2, 4)
    query = torch.randn(value.shape)
    parts = value.split([h * w for h, w in pictures], dim=1)
    with torch.no_grad():
        whole = _mixed(mixer, query, query, value, grid)
        attended = focused_linear_attention(query, query, value, focusing_factor=3.0, scale=mixer.scale)
        local = [convolve(x, mixer.conv_weight, mixer.conv_bias, g, None) for x, g in zip(parts, pictures, strict=True)]
        torch.testing.assert_close(whole, attended + torch.cat(local, dim=1), rtol=1e-4, atol=1e-5)


def test_masked_tokens_of_a_video_weigh_nothing():
    torch.manual_seed(0)
    mixer = _stirred(3)
    query, value = torch.randn(2, 40, 2, 4), torch.randn(2, 40, 2, 4)
    mask = torch.rand(2, 40) > 0.3
    mask[1] = False
    poisoned = value.masked_fill(~mask[:, :, None, None], float("nan"))
    with torch.no_grad():
        out = _mixed(mixer, query, query, poisoned, (2, 4, 5), key_mask=mask)
        assert out[0].isfinite().all() and not out[1].any()
        torch.testing.assert_close(out, _mixed(mixer, query, query, value, (2, 4, 5), key_mask=mask))


def test_feature_maps_in_a_process_group(tmp_path):
    """The mixer in a process group takes its maps along; how tokens are split is tested with the operator."""
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.manual_seed(0)
    mixer = _fresh(FocusedLinearConfig(kernel_size=3), torch.float64)
    query, key, value = torch.randn(3, 2, 21, 3, 5, dtype=torch.float64).unbind(0)
    unmapped = _mixed(mixer, query, key, value, (3, 7))
    mixer.add_feature_maps()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    expected = _mixed(mixer, query, key, value, (3, 7))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        torch.testing.assert_close(
            _mixed(mixer, query, key, value, (3, 7), group=group), expected, rtol=1e-12, atol=1e-12
        )
        with torch.no_grad():
            mixer.key_map.bias += 1
        changed = _mixed(mixer, query, key, value, (3, 7), group=group)
    finally:
        dist.destroy_process_group()
    assert not torch.allclose(changed, expected) and not torch.allclose(unmapped, expected)
