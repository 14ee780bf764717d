from __future__ import annotations

import pytest
import torch

from flatten_diffusion import linearize
from flatten_diffusion.distill import CalibrationSettings
from flatten_diffusion.distill.calibrate import Layer
from flatten_diffusion.distill.capture import LayerCapture, capture_teacher
from flatten_diffusion.mixers import Context, LayerChoice, MixerInputs
from flatten_diffusion.mixers.parts.feature_maps import (
    MapChoice,
    Maps,
    QueryKeyMoments,
    apply_maps,
    candidates,
    query_key_sums,
)

from ..models.tiny import build
from ..models.tiny_wrapped import build_wrapped


def inputs(head_dim: int = 6, seed: int = 0) -> MixerInputs:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(2, 2, head_dim, head_dim, generator=generator)
    query, key, value = (torch.randn(3, 40, 2, head_dim, generator=generator) for _ in range(3))
    query, key = (torch.einsum("bnhd,hde->bnhe", x, m) for x, m in zip((query, key), mixing, strict=True))
    return MixerInputs(query, key, value, Context((5, 8)))


@pytest.mark.parametrize("head_dim", [6, 7])
def test_pairs_give_the_product_back(head_dim: int) -> None:
    """Without the relu, a pair contributes 2 b^2 + 2 x_q x_k; the leading directions make up the product."""
    given = inputs(head_dim)
    moments = QueryKeyMoments(query_key_sums(given))
    shift = 1.5
    query, key = apply_maps(given, moments.linear_maps([MapChoice(1.0, paired=True, shift=shift)] * 2))
    paired = torch.einsum("bnhd,bmhd->bhnm", query, key)
    spread = moments.linear_maps([MapChoice(1.0, paired=True, shift=1.0)] * 2)[1]
    constant = (shift * spread).square().sum(-1)[None, :, None, None]
    product = torch.einsum("bnhd,bmhd->bhnm", given.query, given.key)
    half = head_dim // 2
    rest = torch.einsum("bnhd,bmhd->bhnm", query[..., 2 * half :], key[..., 2 * half :])
    approximate = (paired - constant - rest) / 2 + rest
    error = (approximate - product).square().mean() / product.square().mean()
    assert error < 0.25  # what the dropped directions held
    # Both sides of a direction weigh alike, and the kept ones are the heavy ones.
    halves = [(x - s)[..., :half].square().mean((0, 1)) for x, s in ((query, shift * spread), (key, shift * spread))]
    assert torch.allclose(halves[0], halves[1], rtol=5e-3)  # directions without spread are given 0.3 %
    assert (halves[0][:, :-1] >= halves[0][:, 1:]).all()


def test_all_directions_lose_nothing() -> None:
    given = inputs(6)
    moments = QueryKeyMoments(query_key_sums(given))
    moments.linear_maps([MapChoice(1.0, paired=True, shift=1.0)] * 2)
    assert moments._directions is not None
    for query_matrix, key_matrix, _ in moments._directions:
        assert torch.allclose(query_matrix @ key_matrix.T, torch.eye(6, dtype=torch.float64), atol=1e-5)


CHOICES = [MapChoice(2.0, paired=True, shift=0.5), MapChoice(1.0, shift=0.5)]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["sd15", "unet2d", "dit", "sd3"])
def test_installed_maps_are_the_maps(name: str, choice: MapChoice) -> None:
    """Folded into the projections, or inside the mixer where norms and rotations stand between (SD3)."""
    tiny = build_wrapped(name) if name == "sd3" else build(name)
    adapter = linearize(tiny.model)
    for again in range(2):  # folded a second time on top of what the first left
        expected: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def install(call: LayerCapture, expected: dict[str, tuple[torch.Tensor, torch.Tensor]] = expected) -> None:
            layer = Layer(adapter, call.name, call.attn, CalibrationSettings())
            moments = QueryKeyMoments(query_key_sums(call.inputs))
            choices = LayerChoice([choice] * call.inputs.query.shape[2])
            maps: Maps = moments.linear_maps(choices)
            expected[call.name] = apply_maps(call.inputs, maps)
            call.mixer._install(layer, choices, moments)  # type: ignore[operator]
            assert call.mixer.config.focusing_factor == choice.power
            assert call.mixer.config.feature_maps == (not layer.can_fold)

        def compare(call: LayerCapture, expected: dict[str, tuple[torch.Tensor, torch.Tensor]] = expected) -> None:
            query, key = call.mixer.map_features(call.inputs.query, call.inputs.key)  # type: ignore[operator]
            assert torch.allclose(query, expected[call.name][0], rtol=1e-3, atol=1e-4)
            assert torch.allclose(key, expected[call.name][1], rtol=1e-3, atol=1e-4)

        with torch.no_grad():
            with capture_teacher(adapter, install):
                tiny()
            with capture_teacher(adapter, compare):
                tiny()
        assert set(expected) == set(adapter.layers)
        folds = {name for name, layer in adapter.layer_mixers() if "q" in layer.deltas and "k" in layer.deltas}
        assert folds == ({*adapter.layers} if name != "sd3" else set()), again


def test_scale_has_geometric_mean_one() -> None:
    moments = QueryKeyMoments(query_key_sums(inputs()))
    for exponent in (0.0, 0.5, 1.0):
        assert moments.scale(exponent).log().sum().item() == pytest.approx(0.0, abs=1e-4)
    assert torch.equal(moments.scale(0.0), torch.ones(12))


def test_what_a_layer_allows() -> None:
    both = candidates((1.0, 2.0), (0.0,), (0.5,), (0.5, 1.0), 2, pairable=True)
    assert len(both) == 2 + 2 + 4 * 3 and len(set(both)) == 16
    assert candidates((1.0,), (0.0,), (0.5,), (0.5,), 2, pairable=False) == [MapChoice(1.0), MapChoice(1.0, shift=0.5)]


@pytest.mark.parametrize("head_dim", [6, 7])
def test_rotations_keep_the_product_and_spread_it(head_dim: int) -> None:
    given = inputs(head_dim)
    moments = QueryKeyMoments(query_key_sums(given))
    half = head_dim // 2

    def directions(rotation: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        maps = moments.linear_maps([MapChoice(2.0, paired=True, shift=0.5, rotation=rotation)] * 2)
        query, key = apply_maps(given, maps)
        return (query - maps[1])[..., :half], (key - maps[3])[..., :half], maps[1]

    plain, rotated = directions(0), directions(3)
    products = [torch.einsum("bnhd,bmhd->bhnm", query, key) for query, key, _ in (plain, rotated)]
    assert torch.allclose(*products, rtol=1e-3, atol=1e-3)
    spreads = [query.square().mean((0, 1)) for query, _, _ in (plain, rotated)]
    assert (spreads[1].amax(-1) / spreads[1].amin(-1) < spreads[0].amax(-1) / spreads[0].amin(-1)).all()
    # The shift is a share of each rotated direction's own root mean square.
    assert torch.allclose(rotated[2][:, :half], 0.5 * spreads[1].sqrt(), rtol=0.05)
    assert not torch.allclose(directions(3)[0], directions(4)[0])
