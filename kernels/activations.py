"""Activations of float32 values in registers, and their derivatives."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relu(x):
    # tl.maximum drops NaN on a GPU
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _clamp_unit(x):
    return tl.minimum(
        tl.maximum(x, -1.0, propagate_nan=tl.PropagateNan.ALL), 1.0, propagate_nan=tl.PropagateNan.ALL
    )


@triton.jit
def gelu_erf(x):
    """Exact GELU, 0.5 x (1 + erf(x / sqrt 2)), for float32 results."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_bfloat16(x):
    """Exact GELU to within 5.3e-5, for bfloat16 results: erf(x / sqrt 2) as an odd polynomial of 9 terms.

    A minimax fit (linear programming, error weighted as GELU's on [-4.4, 4.4]) that stays above 1 beyond
    the interval, so that clamping the *result* is right for every x; clamping x would leave GELU(-1000) at
    -0.05. 13 instructions where ``tl.erf`` takes 34.
    """
    t = x * x
    p = 7.887316494370467e-11 * t - 8.176245458457743e-09
    p = p * t + 3.731283300112409e-07
    p = p * t - 9.955228051694576e-06
    p = p * t + 0.00017459339869674295
    p = p * t - 0.0021522785536944866
    p = p * t + 0.019454926252365112
    p = p * t - 0.13249237835407257
    p = p * t + 0.7977744340896606
    return 0.5 * x * (1.0 + _clamp_unit(x * p))


@triton.jit
def gelu_float16(x):
    """Exact GELU to within 1e-7 of erf, for float16 results: Abramowitz and Stegun, 7.1.26."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    # 1 - erf(|x| / sqrt 2), which keeps its digits in the tail where 1 + erf cancels
    tail = p * tl.exp2(-1.4426950408889634 * z * z)
    return 0.5 * x * tl.where(x < 0, tail, 2.0 - tail)


@triton.jit
def gelu_tanh(x):
    """GELU's tanh form, another function (up to 4.7e-4 off): x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))."""
    z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp2(-1.4426950408889634 * z))


@triton.jit
def quick_gelu(x):
    """OpenAI CLIP's, another function again (up to 0.02 off): x sigmoid(1.702 x)."""
    return x / (1.0 + tl.exp2(-2.4554669595930156 * x))


@triton.jit
def activate(x, ACT: tl.constexpr, dtype: tl.constexpr):
    """``ACT`` ("none", "relu", "gelu", "gelu_tanh", "quick_gelu") of float32 ``x``, as exact as
    ``dtype`` can show."""
    if ACT == "relu":
        x = relu(x)
    elif ACT == "gelu":
        if dtype == tl.bfloat16:
            x = gelu_bfloat16(x)
        elif dtype == tl.float16:
            x = gelu_float16(x)
        else:
            x = gelu_erf(x)
    elif ACT == "gelu_tanh":
        x = gelu_tanh(x)
    elif ACT == "quick_gelu":
        x = quick_gelu(x)
    return x


@triton.jit
def _gelu_and_grad(x, ERF: tl.constexpr):
    """Exact GELU and its derivative, Phi(x) + x phi(x): by ``tl.erf``, or to within 1e-7 by Abramowitz and
    Stegun, 7.1.26, which takes the exponential that phi needs anyhow."""
    density = tl.exp2(-0.7213475204444817 * x * x)
    if ERF:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
        p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
        tail = 0.5 * p * density
        cdf = tl.where(x < 0, tail, 1.0 - tail)
    return x * cdf, cdf + 0.3989422804014327 * x * density


@triton.jit
def sigmoid_and_grad(z):
    """The sigmoid and its derivative."""
    # of -|z|, so that neither sigmoid nor 1 - sigmoid cancels, and nothing overflows
    e = tl.exp2(-1.4426950408889634 * tl.abs(z))
    larger = 1.0 / (1.0 + e)
    return tl.where(z < 0, e * larger, larger), e * larger * larger


@triton.jit
def _gelu_tanh_and_grad(x):
    s, ds = sigmoid_and_grad(1.5957691216057308 * (x + 0.044715 * x * x * x))
    slope = 1.5957691216057308 + 0.21406444881780076 * x * x
    return x * s, s + x * ds * slope


@triton.jit
def _quick_gelu_and_grad(x):
    s, ds = sigmoid_and_grad(1.702 * x)
    return x * s, s + 1.702 * x * ds


@triton.jit
def activate_and_grad(x, ACT: tl.constexpr, dtype: tl.constexpr):
    """``activate``, and its derivative at ``x``."""
    if ACT == "relu":
        # as in PyTorch, a NaN lets the gradient through
        return relu(x), tl.where(x <= 0, 0.0, 1.0)
    elif ACT == "gelu":
        return _gelu_and_grad(x, dtype == tl.float32)
    elif ACT == "gelu_tanh":
        return _gelu_tanh_and_grad(x)
    elif ACT == "quick_gelu":
        return _quick_gelu_and_grad(x)
    else:
        return x, tl.full(x.shape, 1.0, tl.float32)
