"""The kernel of windows on a CUDA device: the interpreter's cases, a real size, and a graph."""

from __future__ import annotations

import pytest
import torch

from tests.ops.focused_cases import relative_error
from tests.ops.window_cases import CASES, make_windows, run_windows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LARGE = [((2, 8, 64), ((1, 128, 96),), 8, False), ((1, 4, 72), ((3, 20, 33), (1, 9, 9)), 8, True)]


def setup_module() -> None:
    pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sizes", "pictures", "size", "masked"), CASES + LARGE)
def test_against_float64(sizes, pictures, size, masked, dtype):
    tensors, mask, gain, bias = make_windows(sizes, pictures, masked, dtype, "cuda")
    output, log_mass = run_windows(tensors, pictures, size, mask, gain, bias, "triton")
    wide = [tensor.double() for tensor in tensors]
    expected, expected_mass = run_windows(wide, pictures, size, mask, gain.double(), bias.double(), "eager")
    assert relative_error(output, expected) < 4 * torch.finfo(dtype).eps
    assert (log_mass - expected_mass).abs().max() < 20 * torch.finfo(dtype).eps
