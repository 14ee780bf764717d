"""Local and sparse mixers against the authors' own modules, against loops over the papers' rules, in their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from flatten_diffusion.mixers import (
    BlockGridConfig,
    Context,
    InwardWindowConfig,
    LayerShape,
    LongShortConfig,
    Mixer,
    MixerConfig,
    NeighborhoodConfig,
    OutlookConfig,
    PositionalConfig,
    RoutingConfig,
    WindowConfig,
    create_mixer,
)

from .registered import stirred, tensors

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "mechanisms"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the authors' outputs, ../shared/golden, are not here")
Own = dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]]
"""Parameter of a mixer -> the authors' name for it, and how theirs becomes ours."""


def _load(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path.name} is kept aside")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _near(ours: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    error = (ours.reshape(expected.shape) - expected).abs().max()
    assert error <= 1e-9 * expected.abs().max() + 1e-13, (name, float(error))


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _with_parameters(mixer: Mixer, own: Own, saved: dict[str, torch.Tensor]) -> list[nn.Parameter]:
    found = []
    for name, (theirs, convert) in own.items():
        path, _, leaf = name.rpartition(".")
        setattr(mixer.get_submodule(path), leaf, nn.Parameter(convert(saved[f"param.{theirs}"]).clone()))
        found.append(mixer.get_parameter(name))
    assert len(found) == len(list(mixer.parameters()))
    return found


