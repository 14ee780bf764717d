"""The linear maps against the authors' own modules, against weights written out pair by pair, and in their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatten_diffusion.mixers import Context, LayerShape, Mixed, Mixer, MixerConfig, create_mixer, mixer_config
from flatten_diffusion.mixers.parts.gated import rotated
from flatten_diffusion.models.projections import SeenAttention

from .registered import stirred, tensors

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "mechanisms"
Saved = dict[str, torch.Tensor]
Compute = Callable[[Saved, dict[str, str]], torch.Tensor]


def authors(*names: str) -> pytest.MarkDecorator:
    """Runs a test on each of the authors' files, which it skips where they are absent."""
    absent = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the authors' outputs are not here")
    return pytest.mark.parametrize("name", [pytest.param(name, marks=absent) for name in names])


def check(name: str, compute: Compute) -> None:
    """Output and every gradient that the file holds, to 1e-9."""
    if not (GOLDEN / f"{name}.safetensors").exists():
        pytest.skip(f"{name} is kept aside")
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        saved, meta = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    inputs = {key: x.requires_grad_() for key, x in saved.items() if f"grad_{key}" in saved and key != "out"}
    learned = {key: saved[key].requires_grad_() for key in saved if key.startswith("param.")}
    out = compute(saved, meta)
    torch.testing.assert_close(out, saved["out"], rtol=1e-9, atol=1e-9)
    leaves = {f"grad_{key}": x for key, x in inputs.items()}
    leaves |= {"grad." + key.removeprefix("param."): x for key, x in learned.items()}
    assert leaves and set(leaves) == {key for key in saved if key.startswith("grad") and key != "grad_out"}
    for key, grad in zip(leaves, torch.autograd.grad(out, list(leaves.values()), saved["grad_out"]), strict=True):
        torch.testing.assert_close(grad, saved[key], rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def both(
    config: MixerConfig, meta: dict[str, str], projections: list[torch.Tensor], context: Context, given: Saved
) -> torch.Tensor:
    """[B, N, H * D]: the mixer's output with the parameters that are `given`, which its reference confirms.

    projections: query, key, value [B, N, H * D].
    """
    heads, channels = int(meta["heads"]), projections[0].shape[-1]
    inputs = 0 if context.hidden_states is None else context.hidden_states.shape[-1]
    mixer = create_mixer(config, LayerShape(heads, channels // heads, inputs or channels), dtype=torch.float64)
    assert set(given) <= set(dict(mixer.named_parameters()))
    query, key, value = (x.unflatten(-1, (heads, -1)) for x in projections)
    mixed: Mixed = functional_call(mixer, given, (query, key, value, context))
    judge = functional_call(Judge(mixer), {f"mixer.{key}": x for key, x in given.items()}, (query, key, value, context))
    torch.testing.assert_close(mixed.output, judge.output, rtol=1e-9, atol=1e-9)
    return mixed.output.flatten(2)


class Judge(torch.nn.Module):
    """A mixer's reference as a module."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, *args: torch.Tensor) -> Mixed:
        return self.mixer.reference(*args)


def linear(saved: Saved, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, saved[f"param.{name}.weight"], saved.get(f"param.{name}.bias"))


def by_pairs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """sum_j w(q_i, k_j) v_j / sum_j w(q_i, k_j), pair by pair; weight takes query, key and head."""
    out = torch.zeros_like(value)
    for b, n, h in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        weights = torch.stack([weight(query[b, n, h], key[b, m, h], h) for m in range(key.shape[1])])
        out[b, n, h] = (weights[:, None] * value[b, :, h]).sum(0) / weights.sum()
    return out


NAMES = (
    "angular",
    "elu",
    "hedgehog",
    "inline",
    "linfusion",
    "mala",
    "multi-scale",
    "polarity",
    "rala",
    "relu",
    "taylor",
)
NAMES += ("vicinity",)
SHAPE = LayerShape(3, 8, 24)
GRID = (2, 5)


@authors("sana_litela_case1", "sana_litela_case2", "sana_litela_case3")
def test_relu_is_the_authors(name: str) -> None:
    def compute(saved: Saved, meta: dict[str, str]) -> torch.Tensor:
        query, key, value = linear(saved, "qkv", saved["x"]).chunk(3, -1)
        if "param.q_norm.weight" in saved:  # which the layer does before the mixer
            query = F.rms_norm(query, query.shape[-1:], saved["param.q_norm.weight"], 1e-5)
            key = F.rms_norm(key, key.shape[-1:], saved["param.k_norm.weight"], 1e-5)
        return linear(saved, "proj", both(mixer_config("relu"), meta, [query, key, value], Context(), {}))

    check(name, compute)


def test_relu_pair_by_pair() -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    mixer = create_mixer("relu", SHAPE, dtype=torch.float64)
    expected = by_pairs(query, key, value, lambda q, k, _: (q.relu() * k.relu()).sum())
    torch.testing.assert_close(mixer(query, key, value, context).output, expected, rtol=1e-9, atol=1e-9)
    dead = query.masked_fill(torch.arange(query.shape[1])[None, :, None, None] == 3, -1.0)
    assert not mixer(dead, key, value, context).output[:, 3].any()  # no feature above zero: zero, not NaN


@authors("linfusion_case3")
def test_elu_is_the_authors_without_its_mlps(name: str) -> None:
    def compute(saved: Saved, meta: dict[str, str]) -> torch.Tensor:
        x = saved["x"]
        projections = [linear(saved, "to_q", 2 * x), linear(saved, "to_k", 2 * x), linear(saved, "to_v", x)]
        return linear(saved, "to_out.0", both(mixer_config("elu"), meta, projections, Context(), {}))

    check(name, compute)


def test_elu_pair_by_pair() -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    mixer = stirred(mixer_config("elu"), SHAPE)
    mixer.eps = 0.0

    def phi(x: torch.Tensor, head: int) -> torch.Tensor:
        x = x * mixer.log_scale[head].exp()
        return torch.stack([t + 1 if t > 0 else t.exp() for t in x])

    expected = by_pairs(query, key, value, lambda q, k, h: (phi(q, h) * phi(k, h)).sum())
    torch.testing.assert_close(mixer(query, key, value, context).output, expected, rtol=1e-9, atol=1e-9)


@authors("linfusion_case1", "linfusion_case2")
def test_linfusion_is_the_authors(name: str) -> None:
    def compute(saved: Saved, meta: dict[str, str]) -> torch.Tensor:
        x = saved["x"]
        given = {}
        for ours, theirs in (("query_mlp", "to_q_"), ("key_mlp", "to_k_")):
            for part in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"):
                given[f"{ours}.{part}"] = saved[f"param.{theirs}.{part}"]
            project = saved[f"param.{theirs[:-1]}.weight"]  # their correction stands before the projection
            given |= {f"{ours}.3.{part}": project @ given[f"{ours}.3.{part}"] for part in ("weight", "bias")}
        width = len(saved["param.to_q_.0.weight"])
        projections = [linear(saved, f"to_{part}", x) for part in "qkv"]
        config = mixer_config({"name": "linfusion", "width": width})
        return linear(saved, "to_out.0", both(config, meta, projections, Context(hidden_states=x), given))

    check(name, compute)


def test_linfusion_without_its_mlps_is_elu() -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    mixer, plain = create_mixer("linfusion", SHAPE, dtype=torch.float64), create_mixer("elu", SHAPE)
    near = mixer(query, key, value, context).output
    expected = plain.double()(query, key, value, context).output
    assert 0 < (near - expected).norm() / expected.norm() < 1e-2  # it starts next to it
    with torch.no_grad():
        for mlp in (mixer.query_mlp, mixer.key_mlp):
            mlp[-1].weight.zero_()
    torch.testing.assert_close(mixer(query, key, value, context).output, expected, rtol=1e-12, atol=1e-12)


def qkv(saved: Saved) -> list[torch.Tensor]:
    return list(linear(saved, "qkv", saved["x"]).chunk(3, -1))


@authors("vitality_taylor_case1", "vitality_taylor_case2")
def test_taylor_is_the_published_form(name: str) -> None:
    check(name, lambda s, m: linear(s, "proj", both(mixer_config("taylor"), m, qkv(s), Context(), {})))


def test_taylor_pair_by_pair() -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    mixer = stirred(mixer_config("taylor"), SHAPE)
    centred = key - key.mean(1, keepdim=True)
    expected = by_pairs(query, centred, value, lambda q, k, h: 1 + mixer.contrast[h] * 0.3 * (q @ k))
    found = mixer(query, key, value, context._replace(scale=0.3)).output
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_taylor_is_softmax_where_scores_are_small() -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    errors = []
    for factor in (1e-2, 1e-3):
        softmax = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (factor * query, key, value)))
        found = create_mixer("taylor", SHAPE, dtype=torch.float64)(factor * query, key, value, context).output
        errors.append((found - softmax.transpose(1, 2)).norm())
    assert errors[1] < 1.1e-2 * errors[0]  # the second order is what is missing


INLINE = ["inline_case1", "inline_case2", "inline_case3", "inline_grid_case1", "inline_grid_case2"]


@authors(*INLINE)
def test_inline_is_the_authors(name: str) -> None:
    def compute(saved: Saved, meta: dict[str, str]) -> torch.Tensor:
        heads, x, kind = int(meta["heads"]), saved["x"], meta.get("kernel_func", "identity")
        dim = x.shape[-1] // heads
        projections = qkv(saved) if "param.qkv.weight" in saved else [linear(saved, "q", x)]
        projections += [] if len(projections) == 3 else linear(saved, "kv", x).chunk(2, -1)
        given = {
            "mix_weight": saved["param.residual.0.weight"].reshape(heads, dim, dim),
            "mix_bias": saved["param.residual.0.bias"].reshape(heads, dim),
            "tap_weight": saved["param.residual.2.weight"].reshape(heads, 9 * dim, dim),
            "tap_bias": saved["param.residual.2.bias"].reshape(heads, 9 * dim),
        }
        config = mixer_config({"name": "inline", "feature_map": "leaky_relu" if kind == "leakyrelu" else kind})
        context = Context(tuple(map(int, meta["grid"].split("x"))), hidden_states=x)
        return linear(saved, "proj", both(config, meta, projections, context, given))

    check(name, compute)


def test_inline_pair_by_pair() -> None:
    """The kernels predicted and applied one by one."""
    query, key, value, context = tensors(GRID, SHAPE)
    mixer = stirred(mixer_config({"name": "inline", "feature_map": "exp"}), SHAPE)
    phi = [(0.2 * x).exp() for x in (query, key)]
    mean = phi[1].mean(1)
    expected = torch.zeros_like(value)
    for b, n, h in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        for m in range(key.shape[1]):
            score = phi[0][b, n, h] @ (phi[1][b, m, h] - mean[b, h]) * 8**-0.5 * mixer.contrast[h]
            expected[b, n, h] += (1 + score) / key.shape[1] * value[b, m, h]
        read = context.hidden_states[b].mean(0)[8 * h : 8 * h + 8]
        taps = mixer.tap_weight[h] @ F.gelu(mixer.mix_weight[h] @ read + mixer.mix_bias[h]) + mixer.tap_bias[h]
        for i, j in ((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
            row, column = n // GRID[1] + i, n % GRID[1] + j
            if 0 <= row < GRID[0] and 0 <= column < GRID[1]:
                kernel = taps.reshape(8, 3, 3)[:, i + 1, j + 1]
                expected[b, n, h] += kernel * value[b, row * GRID[1] + column, h]
    torch.testing.assert_close(mixer(query, key, value, context).output, expected, rtol=1e-9, atol=1e-9)


def test_inline_of_the_identity_is_taylor() -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    inline = create_mixer(mixer_config({"name": "inline", "kernel_size": 0}), SHAPE, dtype=torch.float64)
    taylor = create_mixer("taylor", SHAPE, dtype=torch.float64)
    expected = taylor.reference(query, key, value, context).output
    torch.testing.assert_close(inline(query, key, value, context).output, expected, rtol=1e-12, atol=1e-12)


def test_inline_needs_a_grid_that_holds_the_tokens_and_takes_channels_that_heads_do_not_divide() -> None:
    query, key, value, context = tensors(GRID, SHAPE._replace(channels=25))
    mixer = stirred(mixer_config("inline"), SHAPE._replace(channels=25))
    frames = mixer(query, key, value, context._replace(grid=(2, 1, 5))).output
    assert not torch.allclose(frames, mixer(query, key, value, context).output)  # each frame by itself
    for grid in (None, (3, 3)):
        with pytest.raises(ValueError, match="holds 10 tokens"):
            mixer(query, key, value, context._replace(grid=grid))


@authors("castling_linear_angular_case1", "castling_linear_angular_case2")
def test_angular_is_the_authors(name: str) -> None:
    def compute(saved: Saved, meta: dict[str, str]) -> torch.Tensor:
        given = {"filter": saved["param.dconv.weight"][:, 0, :, 0]}
        config = mixer_config({"name": "angular", "taps": int(meta["res_kernel_size"])})
        return linear(saved, "proj", both(config, meta, qkv(saved), Context(), given))

    check(name, compute)


def test_angular_pair_by_pair() -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    mixer = stirred(mixer_config({"name": "angular", "taps": 5}), SHAPE)
    expected = torch.zeros_like(value)
    for b, n, h in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        total = value[b, n, h] / 2
        for m in range(key.shape[1]):
            q, k = query[b, n, h], key[b, m, h]
            total = total + (q @ k) / q.norm() / k.norm() / math.pi * value[b, m, h]
        total = mixer.gain[h] * total / total.norm()
        for tap in range(5):
            if 0 <= n + tap - 2 < key.shape[1]:
                total = total + mixer.filter[h, tap] * value[b, n + tap - 2, h]
        expected[b, n, h] = total
    torch.testing.assert_close(mixer(query, key, value, context).output, expected, rtol=1e-9, atol=1e-9)
    zeros = mixer(query * 0, key * 0, value * 0, context).output
    assert zeros.isfinite().all() and not zeros.any()


@authors("hedgehog_case1", "hedgehog_case2", "hedgehog_case3")
def test_hedgehog_is_the_authors(name: str) -> None:
    def compute(saved: Saved, meta: dict[str, str]) -> torch.Tensor:
        heads, dim, width = (int(meta[key]) for key in ("heads", "head_dim", "feature_dim"))
        skip, kind = meta["skip_connection"] == "True", meta["activation"].removesuffix("_dim")
        settings = {"name": "hedgehog", "activation": kind, "skip": skip, "feature_dim": 0 if skip else width}
        given = {f"{part}_map": saved[f"param.{part[0]}_map.mlp.layer"] for part in ("query", "key")}
        tokens = [saved[part].transpose(1, 2) for part in "qkv"]
        if meta["causal"] == "False":
            mixed = both(mixer_config(settings), meta, [x.flatten(2) for x in tokens], Context(), given)
            return mixed.unflatten(-1, (heads, dim)).transpose(1, 2)
        mixer = create_mixer(mixer_config(settings), LayerShape(heads, dim, heads * dim), dtype=torch.float64)
        for part, weight in given.items():  # the maps alone: no mixer here is causal
            del mixer._parameters[part]
            setattr(mixer, part, weight)
        query, key = mixer.features(*tokens[:2], Context())
        weights = torch.einsum("bnhf,bmhf->bhnm", query, key).tril()
        return weights @ saved["v"] / (weights.sum(-1, keepdim=True) + 1e-12)

    check(name, compute)


@pytest.mark.parametrize("settings", [{"skip": True}, {"feature_dim": 3, "activation": "exp"}])
def test_hedgehog_pair_by_pair(settings: dict) -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    mixer = stirred(mixer_config({"name": "hedgehog", **settings}), SHAPE)

    def phi(x: torch.Tensor, weight: torch.Tensor, head: int) -> torch.Tensor:
        x = x * mixer.log_scale[head].exp()
        up = x @ weight[head] + (x if mixer.config.skip else 0)
        if mixer.config.activation == "exp":
            return torch.cat([(up - up.max()).exp(), (up.min() - up).exp()])
        return torch.cat([up.exp() / up.exp().sum(), (-up).exp() / (-up).exp().sum()])

    def weight(q: torch.Tensor, k: torch.Tensor, head: int) -> torch.Tensor:
        return phi(q, mixer.query_map, head) @ phi(k, mixer.key_map, head)

    expected = by_pairs(query, key, value, weight)
    torch.testing.assert_close(mixer(query, key, value, context).output, expected, rtol=1e-9, atol=1e-9)


def gated(name: str, saved: Saved, meta: dict[str, str]) -> torch.Tensor:
    """A mixer of the form of RALA and MALA as their authors' module, images [B, C, H, W] in and out."""
    heads, x, channels = int(meta["heads"]), saved["x"].flatten(2).transpose(1, 2), int(meta["dim"])
    weights, biases = saved["param.qkvo.weight"].flatten(1).split(channels), saved["param.qkvo.bias"].split(channels)
    projections = [F.linear(x, weight, bias) for weight, bias in zip(weights[:3], biases[:3], strict=True)]
    given = {"conv_weight": saved["param.lepe.weight"], "conv_bias": saved["param.lepe.bias"]}
    given |= {"gate_weight": weights[3], "gate_bias": biases[3]}
    grid = tuple(map(int, meta["grid"].split("x")))
    angles = rotated(torch.ones(1, grid[0] * grid[1], 1, channels // heads, dtype=torch.float64), grid)[0, :, 0]
    cos, sin = saved["aux.cos"], saved["aux.sin"]
    torch.testing.assert_close(angles[:, 1::2], cos[:, 1::2] + sin[:, 1::2], rtol=1e-9, atol=1e-9)
    config = mixer_config({"name": name, "rotary": True})
    mixed = both(config, meta, projections, Context(grid, hidden_states=x), given)
    out = F.linear(mixed, saved["param.proj.weight"].flatten(1), saved["param.proj.bias"])
    return out.transpose(1, 2).reshape(saved["out"].shape)


def turned(x: torch.Tensor, n: int) -> torch.Tensor:
    """A query or key of 8 channels at token n, turned by row and column."""
    row, column = divmod(n, GRID[1])
    parts = []
    for pair, angle in enumerate((row, row * 1e-4, column, column * 1e-4)):
        a, b = x[2 * pair], x[2 * pair + 1]
        parts += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.stack(parts)


def elu_features(x: torch.Tensor, mixer: Mixer) -> torch.Tensor:
    x = x * mixer.log_scale.exp()[:, None]
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


@authors("mala_case1", "mala_case2")
def test_mala_is_the_authors(name: str) -> None:
    check(name, lambda saved, meta: gated("mala", saved, meta))


@pytest.mark.parametrize("rotary", [False, True])
def test_mala_pair_by_pair(rotary: bool) -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    mixer = stirred(mixer_config({"name": "mala", "rotary": rotary, "kernel_size": 0}), SHAPE)
    expected = torch.zeros_like(value)
    queries, keys, count = elu_features(query, mixer), elu_features(key, mixer), key.shape[1]
    for b, n, h in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        mass = 8**-0.5 * sum(queries[b, n, h] @ keys[b, m, h] for m in range(count)) / count
        total = 0
        for m in range(count):
            pair = (queries[b, n, h], keys[b, m, h])
            q, k = (turned(pair[0], n), turned(pair[1], m)) if rotary else pair
            total = total + ((1 + 1 / (mass + 1e-6)) * 8**-0.5 * (q @ k) - mass) / count * value[b, m, h]
        rows = slice(8 * h, 8 * h + 8)
        expected[b, n, h] = total * (mixer.gate_weight[rows] @ context.hidden_states[b, n] + mixer.gate_bias[rows])
    torch.testing.assert_close(mixer(query, key, value, context).output, expected, rtol=1e-9, atol=1e-9)


@authors("rala_case1", "rala_case2", "rala_case3")
def test_rala_is_the_authors(name: str) -> None:
    check(name, lambda saved, meta: gated("rala", saved, meta))


@pytest.mark.parametrize("rotary", [False, True])
def test_rala_pair_by_pair(rotary: bool) -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    mixer = stirred(mixer_config({"name": "rala", "rotary": rotary, "kernel_size": 0}), SHAPE)
    expected = torch.zeros_like(value)
    queries, keys, count = elu_features(query, mixer), elu_features(key, mixer), key.shape[1]
    for b, n, h in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        mean = queries[b, :, h].mean(0)
        share = torch.stack([(mean @ keys[b, m, h] * 0.3).exp() for m in range(count)])
        share = share / share.sum()
        total, mass = 0, 0
        for m in range(count):
            pair = (queries[b, n, h], count * share[m] * keys[b, m, h])
            q, k = (turned(pair[0], n), turned(pair[1], m)) if rotary else pair
            total, mass = total + (q @ k) / count * value[b, m, h], mass + pair[0] @ pair[1] / count
        rows = slice(8 * h, 8 * h + 8)
        gate = mixer.gate_weight[rows] @ context.hidden_states[b, n] + mixer.gate_bias[rows]
        expected[b, n, h] = total / (mass + 1e-6) * gate
    found = mixer(query, key, value, context._replace(scale=0.3)).output
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@authors("polaformer_case1", "polaformer_case2", "polaformer_swin_case1")
def test_polarity_is_the_authors(name: str) -> None:
    def compute(saved: Saved, meta: dict[str, str]) -> torch.Tensor:
        heads, channels, x = int(meta["heads"]), int(meta["dim"]), saved["x"]
        grid = tuple(map(int, meta["grid"].split("x")))
        parts: Saved = {}
        for layer, names in (("qg", "qg"), ("kv", "kv"), ("qkvg", "qkvg")):
            if f"param.{layer}.weight" in saved:
                weights = saved[f"param.{layer}.weight"].split(channels)
                bias = saved.get(f"param.{layer}.bias", x.new_zeros(len(names) * channels)).split(channels)
                parts |= {f"{n}.weight": w for n, w in zip(names, weights, strict=True)}
                parts |= {f"{n}.bias": b for n, b in zip(names, bias, strict=True)}
        given = {
            "gate_weight": parts["g.weight"],
            "gate_bias": parts["g.bias"],
            "scale": saved["param.scale"].flatten(),
            "power": saved["param.power"].reshape(heads, -1),
            "position": saved["param.positional_encoding"][0].T.reshape(channels, *grid),
            "conv_weight": saved["param.dwc.weight"].repeat(heads, 1, 1, 1),  # one kernel for all heads
            "conv_bias": saved["param.dwc.bias"].repeat(heads),
        }
        settings = {"name": "polarity", "alpha": float(meta["alpha"]), "kernel_size": int(meta["kernel_size"])}
        projections = [F.linear(x, parts[f"{n}.weight"], parts[f"{n}.bias"]) for n in "qkv"]
        mixed = both(mixer_config(settings), meta, projections, Context(grid, hidden_states=x), given)
        return linear(saved, "proj", mixed)

    check(name, compute)


def test_polarity_pair_by_pair() -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    config = mixer_config({"name": "polarity", "alpha": 2, "kernel_size": 0, "gate": False, "position_size": 0})
    mixer = stirred(config, SHAPE)
    tau = (1 + mixer.scale.exp()).log().reshape(3, 8)
    power = 1 + 2 / (1 + (-mixer.power).exp())

    def weight(q: torch.Tensor, k: torch.Tensor, head: int, sign: int) -> torch.Tensor:
        terms = []
        for c in range(8):
            same = sign * q[c] * k[c] > 0
            terms.append((q[c].abs() * k[c].abs() / tau[head, c] ** 2) ** power[head, c] if same else 0 * q[c])
        return torch.stack(terms).sum()

    found = mixer(query, key, value, context).output
    for sign, half in ((1, slice(0, 4)), (-1, slice(4, 8))):
        expected = by_pairs(query, key, value, lambda q, k, h, sign=sign: weight(q, k, h, sign))
        torch.testing.assert_close(found[..., half], expected[..., half], rtol=1e-4, atol=1e-4)  # but for its eps


def test_positions_follow_the_grid() -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    mixer = stirred(mixer_config({"name": "polarity", "gate": False, "kernel_size": 0, "position_size": 2}), SHAPE)
    found = mixer(query, key, value, context).output
    table = F.interpolate(mixer.position[None], size=GRID, mode="bilinear", align_corners=False)
    moved = key + table[0].flatten(1).T.unflatten(1, (3, 8))
    with torch.no_grad():
        mixer.position.zero_()
    torch.testing.assert_close(mixer(query, moved, value, context).output, found, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="holds 10 tokens"):
        mixer(query, key, value, context._replace(grid=(3, 3)))


def kept(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == 0, x, x.sign() * x.abs().clamp(1e-4, 1e4))


@authors("vicinity_case1", "vicinity_case2", "vicinity_case4", "vicinity_case5")
def test_vicinity_is_the_authors_before_its_gate(name: str) -> None:
    def compute(saved: Saved, meta: dict[str, str]) -> torch.Tensor:
        x = saved["x"]
        config = mixer_config({"name": "vicinity", "combine": "sum" if meta["use_sum"] == "True" else "product"})
        projections = [linear(saved, f"{part}_proj", x) for part in "qkv"]
        mixed = both(config, meta, projections, Context(tuple(map(int, meta["grid"].split("x")))), {})
        out = kept(linear(saved, "out_proj", mixed))
        gate = linear(saved, "se_fc.2", linear(saved, "se_fc.0", x.mean(1, keepdim=True)).relu()).sigmoid()
        return kept(out + out * gate)

    check(name, compute)


@pytest.mark.parametrize("combine", ["sum", "product"])
def test_vicinity_pair_by_pair(combine: str) -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    mixer = create_mixer(mixer_config({"name": "vicinity", "combine": combine}), SHAPE, dtype=torch.float64)
    expected = torch.zeros_like(value)
    for b, n, h in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        weights = []
        for m in range(key.shape[1]):
            row, column = n // GRID[1] - m // GRID[1], n % GRID[1] - m % GRID[1]
            cosines = [math.cos(math.pi / 2 * row / GRID[0]), math.cos(math.pi / 2 * column / GRID[1])]
            near = sum(cosines) if combine == "sum" else math.prod(cosines)
            weights.append(query[b, n, h].relu() @ key[b, m, h].relu() * near)
        total = torch.stack(weights)
        expected[b, n, h] = (total[:, None] * value[b, :, h]).sum(0) / (total.sum() + 1e-4)
    torch.testing.assert_close(mixer(query, key, value, context).output, expected, rtol=1e-4, atol=1e-3)  # but clamps


@authors("efficientvit_litemla_case1", "efficientvit_litemla_case2", "efficientvit_litemla_case3")
def test_multi_scale_is_the_authors(name: str) -> None:
    def compute(saved: Saved, meta: dict[str, str]) -> torch.Tensor:
        heads, dim, x = int(meta["heads"]), int(meta["head_dim"]), saved["x"].flatten(2).transpose(1, 2)
        scales = tuple(map(int, meta["scales"].split(",")))
        channels = heads * dim

        def by_kind(tensor: torch.Tensor) -> torch.Tensor:  # they have q, k and v of one head beside one another
            return tensor.unflatten(0, (heads, 3, dim)).transpose(0, 1)

        def bias_of(layer: str) -> torch.Tensor:
            return saved.get(f"param.{layer}.bias", x.new_zeros(3 * channels))

        weights, biases = by_kind(saved["param.qkv.conv.weight"].flatten(1)), by_kind(bias_of("qkv.conv"))
        projections = [F.linear(x, w.flatten(0, 1), b.flatten()) for w, b in zip(weights, biases, strict=True)]
        project, *others = saved["param.proj.conv.weight"].flatten(1).split(channels, dim=1)
        given = {}
        for i, columns in enumerate(others):
            given[f"depth_weight.{i}"] = by_kind(saved[f"param.aggreg.{i}.0.weight"]).flatten(0, 2)
            given[f"depth_bias.{i}"] = by_kind(bias_of(f"aggreg.{i}.0")).flatten()
            given[f"mix_weight.{i}"] = by_kind(saved[f"param.aggreg.{i}.1.weight"].flatten(1))
            given[f"mix_bias.{i}"] = by_kind(bias_of(f"aggreg.{i}.1"))
            given[f"join_weight.{i}"] = torch.linalg.solve(project, columns)
        grid = tuple(map(int, meta["grid"].split("x")))
        config = mixer_config({"name": "multi-scale", "scales": scales})
        out = F.linear(
            both(config, meta, projections, Context(grid), given), project, saved.get("param.proj.conv.bias")
        )
        mean, variance = (saved[f"buffer.proj.norm.running_{kind}"] for kind in ("mean", "var"))
        out = (out - mean) / (variance + 1e-5).sqrt() * saved["param.proj.norm.weight"] + saved["param.proj.norm.bias"]
        return out.transpose(1, 2).reshape(saved["out"].shape)

    check(name, compute)


def test_multi_scale_pair_by_pair() -> None:
    """Means of neighbourhoods taken one by one, as it starts; with a join of its own."""
    query, key, value, context = tensors(GRID, SHAPE)
    mixer = create_mixer(mixer_config({"name": "multi-scale", "scales": [3]}), SHAPE, dtype=torch.float64)
    means = [torch.zeros_like(x) for x in (query, key, value)]
    for n in range(query.shape[1]):
        for i, j in ((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
            row, column = n // GRID[1] + i, n % GRID[1] + j
            if 0 <= row < GRID[0] and 0 <= column < GRID[1]:
                for mean, x in zip(means, (query, key, value), strict=True):
                    mean[:, n] += x[:, row * GRID[1] + column] / 9
    plain, near = (by_pairs(*x, lambda q, k, _: (q.relu() * k.relu()).sum()) for x in ((query, key, value), means))
    joined = torch.einsum("ij,bnj->bni", mixer.join_weight[0], near.flatten(2)).reshape(near.shape)
    torch.testing.assert_close(mixer(query, key, value, context).output, plain + joined, rtol=1e-9, atol=1e-9)
    assert 0 < joined.norm() < 0.05 * plain.norm()  # it starts next to the relu's


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_linear_in_the_tokens(name: str) -> None:
    shape, found = LayerShape(1, 4, 4), []
    for side in (32, 128):  # 1,024 and 16,384 tokens
        query, key, value, context = tensors((side, side), shape, batch=1, dtype=torch.float32)
        with Largest() as largest, torch.no_grad():
            create_mixer(name, shape)(query, key, value, context)
        found.append(largest.elements)
    assert found[1] <= 16 * found[0] and found[0] < 1024 * 128


@pytest.mark.parametrize("name", ["linfusion", "inline", "mala", "rala", "polarity"])
def test_masked_slots_of_the_input_are_not_read(name: str) -> None:
    query, key, value, context = tensors(GRID, SHAPE)
    mask = torch.arange(key.shape[1])[None].expand(2, -1) < torch.tensor([[7], [4]])
    hidden = context.hidden_states
    poisoned = hidden.masked_fill(~mask[..., None], math.nan)
    mixer = stirred(mixer_config(name), SHAPE)
    learned = list(mixer.parameters())
    found = []
    for states in (hidden, poisoned):
        out = mixer(query, key, value, context._replace(key_mask=mask, hidden_states=states)).output[mask]
        found.append((out, torch.autograd.grad(out.sum(), learned)))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert all(grad.isfinite().all() for grad in found[1][1])


def test_native_code_that_runs_sample_by_sample_gets_each_samples_input() -> None:
    hidden = torch.arange(12.0).reshape(3, 2, 2)
    seen = SeenAttention(torch.nn.Linear(2, 2), {}, hidden)
    assert torch.equal(torch.cat([seen.input_of(1) for _ in range(3)]), hidden)
    assert SeenAttention(torch.nn.Linear(2, 2), {}, hidden).input_of(3) is hidden


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "linfusion", "width": -1},
        {"name": "linfusion", "width": True},
        {"name": "inline", "feature_map": "tanh"},
        {"name": "inline", "kernel_size": 9},
        {"name": "inline", "kernel_size": True},
        {"name": "hedgehog", "feature_dim": 10**9},
        {"name": "hedgehog", "activation": "relu"},
        {"name": "hedgehog", "skip": 1},
        {"name": "mala", "kernel_size": 4},
        {"name": "mala", "kernel_size": 33},
        {"name": "mala", "gate": None},
        {"name": "mala", "rotary": "yes"},
        {"name": "rala", "rotary": 1},
        {"name": "polarity", "alpha": 0},
        {"name": "polarity", "alpha": float("nan")},
        {"name": "polarity", "position_size": 65},
        {"name": "vicinity", "combine": None},
        {"name": "multi-scale", "scales": []},
        {"name": "multi-scale", "scales": [4]},
        {"name": "multi-scale", "scales": 5},
        {"name": "angular", "taps": 4},
        {"name": "angular", "taps": 10**9},
    ],
)
def test_bad_settings_raise_one_line(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"{list(settings)[1]} is") as error:
        mixer_config(settings)
    assert "\n" not in str(error.value)
