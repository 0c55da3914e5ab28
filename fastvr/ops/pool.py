"""max_pool, and avg_pool_linear: global average pooling with the classifier behind it; one launch each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op, nbytes
from fastvr.ops.conv_bn_relu import output_size, pair, too_many_pixels
from fastvr.reference import pool as reference


def max_pool(
    x: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
) -> torch.Tensor:
    """2-d max pooling. A NaN in a window is its maximum, as in PyTorch.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16 (float64 runs in PyTorch), any strides.
        kernel_size: one number, or (vertical, horizontal).
        stride: likewise; None is kernel_size.
        padding: likewise, with -inf, at most half of kernel_size.

    Returns:
        [N, C, OH, OW], channels_last, x's dtype.

    Under autocast nothing is cast.

    Raises:
        ValueError: an argument's shape, dtype or value; the message names it.
    """
    op = "max_pool"
    _check.operand(op, "x", x)
    window, step, border = pool_window(op, ("kernel_size", "stride", "padding"), kernel_size, stride, padding)
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"{op}: x must be [N, C, H, W] with C > 0; got {list(x.shape)}")
    if min(_pooled_shape(x, window, step, border)[2:]) < 1:
        raise ValueError(
            f"{op}: x must be at least {window[0]} x {window[1]} (the window) with its padding of {border}; "
            f"got {x.shape[2]} x {x.shape[3]}"
        )
    return MAX_POOL(x, window, step, border)


def pool_window(
    op: str,
    names: tuple[str, str, str],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
) -> tuple[list[int], list[int], list[int]]:
    """A pool's size, stride and padding, each [vertical, horizontal]; ``names`` is what they are called."""
    window = pair(op, names[0], kernel_size, 1)
    step = window if stride is None else pair(op, names[1], stride, 1)
    border = pair(op, names[2], padding, 0)
    if any(2 * p > k for p, k in zip(border, window, strict=True)):
        raise ValueError(f"{op}: {names[2]} must be at most half of {names[0]} {window}; got {border}")
    return window, step, border


