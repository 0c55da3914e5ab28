from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from fastvr.kernels import common

SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)


@pytest.fixture(autouse=True)
def _compiled_kernels(monkeypatch):
    """As on a GPU, and PyTorch's switches as they were afterwards."""
    monkeypatch.setattr(common, "interpreting", lambda: False)
    before = [switch.fp32_precision for switch in SWITCHES]
    yield
    for switch, precision in zip(SWITCHES, before, strict=True):
        switch.fp32_precision = precision


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_is_tf32_only_where_the_ops_own_switch_says_so(convolution, precision):
    """By the newer switches, beside which PyTorch refuses to read ``allow_tf32``."""
    SWITCHES[convolution].fp32_precision = precision
    SWITCHES[not convolution].fp32_precision = "ieee" if precision == "tf32" else "tf32"
    assert common.dot_precision(torch.float32, convolution=convolution) == precision
    assert common.dot_precision(torch.bfloat16, convolution=convolution) == "ieee"


@pytest.mark.parametrize(("allowed", "precision"), [(False, "ieee"), (True, "tf32")])
def test_float32_follows_allow_tf32_as_well(allowed, precision):
    with torch.backends.cudnn.flags(allow_tf32=allowed):
        assert common.dot_precision(torch.float32, convolution=True) == precision


def test_the_interpreter_does_not_round_to_tf32(monkeypatch):
    monkeypatch.setattr(common, "interpreting", lambda: True)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert common.dot_precision(torch.float32, convolution=True) == "ieee"
