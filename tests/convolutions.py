"""What the tests of conv_bn_relu share: its arguments, its twin, and what both are held to."""

from __future__ import annotations

import torch
from contract import randn, triton_forced

from fastvr.ops.conv_bn_relu import conv_bn_relu
from fastvr.reference.conv_bn_relu import conv_bn_relu as reference
from fastvr.testing import check_op

VECTORS = ("bn_weight", "bn_bias", "running_mean", "running_var")


def both(value):
    return (value, value) if isinstance(value, int) else value


def inputs(n, c, h, w, o, window, stride, padding, groups, dtype, device, *, vector_dtype=None, **parts):
    (kh, kw), (sh, sw), (ph, pw) = both(window), both(stride), both(padding)
    oh, ow = (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1
    vector = {"dtype": vector_dtype or torch.float32, "device": device}
    fan_in = c // groups * kh * kw
    given = {
        "x": randn(n, c, h, w, dtype=dtype, device=device).to(memory_format=torch.channels_last),
        "weight": (randn(o, c // groups, kh, kw, device=device) * fan_in**-0.5)
        .to(dtype)
        .to(memory_format=torch.channels_last),
        "bn_weight": randn(o, **vector),
        "bn_bias": randn(o, **vector),
        "running_mean": randn(o, **vector),
        "running_var": randn(o, **vector).abs() + 0.5,
        "residual": randn(n, o, oh, ow, dtype=dtype, device=device).to(memory_format=torch.channels_last),
    }
    options = {"stride": stride, "padding": padding, "groups": groups, "act": parts.get("act", "relu")}
    return {name: t for name, t in given.items() if parts.get(name, True)} | options


def twin(x, weight, *, stride=1, padding=0, eps=1e-5, **others):
    return reference(x, weight, eps=eps, stride=both(stride), padding=both(padding), **others)


def check(given, *, backward=False):
    with triton_forced():
        return check_op(
            conv_bn_relu, twin, given, backward=backward, sample_inputs=("x", "residual"), name="conv_bn_relu"
        )


def layouts(t):
    """The same values in other layouts: contiguous, channels_last, every other row and column of a larger
    tensor, an offset into one, H and W exchanged in memory."""
    n, c, h, w = t.shape
    yield t.contiguous()
    yield t.to(memory_format=torch.channels_last)
    wide = torch.zeros(n, 2 * c, 2 * h, 2 * w, dtype=t.dtype, device=t.device)
    wide[:, ::2, ::2, ::2] = t
    yield wide[:, ::2, ::2, ::2]
    around = torch.zeros(n + 1, c + 3, h + 1, w + 2, dtype=t.dtype, device=t.device)
    around = around.to(memory_format=torch.channels_last)
    around[1:, 3:, 1:, 2:] = t
    yield around[1:, 3:, 1:, 2:]
    yield t.transpose(2, 3).contiguous().transpose(2, 3)
