"""The kernel of windows under triton's interpreter. `test_triton_interpreter.py` runs this file."""

from __future__ import annotations

import os

import pytest
import torch

from .focused_cases import relative_error
from .window_cases import CASES, make_windows, run_windows

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_interpreter.py, which sets the environment"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sizes", "pictures", "size", "masked"), CASES)
def test_against_float64(sizes, pictures, size, masked, dtype):
    tensors, mask, gain, bias = make_windows(sizes, pictures, masked, dtype)
    output, log_mass = run_windows(tensors, pictures, size, mask, gain, bias, "triton")
    wide = [tensor.double() for tensor in tensors]
    expected, expected_mass = run_windows(wide, pictures, size, mask, gain.double(), bias.double(), "eager")
    assert output.dtype == dtype and log_mass.dtype == torch.float32
    assert relative_error(output, expected) < 4 * torch.finfo(dtype).eps
    assert (log_mass - expected_mass).abs().max() < 20 * torch.finfo(dtype).eps


def test_masked_slots_and_new_memory_may_hold_anything():
    sizes, pictures, size = (2, 2, 20), ((1, 6, 7),), 4
    tensors, mask, gain, bias = make_windows(sizes, pictures, True, torch.float32)
    mask[1] = False
    expected = run_windows(tensors, pictures, size, mask, gain, bias, "triton")
    poisoned = [tensors[0], *(x.masked_fill(~mask[:, :, None, None], float("nan")) for x in tensors[1:3]), tensors[3]]
    torch.use_deterministic_algorithms(True)  # torch fills new memory with NaN
    try:
        assert torch.empty(2).isnan().all()
        output = run_windows(poisoned, pictures, size, mask, gain, bias, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, whole in zip(output, expected, strict=True):
        assert torch.equal(ours, whole)
    assert relative_error(output[0][1], tensors[3][1]) < 1e-5  # without any key there is only what is joined


def test_windows_too_large_for_the_kernel_run_in_blocks():
    sizes, pictures = (1, 1, 16), ((1, 13, 14),)
    tensors, mask, gain, bias = make_windows(sizes, pictures, False, torch.float32)
    output, _ = run_windows(tensors, pictures, 12, mask, gain, bias, "triton")
    assert torch.equal(output, run_windows(tensors, pictures, 12, mask, gain, bias, "eager")[0])
