"""Inputs, yardsticks and independent implementations that the operator's tests share."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from flatten_diffusion.ops import focused_linear_attention

# batch, grid, heads, head_dim
MAPS = ("query_map_weight", "query_map_bias", "key_map_weight", "key_map_bias")
SHAPES = [(2, (7, 9), 3, 40), (1, (20, 25), 1, 60), (2, (5, 3), 8, 32), (1, (1, 63), 2, 160), (1, (9, 7), 2, 64)]


def shape_id(shape: tuple[int, tuple[int, int], int, int]) -> str:
    batch, (height, width), heads, head_dim = shape
    return f"B{batch}-N{height}x{width}-H{heads}-D{head_dim}"


def make_inputs(shape, dtype=torch.float64, device="cpu", kernel=3, seed=0, magnitude=1.0, maps=False):
    """Random tensors of one call, as keyword arguments of `attend`; the projections' layout, so heads are views."""
    batch, grid, heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    tokens = math.prod(grid)
    inputs = {
        "query": draw(batch, tokens, heads, head_dim) * magnitude,
        "key": draw(batch, tokens, heads, head_dim) * magnitude,
        "value": draw(batch, tokens, heads, head_dim),
        "scale": F.softplus(draw(heads * head_dim)),
        "conv_weight": draw(heads * head_dim, 1, kernel, kernel),
        "conv_bias": draw(heads * head_dim),
        "grid": grid,
    }
    if maps:
        eye = torch.eye(head_dim, dtype=dtype, device=device)
        for name in ("query_map", "key_map"):
            inputs[f"{name}_weight"] = eye + draw(heads, head_dim, head_dim) * head_dim**-0.5
            inputs[f"{name}_bias"] = draw(heads, head_dim) * magnitude
    return inputs


def attend(function=focused_linear_attention, **arguments):
    """`function` with the tensors of the maps, each of which is an argument of its own here, in pairs."""
    for name in ("query_map", "key_map"):
        if f"{name}_weight" in arguments:
            arguments[name] = arguments.pop(f"{name}_weight"), arguments.pop(f"{name}_bias")
    return function(**arguments)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def run_with_gradients(inputs, **options):
    """Output and the gradient of every tensor, for one fixed random direction."""
    leaves = {k: v.detach().clone().requires_grad_(v.is_floating_point()) if torch.is_tensor(v) else v
              for k, v in inputs.items()}  # fmt: skip
    output = attend(**leaves, **options)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    output.backward(direction.to(output))
    return output.detach(), {k: v.grad for k, v in leaves.items() if torch.is_tensor(v) and v.is_floating_point()}


def loop_focused_attention(
    query, key, value, focusing_factor=3.0, scale=None, conv_weight=None, conv_bias=None, grid=None, key_mask=None,
    **maps,
):  # fmt: skip
    """One token at a time in float64 numpy, from the formula only: shares no line with the package."""
    query, key, value = (t.double().numpy() for t in (query, key, value))
    batch, tokens, heads, head_dim = query.shape
    maps = {name: tensor.double().numpy() for name, tensor in maps.items()}
    divisor = np.ones(heads * head_dim) if scale is None else scale.double().numpy()

    def feature(token, name):  # [H, D]
        if maps:
            rows = [token[h] @ maps[f"{name}_map_weight"][h] + maps[f"{name}_map_bias"][h] for h in range(heads)]
            token = np.stack(rows)
        flat = (np.maximum(token.reshape(-1), 0.0) + 1e-6) / divisor
        raised = flat**focusing_factor
        return (raised * math.sqrt((flat**2).sum()) / math.sqrt((raised**2).sum())).reshape(heads, head_dim)

    output = np.zeros((batch, tokens, heads, head_dim))
    for b in range(batch):
        kept = [m for m in range(key.shape[1]) if key_mask is None or bool(key_mask[b, m])]
        if not kept:
            continue
        features = {m: feature(key[b, m], "key") for m in kept}
        for n in range(tokens):
            feature_n = feature(query[b, n], "query")
            for h in range(heads):
                numerator, normalizer = np.zeros(head_dim), 1e-6
                for m in kept:
                    weight = feature_n[h] @ features[m][h] / len(kept)
                    normalizer += weight
                    numerator += weight * value[b, m, h]
                output[b, n, h] = numerator / normalizer
        if conv_weight is None:
            continue
        kernel, (height, width) = conv_weight.double().numpy().reshape(-1, head_dim, *conv_weight.shape[-2:]), grid
        reach = kernel.shape[-1] // 2
        for n in range(tokens):
            row, column = divmod(n, width)
            for i in range(kernel.shape[-1]):
                for j in range(kernel.shape[-1]):
                    y, x = row + i - reach, column + j - reach
                    if 0 <= y < height and 0 <= x < width and y * width + x in features:
                        output[b, n] += kernel[:, :, i, j] * value[b, y * width + x]
            if conv_bias is not None:
                output[b, n] += conv_bias.double().numpy().reshape(-1, head_dim)
    return torch.from_numpy(output)


def run_plain_with_gradients(inputs):
    """The formula as one would write it, every tensor in the inputs' own dtype."""
    leaves = {k: v.detach().clone().requires_grad_() if torch.is_tensor(v) else v for k, v in inputs.items()}
    query, key, value, heads = leaves["query"], leaves["key"], leaves["value"], inputs["query"].shape[2]

    def feature(x, name):
        if f"{name}_map_weight" in leaves:
            weight, bias = (leaves[f"{name}_map_{part}"].to(x.dtype) for part in ("weight", "bias"))
            x = torch.einsum("bnhd,hde->bnhe", x, weight) + bias
        u = (F.relu(x).flatten(2) + 1e-6) / leaves["scale"]
        norm = u.norm(dim=-1, keepdim=True)
        raised = (u / u.detach().amax(dim=-1, keepdim=True)) ** 3  # plain cubing is NaN in fp16 already here
        return (raised / raised.norm(dim=-1, keepdim=True) * norm).unflatten(-1, (heads, -1))

    q, k = feature(query, "query"), feature(key, "key")
    normalizer = torch.einsum("bnhd,bhd->bnh", q, k.mean(dim=1)) + 1e-6
    state = torch.einsum("bmhd,bmhe->bhde", k / k.shape[1], value)
    output = torch.einsum("bnhd,bhde->bnhe", q, state) / normalizer[..., None]
    images = value.permute(0, 2, 3, 1).reshape(len(value), -1, *inputs["grid"])
    local = F.conv2d(images, leaves["conv_weight"], leaves["conv_bias"], padding=1, groups=images.shape[1])
    output = output + local.reshape(value.shape[0], heads, value.shape[3], -1).permute(0, 3, 1, 2)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    output.backward(direction.to(output))
    return output.detach(), {k: v.grad for k, v in leaves.items() if torch.is_tensor(v)}
