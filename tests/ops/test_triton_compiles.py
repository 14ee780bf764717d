"""Every kernel compiles for Hopper and fits its shared memory, on a machine without a GPU.

The interpreter accepts Python that triton's compiler refuses, so its tests alone prove little about CUDA.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.3", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flatten_diffusion.ops.focused_linear import triton as launcher  # noqa: E402
from flatten_diffusion.ops.focused_linear.arguments import FocusedArguments  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
}


class Recorder:
    """Stands for a kernel: keeps what a launch would compile instead of launching it."""

    def __init__(self, kernel: Any, found: list[tuple[str, ASTSource, dict[str, int]]]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size <= 65535 for size in grid[1:])

        def launch(*arguments: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
            values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
            assert set(values) == set(self.kernel.arg_names)
            signature, constants, attributes = {}, {}, {}
            for index, parameter in enumerate(self.kernel.params):
                value = values[parameter.name]
                constant = parameter.is_constexpr or (isinstance(value, int) and value == 1)
                if constant:
                    signature[parameter.name], constants[parameter.name] = "constexpr", value
                elif isinstance(value, torch.Tensor):
                    signature[parameter.name] = POINTERS[value.dtype]
                else:
                    signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, torch.Tensor) or (isinstance(value, int) and not constant and value % 16 == 0):
                    attributes[(index,)] = [["tt.divisibility", 16]]
            source = ASTSource(self.kernel, signature, constants, attributes)
            self.found.append((self.kernel.fn.__name__, source, options))

        return launch


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "grid", "kernel", "masked", "learned", "maps"),
    [
        (torch.bfloat16, 8, 40, (64, 64), 5, True, True, False),
        (torch.float16, 16, 72, (256, 256), 0, False, False, False),
        (torch.bfloat16, 8, 40, (64, 64), 5, True, True, True),
        (torch.float16, 16, 72, (256, 256), 0, False, False, True),
        (torch.float32, 8, 64, (64, 64), 0, True, True, True),
    ],
    ids=["bf16-D40-conv-mask", "fp16-D72-plain", "bf16-D40-maps", "fp16-D72-maps", "fp32-D64-maps"],
)
def test_compiles_for_hopper(monkeypatch, dtype, heads, head_dim, grid, kernel, masked, learned, maps):
    if type(launcher.kernels.query_kernel).__name__ != "JITFunction":
        pytest.skip("kernels were defined under TRITON_INTERPRET")
    found: list[tuple[str, ASTSource, dict[str, int]]] = []
    for name, function in vars(launcher.kernels).copy().items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(launcher.kernels, name, Recorder(function, found))
    monkeypatch.setattr(launcher, "_processors", lambda device: 132)
    monkeypatch.setattr(launcher, "_on", lambda device: contextlib.nullcontext())

    tokens = math.prod(grid)
    query, key, value = torch.empty(2, tokens, 3, heads, head_dim, dtype=dtype).unbind(2)
    scale = torch.ones(heads * head_dim) if learned else None
    weight = torch.zeros(heads * head_dim, 1, kernel, kernel) if kernel else None
    bias = torch.zeros(heads * head_dim) if kernel else None
    mask = torch.ones(2, tokens, dtype=torch.bool) if masked else None
    pair = (torch.zeros(heads, head_dim, head_dim), torch.zeros(heads, head_dim)) if maps else None
    call = FocusedArguments(query, key, value, scale, pair, pair, weight, bias, mask, 3.0, grid)
    output, means, mean_key, _ = launcher.forward(call)
    if not maps:  # the backward's kernels never see them
        launcher.backward(call, output, means, mean_key)

    expected = {"statistics_kernel", "state_kernel", "query_kernel"} | (set() if maps else {"key_gradient_kernel"})
    assert {name for name, _, _ in found} >= expected
    multiplying = {"state_kernel", "query_kernel"} | ({"statistics_kernel"} if maps else set())
    if dtype == torch.float32:  # exact products, which the matrix units do not have
        multiplying = set()
    for name, source, options in found:
        compiled = triton.compile(source, target=HOPPER, options=options)
        assert compiled.metadata.shared <= SHARED_MEMORY, name
        if name in multiplying:
            text = compiled.asm["ptx"]
            assert "mma" in text, f"{name} does not use the matrix units"
            assert ".v4.b32" in text or "cp.async.cg" in text, f"{name} has no 16-byte accesses"


@pytest.mark.parametrize(("dtype", "head_dim", "masked"), [(torch.bfloat16, 64, True), (torch.float32, 40, False)])
def test_windows_compile_for_hopper(monkeypatch, dtype, head_dim, masked):
    from flatten_diffusion.ops.windows import join as windows
    from flatten_diffusion.ops.windows import triton as windows_triton

    if type(windows_triton.window_kernel).__name__ != "JITFunction":
        pytest.skip("kernels were defined under TRITON_INTERPRET")
    found: list[tuple[str, ASTSource, dict[str, int]]] = []
    monkeypatch.setattr(windows_triton, "window_kernel", Recorder(windows_triton.window_kernel, found))
    monkeypatch.setattr(windows_triton, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(windows, "resolve_backend", lambda *arguments: "triton")
    query, key, value, mixed = torch.zeros(2, 4096, 4, 8, head_dim, dtype=dtype).unbind(2)
    mask = torch.ones(2, 4096, dtype=torch.bool) if masked else None
    windows.join_windows(
        mixed, query, key, value, [(1, 64, 64)], 8, mask, 0.125, torch.zeros(8, 2), torch.zeros(8), "triton"
    )
    ((name, source, options),) = found
    compiled = triton.compile(source, target=HOPPER, options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY, name
    if dtype == torch.bfloat16:
        assert "mma" in compiled.asm["ptx"], "the matrix units are not used"
