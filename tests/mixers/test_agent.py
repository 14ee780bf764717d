"""Agent attention against the authors' own module, and against loops that spell the formula out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from flatten_diffusion.mixers import AgentAttention, AgentConfig, Context, LayerShape, create_mixer

from .registered import stirred, tensors

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "mechanisms"


def _authors(path: Path) -> tuple[AgentAttention, dict[str, torch.Tensor], tuple[int, int], int]:
    """The mixer with the parameters of the authors' module, the file's tensors, the grid and the heads."""
    with safe_open(path, framework="pt") as file:
        saved, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    heads, dim, agents = int(meta["heads"]), int(meta["dim"]), int(meta["agent_num"])
    rows, columns = map(int, meta["grid"].split("x"))
    mixer = create_mixer(AgentConfig(agents=agents), LayerShape(heads, dim // heads, dim), dtype=torch.float64)
    given = {
        "agent_bias": saved["param.an_bias"],
        "token_bias": saved["param.na_bias"],
        "agent_rows": saved["param.ah_bias"].reshape(heads, agents, rows),
        "agent_columns": saved["param.aw_bias"].reshape(heads, agents, columns),
        "token_rows": saved["param.ha_bias"].reshape(heads, rows, agents).transpose(1, 2),
        "token_columns": saved["param.wa_bias"].reshape(heads, columns, agents).transpose(1, 2),
        "conv_weight": saved["param.dwc.weight"],
        "conv_bias": saved["param.dwc.bias"],
    }
    for name, tensor in given.items():
        setattr(mixer, name, nn.Parameter(tensor.clone()))
    assert isinstance(mixer, AgentAttention)
    return mixer, saved, (rows, columns), heads


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the authors' outputs are not here")
@pytest.mark.parametrize("case", [1, 2])
def test_it_is_the_authors_module(case: int) -> None:
    mixer, saved, grid, heads = _authors(GOLDEN / f"agent_case{case}.safetensors")
    x = saved["x"].requires_grad_()
    for compute in (mixer, mixer.reference):
        projections = F.linear(x, saved["param.qkv.weight"], saved.get("param.qkv.bias")).chunk(3, -1)
        mixed = compute(*(p.unflatten(-1, (heads, -1)) for p in projections), Context(grid)).output
        out = F.linear(mixed.flatten(2), saved["param.proj.weight"], saved["param.proj.bias"])
        torch.testing.assert_close(out, saved["out"], rtol=1e-9, atol=1e-9)
        learned = [x, mixer.agent_bias, mixer.token_bias, mixer.conv_weight, mixer.conv_bias, mixer.token_rows]
        grads = torch.autograd.grad(out, learned, saved["grad_out"])
        names = ["grad_x", "grad.an_bias", "grad.na_bias", "grad.dwc.weight", "grad.dwc.bias", "grad.ha_bias"]
        for name, grad in zip(names, grads, strict=True):
            expected = saved[name]
            grad = grad.transpose(1, 2) if name == "grad.ha_bias" else grad
            torch.testing.assert_close(grad.reshape(expected.shape), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", [(7, 9), (3, 5)])
def test_against_loops(grid: tuple[int, int]) -> None:
    """Cells, agents and both softmaxes one by one; without tables, whose resizing is torch's own."""
    shape = LayerShape(2, 6, 12)
    mixer = create_mixer(AgentConfig(agents=4, kernel_size=0, sharpness=0.3), shape, dtype=torch.float64)
    with torch.no_grad():
        mixer.log_factor.copy_(torch.tensor([0.4, -0.2]))
    query, key, value, context = tensors(grid, shape, batch=1)
    height, width = grid
    expected = torch.zeros_like(value)
    for head in range(2):
        agents = []
        for i in range(2):
            for j in range(2):
                rows = range(i * height // 2, -(-(i + 1) * height // 2))
                columns = range(j * width // 2, -(-(j + 1) * width // 2))
                agents.append(torch.stack([query[0, r * width + c, head] for r in rows for c in columns]).mean(0))
        gathered = []
        for agent in agents:
            weights = torch.stack([agent @ key[0, m, head] * 6**-0.5 for m in range(height * width)]).softmax(0)
            gathered.append((weights[:, None] * value[0, :, head]).sum(0))
        scale = 6**-0.15 * torch.tensor(mixer.log_factor[head].item()).exp()
        for n in range(height * width):
            weights = torch.stack([query[0, n, head] @ agent * scale for agent in agents]).softmax(0)
            expected[0, n, head] = sum(w * v for w, v in zip(weights, gathered, strict=True))
    torch.testing.assert_close(mixer(query, key, value, context).output, expected, rtol=1e-6, atol=1e-6)


def test_tables_follow_the_grid_and_grids_are_checked() -> None:
    shape = LayerShape(2, 6, 12)
    mixer = stirred(AgentConfig(agents=4), shape)
    query, key, value, context = tensors((6, 4), shape)
    turned = mixer(query, key, value, Context((4, 6))).output
    assert not torch.allclose(turned, mixer(query, key, value, context).output)
    for grid, message in (((5, 5), "does not hold 24 tokens"), ((2, 3, 4), "one image"), (None, "one image")):
        with pytest.raises(ValueError, match=message):
            mixer(query, key, value, Context(grid))


@pytest.mark.parametrize(
    "settings",
    [
        {"agents": 5},
        {"agents": 0},
        {"agents": True},
        {"kernel_size": 4},
        {"kernel_size": 10**9},
        {"bias_size": 0},
        {"sharpness": float("nan")},
        {"sharpness": "1"},
    ],
)
def test_bad_settings_raise_one_line(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is") as error:
        AgentConfig(**settings)
    assert "\n" not in str(error.value)