def _is_the_authors_layer(
    name: str,
    config: MixerConfig,
    own: Own,
    *,
    qkv: str = "qkv",
    proj: str = "proj",
    head_first: bool = False,
    padded: tuple[int, int] | None = None,
    scale: float | None = None,
    given: tuple[dict[str, torch.Tensor], dict[str, str]] | None = None,
) -> None:
    """Between the authors' projections, the mixer gives the authors' output and every gradient. padded: the picture is
    filled up with zeros to this size before the projections, and cut again."""
    saved, meta = given or _load(name)
    heads, dim = int(meta["heads"]), int(meta["dim"])
    height, width = map(int, meta["grid"].split("x"))
    mixer = create_mixer(config, LayerShape(heads, dim // heads, dim), dtype=torch.float64)
    learned = _with_parameters(mixer, own, saved)
    names = [f"{part}.{kind}" for part in (qkv, proj) for kind in ("weight", "bias")]
    names = [name for name in names if f"param.{name}" in saved]
    leaves = {name: saved[f"param.{name}"].clone().requires_grad_() for name in names}
    x = saved["x"].reshape(-1, height, width, dim).requires_grad_()
    size = padded or (height, width)
    for compute in (mixer, mixer.reference):
        tokens = F.pad(x, (0, 0, 0, size[1] - width, 0, size[0] - height)).flatten(1, 2)
        projected = F.linear(tokens, leaves[f"{qkv}.weight"], leaves.get(f"{qkv}.bias"))
        if head_first:
            parts = projected.unflatten(-1, (heads, 3, dim // heads)).unbind(3)
        else:
            parts = projected.unflatten(-1, (3, heads, dim // heads)).unbind(2)
        mixed = compute(*parts, Context(size, scale=scale)).output.flatten(2)
        mixed = mixed.unflatten(1, size)[:, :height, :width]
        out = F.linear(mixed, leaves[f"{proj}.weight"], leaves[f"{proj}.bias"])
        _near(out, saved["out"], name)
        grads = torch.autograd.grad(out, [x, *leaves.values(), *learned], saved["grad_out"].reshape(out.shape))
        expected = [saved["grad_x"], *(saved[f"grad.{name}"] for name in names)]
        expected += [convert(saved[f"grad.{theirs}"]) for theirs, convert in own.values()]
        for which, ours, theirs in zip(["x", *names, *own], grads, expected, strict=True):
            _near(ours, theirs, which)


def _is_the_authors_product(name: str, config: MixerConfig, grid: Any, scale: float | None) -> None:
    """The same without projections: q, k, v of shape [B, H, N, D]."""
    saved, meta = _load(name)
    inputs = [saved[part].transpose(1, 2).requires_grad_() for part in "qkv"]
    mixer = create_mixer(config, LayerShape(int(meta["heads"]), inputs[0].shape[-1], 1), dtype=torch.float64)
    for compute in (mixer, mixer.reference):
        out = compute(*inputs, Context(grid, scale=scale)).output.transpose(1, 2)
        _near(out, saved["out"], name)
        for part, grad in zip("qkv", torch.autograd.grad(out, inputs, saved["grad_out"]), strict=True):
            _near(grad.transpose(1, 2), saved[f"grad_{part}"], part)


def _softmax(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Over all keys."""
    swapped = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*swapped, **settings).transpose(1, 2)


def _spelt_out(
    mixer: Mixer,
    grid: tuple[int, int, int],
    sees: Callable[[int, int, int, int, int, int], bool],
    bias: Callable[[int, int, int, int, int, int], Any] | None = None,
) -> None:
    """The mixer's output and partition are the softmax over the keys that a rule picks, one query at a time. The rule
    is told height, width, the query's (y, x) and the key's (y, x); frames are ignored. bias gives [H]."""
    shape = LayerShape(2, 4, 8)
    frames, height, width = grid
    query, key, value, _ = tensors((frames * height, width), shape, batch=1)
    mixed = mixer(query, key, value, Context(grid))
    for i in range(frames * height * width):
        y, x = divmod(i % (height * width), width)
        places = [(m, *divmod(m % (height * width), width)) for m in range(frames * height * width)]
        seen = [(m, v, u) for m, v, u in places if sees(height, width, y, x, v, u)]
        keys = [m for m, _, _ in seen]
        scores = torch.einsum("hd,mhd->hm", query[0, i], key[0, keys]) * shape.head_dim**-0.5
        if bias is not None:
            scores = scores + torch.stack([bias(height, width, y, x, v, u) for _, v, u in seen], dim=1)
        expected = torch.einsum("hm,mhd->hd", scores.softmax(-1), value[0, keys])
        torch.testing.assert_close(mixed.output[0, i], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mixed.log_partition[0, i], scores.logsumexp(-1), rtol=1e-9, atol=1e-9)


def _by_offset(table: torch.Tensor, step: int = 1) -> Callable[..., torch.Tensor]:
    """Biases [H] by key minus query, in units of `step`."""
    middle = [side // 2 for side in table.shape[1:]]
    return lambda _h, _w, y, x, v, u: table[:, (v - y) // step + middle[0], (u - x) // step + middle[1]]


@golden
@pytest.mark.parametrize(
    "name", ["natten2d_case1", "natten2d_case2", "dinat2d_case1", "dinat2d_case2", "dinat2d_case3"]
)
def test_neighborhood_is_the_authors_layer(name: str) -> None:
    _, meta = _load(name)
    config = NeighborhoodConfig(kernel_size=int(meta["kernel_size"]), dilation=int(meta["dilation"]))
    _is_the_authors_layer(name, config, {"bias": ("rpb", _same)})


@golden
def test_neighborhood_in_a_small_picture_that_the_authors_fill_up() -> None:
    config = NeighborhoodConfig(kernel_size=5)
    _is_the_authors_layer("natten2d_small_picture_case1", config, {"bias": ("rpb", _same)}, padded=(5, 5))


@golden
@pytest.mark.parametrize("case", [1, 2, 3])
def test_neighborhood_is_the_authors_product(case: int) -> None:
    _, meta = _load(f"natten_product_case{case}")
    kernel, dilation, stride, grid = (
        tuple(map(int, meta[name].split("x"))) for name in ("kernel_size", "dilation", "stride", "grid")
    )
    config = NeighborhoodConfig(kernel_size=kernel, dilation=dilation, stride=stride, bias=False)
    _is_the_authors_product(f"natten_product_case{case}", config, grid, None)


@pytest.mark.parametrize(("grid", "dilation"), [((1, 5, 8), 1), ((1, 7, 6), 2), ((2, 4, 5), 1)])
def test_neighborhood_spelt_out(grid: tuple[int, int, int], dilation: int) -> None:
    mixer = stirred(NeighborhoodConfig(kernel_size=3, dilation=dilation), LayerShape(2, 4, 8))

    def near(length: int, query: int, key: int) -> bool:
        members = list(range(query % dilation, length, dilation))
        first = min(max(members.index(query) - 1, 0), len(members) - 3)
        return key in members[first : first + 3]

    def sees(height: int, width: int, y: int, x: int, v: int, u: int) -> bool:
        return near(height, y, v) and near(width, x, u)

    _spelt_out(mixer, grid, sees, _by_offset(mixer.bias.detach(), dilation))


def _table_of_pairs(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A table [(2 w - 1)^2, heads] by query minus key, as ours."""
    return lambda table: table.T.unflatten(1, (2 * size - 1, 2 * size - 1)).flip(1, 2)


@golden
@pytest.mark.parametrize("name", ["swin_window_case1", "swin_window_case2", "swin_shifted_case1", "swin_shifted_case2"])
def test_window_is_swin(name: str) -> None:
    _, meta = _load(name)
    size = int(meta["window"])
    config = WindowConfig(size=size, shift="all" if int(meta["shift"]) else "none")
    _is_the_authors_layer(name, config, {"bias": ("relative_position_bias_table", _table_of_pairs(size))})


@golden
@pytest.mark.parametrize("case", [1, 2])
def test_window_is_styleswin(case: int) -> None:
    saved, meta = _load(f"styleswin_double_case{case}")
    size = int(meta["window"])
    for prefix in ("param.", "grad."):
        tables = [saved[f"{prefix}attn.{half}.relative_position_bias_table"] for half in (0, 1)]
        saved[f"{prefix}tables"] = torch.cat(tables, dim=1)
    own: Own = {"bias": ("tables", _table_of_pairs(size))}
    _is_the_authors_layer(f"styleswin_double_case{case}", WindowConfig(size=size), own, given=(saved, meta))


@golden
@pytest.mark.parametrize("case", [1, 2])
def test_window_is_hat(case: int) -> None:
    _, meta = _load(f"hat_ocab_case{case}")
    size, margin = int(meta["window"]), (int(meta["overlap_window"]) - int(meta["window"])) // 2
    side = 2 * (size + margin) - 1
    shifted = torch.arange(1 - size - margin, size + margin) - margin + 1  # key minus query, as HAT moves it
    rows = ((shifted[:, None] * side + shifted) % side**2).flatten()

    def ours(table: torch.Tensor) -> torch.Tensor:
        return table[rows].T.unflatten(1, (side, side))

    config = WindowConfig(size=size, shift="none", margin=margin, zero_keys=True)
    _is_the_authors_layer(f"hat_ocab_case{case}", config, {"bias": ("relative_position_bias_table", ours)})


@pytest.mark.parametrize(("grid", "margin"), [((1, 7, 5), 0), ((2, 4, 6), 0), ((1, 7, 5), 1)])
def test_window_spelt_out(grid: tuple[int, int, int], margin: int) -> None:
    mixer = stirred(WindowConfig(size=3, shift="all", margin=margin), LayerShape(2, 4, 8))

    def sees(height: int, width: int, y: int, x: int, v: int, u: int) -> bool:
        # The first window has size // 2 = 1 row and column, the others 3.
        first, left = ((p - 1) // 3 * 3 + 1 for p in (y, x))
        return first - margin <= v < first + 3 + margin and left - margin <= u < left + 3 + margin

    _spelt_out(mixer, grid, sees, _by_offset(mixer.bias.detach()))


def test_half_of_the_heads_are_shifted() -> None:
    shape = LayerShape(3, 4, 12)
    query, key, value, context = tensors((5, 7), shape)
    both, plain, shifted = (
        create_mixer(WindowConfig(size=4, shift=shift), shape, dtype=torch.float64)(query, key, value, context)
        for shift in ("half", "none", "all")
    )
    for ours, first, second in zip(both, plain, shifted, strict=True):
        torch.testing.assert_close(ours, torch.cat([first[:, :, :2], second[:, :, 2:]], dim=2))
        assert not torch.allclose(first, second)


@golden
@pytest.mark.parametrize("case", [1, 2])
def test_inward_window_is_freeswim(case: int) -> None:
    _, meta = _load(f"freeswim_inward_case{case}")
    down, right = map(int, meta["half_window"].split("x"))
    height, width = map(int, meta["grid"].split("x"))
    sharpness = float(meta["scale"]) * float(meta["dim_head"]) ** 0.5
    config = InwardWindowConfig(half_window=(down, right), sharpness=sharpness)
    _is_the_authors_product(f"freeswim_inward_case{case}", config, (int(meta["frames"]), height, width), None)


def test_inward_window_spelt_out() -> None:
    mixer = create_mixer(InwardWindowConfig(half_window=(1, 2)), LayerShape(2, 4, 8), dtype=torch.float64)

    def sees(height: int, width: int, y: int, x: int, v: int, u: int) -> bool:
        middle = min(max(y, 1), height - 2), min(max(x, 2), width - 3)
        return abs(v - middle[0]) <= 1 and abs(u - middle[1]) <= 2

    _spelt_out(mixer, (2, 4, 7), sees)


def _maxvit_table(meta: dict[str, str]) -> Callable[[torch.Tensor], torch.Tensor]:
    if meta["rel_pos_type"] == "bias_tf":
        return _same
    p, q = map(int, meta["partition"].split("x"))
    return lambda table: table.T.unflatten(1, (2 * p - 1, 2 * q - 1)).flip(1, 2)


@golden
@pytest.mark.parametrize("kind", ["block", "grid"])
@pytest.mark.parametrize("case", [1, 2])
def test_block_grid_is_maxvit(kind: str, case: int) -> None:
    name = f"maxvit_{kind}_case{case}"
    _, meta = _load(name)
    config = BlockGridConfig(partition=tuple(map(int, meta["partition"].split("x"))), kind=kind)
    own: Own = {"bias": ("rel_pos.relative_position_bias_table", _maxvit_table(meta))}
    _is_the_authors_layer(name, config, own, head_first=meta["head_first"] == "True")


@pytest.mark.parametrize("grid", [(1, 7, 6), (2, 4, 5)])
def test_grid_spelt_out(grid: tuple[int, int, int]) -> None:
    mixer = stirred(BlockGridConfig(partition=(2, 3), kind="grid"), LayerShape(2, 4, 8))
    table = mixer.bias.detach()
    apart = -(-grid[1] // 2), -(-grid[2] // 3)

    def sees(height: int, width: int, y: int, x: int, v: int, u: int) -> bool:
        return (v - y) % apart[0] == 0 and (u - x) % apart[1] == 0

    _spelt_out(
        mixer,
        grid,
        sees,
        lambda _h, _w, y, x, v, u: table[:, (v - y) // apart[0] + 1, (u - x) // apart[1] + 2],
    )


@golden
@pytest.mark.parametrize("kind", ["short", "long"])
@pytest.mark.parametrize("case", [1, 2])
def test_long_short_is_crossformer(kind: str, case: int) -> None:
    name = f"crossformer_{'sda' if kind == 'short' else 'lda'}_case{case}"
    _, meta = _load(name)
    config = LongShortConfig(
        size=int(meta["group_size"]),
        interval=int(meta["interval"]),
        kind=kind,
        centred=meta["pad_type"] == "1",
        width=int(meta["pos_dim"]),
    )
    own: Own = {f"input.{kind}": (f"pos.pos_proj.{kind}", _same) for kind in ("weight", "bias")}
    for index in range(3):
        for leaf in ("weight", "bias"):
            own[f"norms.{index}.{leaf}"] = (f"pos.pos{index + 1}.0.{leaf}", _same)
            own[f"layers.{index}.{leaf}"] = (f"pos.pos{index + 1}.2.{leaf}", _same)
    _is_the_authors_layer(name, config, own)


@pytest.mark.parametrize(("grid", "centred"), [((1, 7, 9), False), ((1, 7, 9), True), ((2, 4, 5), False)])
def test_long_groups_spelt_out(grid: tuple[int, int, int], centred: bool) -> None:
    mixer = stirred(LongShortConfig(size=2, interval=2, kind="long", centred=centred), LayerShape(2, 4, 8))
    before = [(-side % 4) // 2 if centred else 0 for side in grid[1:]]

    def sees(height: int, width: int, y: int, x: int, v: int, u: int) -> bool:
        return all(
            (a + pad) // 4 == (b + pad) // 4 and (a - b) % 2 == 0
            for a, b, pad in ((y, v, before[0]), (x, u, before[1]))
        )

    def bias(height: int, width: int, y: int, x: int, v: int, u: int) -> torch.Tensor:
        hidden = mixer.input(torch.tensor([(y - v) // 2, (x - u) // 2], dtype=torch.float64))
        for norm, layer in zip(mixer.norms, mixer.layers, strict=True):
            hidden = layer(norm(hidden).relu())
        return hidden.detach()

    _spelt_out(mixer, grid, sees, bias)


@golden
@pytest.mark.parametrize("case", [1, 2, 3])
def test_routing_is_biformer(case: int) -> None:
    name = f"biformer_bra_case{case}"
    _, meta = _load(name)
    config = RoutingConfig(
        regions=int(meta["n_win"]),
        topk=int(meta["topk"]),
        kernel_size=int(meta["side_dwconv"]),
        soft=meta["soft_routing"] == "True",
        pool=int(meta["kv_downsample_ratio"]),
    )
    height, width = map(int, meta["grid"].split("x"))
    side = config.regions
    _is_the_authors_layer(
        name,
        config,
        {"conv_weight": ("lepe.weight", _same), "conv_bias": ("lepe.bias", _same)},
        qkv="qkv.qkv",
        proj="wo",
        padded=(-(-height // side) * side, -(-width // side) * side),
        scale=float(meta["scale"]),
    )


def test_routing_spelt_out() -> None:
    """Without its reference, which shares the cut into regions: 2 x 3 regions of a 5 x 8 picture."""
    shape = LayerShape(2, 4, 8)
    mixer = create_mixer(RoutingConfig(regions=3, topk=2, kernel_size=0), shape, dtype=torch.float64)
    query, key, value, context = tensors((5, 8), shape, batch=1)
    region = torch.tensor([n // 8 // 2 * 3 + n % 8 // 3 for n in range(40)])
    mixed = mixer(query, key, value, context)
    means = [torch.stack([x[0, region == r].mean(0).flatten() for r in range(9)]) for x in (query, key)]
    for n in range(40):
        chosen = (means[0][region[n]] @ means[1].T).topk(2).indices
        keys = torch.isin(region, chosen)
        scores = torch.einsum("hd,mhd->hm", query[0, n], key[0, keys]) * 0.5
        torch.testing.assert_close(mixed.output[0, n], torch.einsum("hm,mhd->hd", scores.softmax(-1), value[0, keys]))
        torch.testing.assert_close(mixed.log_partition[0, n], scores.logsumexp(-1))


def test_routing_is_of_one_frame() -> None:
    query, key, value, _ = tensors((4, 6), LayerShape(2, 4, 8), dtype=torch.float32)
    with pytest.raises(ValueError, match="one frame, not of 2"):
        create_mixer("routing", LayerShape(2, 4, 8))(query, key, value, Context((2, 4, 3)))


@golden
@pytest.mark.parametrize("case", [1, 2])
def test_positional_is_convit(case: int) -> None:
    saved, meta = _load(f"convit_gpsa_case{case}")
    for prefix in ("param.", "grad."):
        for kind in ("weight", "bias"):
            if f"{prefix}qk.{kind}" in saved:
                saved[f"{prefix}qkv.{kind}"] = torch.cat([saved[f"{prefix}{part}.{kind}"] for part in ("qk", "v")])
    own: Own = {"weight": ("pos_proj.weight", _same), "gate": ("gating_param", _same)}
    _is_the_authors_layer(f"convit_gpsa_case{case}", PositionalConfig(), own, given=(saved, meta))


def test_positional_starts_as_the_authors_do() -> None:
    saved, _ = _load("convit_gpsa_case1") if GOLDEN.is_dir() else ({}, {})
    started = create_mixer(PositionalConfig(), LayerShape(4, 4, 16), dtype=torch.float64).weight
    expected = [[-1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, -1.0], [1.0, 1.0, -1.0]]
    torch.testing.assert_close(started.detach(), saved.get("param.pos_proj.weight", torch.tensor(expected).double()))


def test_positional_spelt_out() -> None:
    """Two frames, one masked key: both softmaxes pair by pair."""
    shape = LayerShape(2, 4, 8)
    mixer = stirred(PositionalConfig(gate=0.5), shape)
    query, key, value, _ = tensors((6, 4), shape, batch=1)
    for mask in (None, torch.arange(24)[None] != 7):
        output = mixer(query, key, value, Context((2, 3, 4), key_mask=mask)).output[0]
        kept = [m for m in range(24) if mask is None or mask[0, m]]
        for n in range(24):
            content = torch.stack([(query[0, n] * key[0, m]).sum(-1) * 0.5 for m in kept], dim=1)
            apart = [(m % 4 - n % 4, m % 12 // 4 - n % 12 // 4) for m in kept]
            features = torch.tensor([[x, y, x * x + y * y] for x, y in apart], dtype=torch.float64)
            place = mixer.weight.detach() @ features.T
            share = mixer.gate.detach().sigmoid()[:, None]
            weights = (1 - share) * content.softmax(-1) + share * place.softmax(-1)
            torch.testing.assert_close(output[n], torch.einsum("hm,mhd->hd", weights, value[0, kept]))


@golden
@pytest.mark.parametrize("case", [1, 2, 3])
def test_outlook_is_volo(case: int) -> None:
    saved, meta = _load(f"volo_outlook_case{case}")
    heads, dim = int(meta["heads"]), int(meta["dim"])
    height, width = map(int, meta["grid"].split("x"))
    config = OutlookConfig(kernel_size=int(meta["kernel_size"]), stride=int(meta["stride"]))
    mixer = create_mixer(config, LayerShape(heads, dim // heads, dim), dtype=torch.float64)
    learned = _with_parameters(mixer, {"weight": ("attn.weight", _same), "bias": ("attn.bias", _same)}, saved)
    names = [name for name in ("v.weight", "v.bias", "proj.weight", "proj.bias") if f"param.{name}" in saved]
    leaves = {name: saved[f"param.{name}"].clone().requires_grad_() for name in names}
    x = saved["x"].flatten(1, 2).requires_grad_()
    for compute in (mixer, mixer.reference):
        value = F.linear(x, leaves["v.weight"], leaves.get("v.bias")).unflatten(-1, (heads, -1))
        mixed = compute(value, value, value, Context((height, width), hidden_states=x)).output.flatten(2)
        out = F.linear(mixed, leaves["proj.weight"], leaves["proj.bias"])
        _near(out, saved["out"])
        wanted = ["grad_x", "grad.attn.weight", "grad.attn.bias", *(f"grad.{name}" for name in names)]
        grads = torch.autograd.grad(out, [x, *learned, *leaves.values()], saved["grad_out"].flatten(1, 2))
        for name, grad in zip(wanted, grads, strict=True):
            _near(grad, saved[name], name)


def test_outlook_asks_for_the_input_of_these_samples() -> None:
    _, _, value, context = tensors((5, 6), LayerShape(2, 4, 8), dtype=torch.float32)
    with pytest.raises(ValueError, match="input is of 2 samples, its values of 1"):
        create_mixer("outlook", LayerShape(2, 4, 8))(value[:1], value[:1], value[:1], context)


def test_outlook_starts_as_a_smoothing_filter() -> None:
    """Without learned weights every token is the mean over the centres' windows, twice."""
    shape = LayerShape(2, 4, 8)
    _, _, value, context = tensors((5, 6), shape)
    mixed = create_mixer("outlook", shape, dtype=torch.float64)(value, value, value, context).output
    picture = value.unflatten(1, (5, 6)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    box = F.avg_pool2d(picture, 3, stride=1, padding=1)  # outside the picture are zeros, which count
    expected = 9 * F.avg_pool2d(box, 3, stride=1, padding=1).unflatten(0, (2, 2)).flatten(3).permute(0, 3, 1, 2)
    torch.testing.assert_close(mixed, expected)


LIMITS = [
    (NeighborhoodConfig(kernel_size=10), "the kernel holds the picture"),
    (NeighborhoodConfig(kernel_size=10, stride=3, bias=False), "the kernel holds the picture"),
    (WindowConfig(size=10), "the window holds the picture"),
    (WindowConfig(size=2, margin=9, bias=False), "the margins do"),
    (InwardWindowConfig(half_window=5), "the window holds the picture"),
    (BlockGridConfig(partition=10), "the partition holds the picture"),
    (RoutingConfig(regions=3, topk=9), "all regions are chosen"),
    (PositionalConfig(gate=-20), "the gate is shut"),
]


@pytest.mark.parametrize(("config", "why"), LIMITS, ids=[f"{c.name}-{w.replace(' ', '-')}" for c, w in LIMITS])
def test_it_is_softmax_where(config: MixerConfig, why: str) -> None:
    """Untrained, with its partition, over one frame and two, with a mask and without."""
    shape = LayerShape(3, 8, 24)
    mixer = create_mixer(config, shape, dtype=torch.float64)
    query, key, value, _ = tensors((10, 7), shape)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) > 0.3
    for grid in ((2, 5, 7), (2, 7, 5)) if "frames" in mixer.supports else ((7, 10), (10, 7)):
        for key_mask in (None, mask):
            mixed = mixer(query, key, value, Context(grid, key_mask=key_mask))
            kept = None if key_mask is None else key_mask[:, None, None]
            atol = 3e-8 if config.name == "positional" else 1e-9  # a gate that is shut still lets 2e-9 through
            torch.testing.assert_close(mixed.output, _softmax(query, key, value, attn_mask=kept), rtol=atol, atol=atol)
            scores = torch.einsum("bnhd,bmhd->bnhm", query, key) * 8**-0.5
            scores = scores if kept is None else scores.masked_fill(~kept, -torch.inf)
            if mixer.exact_partition:
                torch.testing.assert_close(mixed.log_partition, scores.logsumexp(-1), rtol=1e-9, atol=1e-9)


EXAMPLES = [NeighborhoodConfig(), WindowConfig(), BlockGridConfig(), InwardWindowConfig(), LongShortConfig()]


@pytest.mark.parametrize("config", EXAMPLES, ids=[config.name for config in EXAMPLES])
def test_without_gradients_it_goes_in_blocks(config: MixerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatten_diffusion.mixers.parts import sparse

    shape = LayerShape(2, 4, 8)
    mixer = stirred(config, shape, torch.float32)
    query, key, value, _ = tensors((9, 14), shape, dtype=torch.float32)
    whole = mixer(query, key, value, Context((9, 14)))
    monkeypatch.setattr(sparse, "_BLOCK", 3000)
    with torch.no_grad():
        blocked = mixer(query, key, value, Context((9, 14)))
    torch.testing.assert_close(blocked.output, whole.output)
    torch.testing.assert_close(blocked.log_partition, whole.log_partition)


@pytest.mark.parametrize("config", EXAMPLES, ids=[config.name for config in EXAMPLES])
def test_scores_grow_with_the_tokens_and_not_with_their_square(config: MixerConfig) -> None:
    mixer = create_mixer(config, LayerShape(2, 4, 8))

    def scores(side: int) -> int:
        layouts = [mixer.axes((side, side), kind, torch.device("cpu")) for kind, _ in mixer.kinds()]
        return sum(math.prod(axis.queries.numel() * axis.keys.shape[1] for axis in axes) for axes in layouts)

    assert scores(128) <= 17 * scores(32)


def test_a_query_without_any_key_gives_zeros_and_no_mass() -> None:
    shape = LayerShape(2, 4, 8)
    mixer = create_mixer(NeighborhoodConfig(kernel_size=3), shape, dtype=torch.float64)
    query, key, value, _ = tensors((4, 9), shape)
    mask = (torch.arange(36) % 9 > 4).expand(2, -1)
    query.requires_grad_()
    mixed = mixer(query, key, value, Context((4, 9), key_mask=mask))
    empty = torch.arange(36) % 9 < 4
    assert not mixed.output[:, empty].any() and (mixed.log_partition[:, empty] < -100).all()
    assert mixed.output[:, ~empty].all()
    (grad,) = torch.autograd.grad(mixed.output.sum() + mixed.log_partition.sum(), query)
    assert grad.isfinite().all() and not grad[:, empty].any()


@pytest.mark.parametrize("config", EXAMPLES, ids=[config.name for config in EXAMPLES])
def test_grids_are_checked(config: MixerConfig) -> None:
    shape = LayerShape(2, 4, 8)
    mixer = create_mixer(config, shape)
    query, key, value, _ = tensors((4, 6), shape, dtype=torch.float32)
    for grid, message in (((5, 5), "does not hold 24 tokens"), (((1, 2, 6), (1, 2, 6)), "one image"), (None, "image")):
        with pytest.raises(ValueError, match=message):
            mixer(query, key, value, Context(grid))


BAD: list[tuple[type[MixerConfig], dict[str, Any]]] = [
    (NeighborhoodConfig, {"kernel_size": 0}),
    (NeighborhoodConfig, {"kernel_size": 10**6}),
    (NeighborhoodConfig, {"kernel_size": (3, 3, 3)}),
    (NeighborhoodConfig, {"dilation": True}),
    (NeighborhoodConfig, {"stride": 8}),
    (NeighborhoodConfig, {"bias": 1}),
    (WindowConfig, {"size": 65}),
    (WindowConfig, {"margin": -1}),
    (WindowConfig, {"shift": "some"}),
    (WindowConfig, {"zero_keys": None}),
    (InwardWindowConfig, {"half_window": 65}),
    (InwardWindowConfig, {"sharpness": float("nan")}),
    (BlockGridConfig, {"partition": (0, 3)}),
    (BlockGridConfig, {"kind": "cell"}),
    (LongShortConfig, {"interval": 0}),
    (LongShortConfig, {"width": 1}),
    (LongShortConfig, {"kind": 3}),
    (LongShortConfig, {"centred": 0}),
    (RoutingConfig, {"regions": 33}),
    (RoutingConfig, {"topk": 10**6}),
    (RoutingConfig, {"kernel_size": 4}),
    (RoutingConfig, {"soft": "no"}),
    (RoutingConfig, {"pool": 0}),
    (PositionalConfig, {"gate": float("inf")}),
    (PositionalConfig, {"locality": 0}),
    (OutlookConfig, {"kernel_size": 4}),
    (OutlookConfig, {"kernel_size": 9}),
    (OutlookConfig, {"stride": 3}),
]


@pytest.mark.parametrize(("config", "settings"), BAD)
def test_bad_settings_raise_one_line(config: type[MixerConfig], settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is") as error:
        config(**settings)
    assert "\n" not in str(error.value)