def avg_pool_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x.mean((2, 3)) @ weight.T + bias``: global average pooling and the classifier in one launch.

    Sums are taken in float32, and the mean is rounded to weight's dtype.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16 (float64 runs in PyTorch), any strides.
        weight: [out_features, C], x's dtype.
        bias: [out_features], x's dtype.

    Returns:
        [N, out_features] in weight's dtype.

    Under autocast weight and bias are cast to its dtype, and so is the mean; x is read as it is.

    Raises:
        ValueError: an argument's shape, dtype or device; the message names it.
    """
    op = "avg_pool_linear"
    _check.operand(op, "x", x)
    _check.operand(op, "weight", weight)
    dtype = x.dtype
    if x.dtype != torch.float64 and (autocast := _check.autocast_dtype(x.device)) is not None:
        dtype = autocast
        weight, bias = _check.cast(weight, dtype), _check.cast_or_none(bias, dtype)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"{op}: weight must be [out_features, C]; got {list(weight.shape)}")
    n, k = weight.shape
    if x.dim() != 4 or x.shape[1] != k or 0 in x.shape[2:]:
        raise ValueError(f"{op}: x must be [N, {k}, H, W] for a weight of {[n, k]}; got {list(x.shape)}")
    _check.companion(op, "weight", weight, (n, k), x, dtype=dtype)
    _check.companion(op, "bias", bias, (n,), x, dtype=dtype)
    return AVG_POOL_LINEAR(x, weight, bias)


def _pooled_shape(
    x: torch.Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return (
        n,
        c,
        output_size(h, window[0], stride[0], padding[0]),
        output_size(w, window[1], stride[1], padding[1]),
    )


def max_pool_table_key(
    x: torch.Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> str:
    n, c, oh, ow = _pooled_shape(x, window, stride, padding)
    sizes = {"kh": window[0], "kw": window[1], "sh": stride[0], "sw": stride[1]}
    return tuning.key("max_pool", x.dtype, m=tuning.bucket(n * oh * ow), c=c, **sizes)


class MaxPoolArguments(NamedTuple):
    x: torch.Tensor
    window: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]


def _max_pool_kernel(a: MaxPoolArguments) -> torch.Tensor:
    from fastvr.kernels.pool import (
        launch_max_pool_fwd,
        max_pool_candidate_configs,
        max_pool_default_config,
    )

    n, c, oh, ow = shape = _pooled_shape(a.x, a.window, a.stride, a.padding)
    y = backend.empty(shape, dtype=a.x.dtype, device=a.x.device, memory_format=torch.channels_last)
    if n == 0:
        return y
    arch = backend.architecture(a.x.device)
    config = tuning.config(
        "max_pool",
        max_pool_table_key(a.x, a.window, a.stride, a.padding),
        a.x.device,
        default=lambda: max_pool_default_config(n * oh * ow, c, a.x.dtype, arch),
        candidates=lambda: max_pool_candidate_configs(a.x.dtype, arch),
    )
    launch_max_pool_fwd(
        x=a.x,
        y=y,
        kernel_size=(a.window[0], a.window[1]),
        stride=(a.stride[0], a.stride[1]),
        padding=(a.padding[0], a.padding[1]),
        config=config,
    )
    return y


def _max_pool_fake(a: MaxPoolArguments) -> torch.Tensor:
    shape = _pooled_shape(a.x, a.window, a.stride, a.padding)
    return torch.empty(shape, dtype=a.x.dtype, device=a.x.device, memory_format=torch.channels_last)


def _max_pool_unsupported(a: MaxPoolArguments) -> str | None:
    n, _, oh, ow = _pooled_shape(a.x, a.window, a.stride, a.padding)
    return too_many_pixels(n * oh * ow) or _check.kernel_dtypes(a.x)


def _max_pool_measured(a: MaxPoolArguments) -> str:
    return tuning.choice(max_pool_table_key(a.x, a.window, a.stride, a.padding), a.x.device, "triton")


def _max_pool_cost(a: MaxPoolArguments) -> Cost:
    n, c, oh, ow = _pooled_shape(a.x, a.window, a.stride, a.padding)
    return Cost(0, (a.x.numel() + n * c * oh * ow) * a.x.element_size())


MAX_POOL = Op(
    "max_pool",
    "Tensor x, int[] kernel_size, int[] stride, int[] padding",
    arguments=MaxPoolArguments,
    kernel=_max_pool_kernel,
    reference=reference.max_pool,
    fake=_max_pool_fake,
    unsupported=_max_pool_unsupported,
    measured=_max_pool_measured,
    cost=_max_pool_cost,
)


def avg_pool_linear_table_key(x: torch.Tensor, weight: torch.Tensor) -> str:
    n, k = weight.shape
    pixels = x.shape[2] * x.shape[3]
    return tuning.key("avg_pool_linear", weight.dtype, m=tuning.bucket(x.shape[0]), n=n, k=k, p=pixels)


class AvgPoolLinearArguments(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def _avg_pool_linear_kernel(a: AvgPoolLinearArguments) -> torch.Tensor:
    from fastvr.kernels.pool import (
        avg_pool_linear_candidate_configs,
        avg_pool_linear_default_config,
        launch_avg_pool_linear_fwd,
    )

    b, n = a.x.shape[0], a.weight.shape[0]
    y = backend.empty((b, n), dtype=a.weight.dtype, device=a.x.device)
    if y.numel() == 0:
        return y
    arch = backend.architecture(a.x.device)
    config = tuning.config(
        "avg_pool_linear",
        avg_pool_linear_table_key(a.x, a.weight),
        a.x.device,
        default=lambda: avg_pool_linear_default_config(b, n, a.weight.dtype, arch),
        candidates=lambda: avg_pool_linear_candidate_configs(a.weight.dtype, arch),
    )
    launch_avg_pool_linear_fwd(
        x=a.x,
        weight=a.weight,
        bias=_check.dense(a.bias),
        y=y,
        config=config,
    )
    return y


def _avg_pool_linear_fake(a: AvgPoolLinearArguments) -> torch.Tensor:
    return a.weight.new_empty((a.x.shape[0], a.weight.shape[0]))


def _avg_pool_linear_unsupported(a: AvgPoolLinearArguments) -> str | None:
    return _check.kernel_dtypes(a.x, a.weight, a.bias)


def _avg_pool_linear_measured(a: AvgPoolLinearArguments) -> str:
    # without a measurement the vendor's GEMM runs
    return tuning.choice(avg_pool_linear_table_key(a.x, a.weight), a.x.device, "reference")


def _avg_pool_linear_cost(a: AvgPoolLinearArguments) -> Cost:
    b, n = a.x.shape[0], a.weight.shape[0]
    moved = nbytes(a)
    return Cost(2 * b * a.weight.numel(), moved + b * n * a.weight.element_size())


AVG_POOL_LINEAR = Op(
    "avg_pool_linear",
    "Tensor x, Tensor weight, Tensor? bias",
    arguments=AvgPoolLinearArguments,
    kernel=_avg_pool_linear_kernel,
    reference=reference.avg_pool_linear,
    fake=_avg_pool_linear_fake,
    unsupported=_avg_pool_linear_unsupported,
    measured=_avg_pool_linear_measured,
    cost=_avg_pool_linear_cost,
)
