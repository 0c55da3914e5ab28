"""max_pool, and avg_pool_linear: global average pooling with the classifier behind it; one launch each.

For their gradients max_pool keeps which tap of each window was the largest, a byte, and avg_pool_linear the
pooled features; of the map only its shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Gradient, Op, nbytes
from fastvr.ops.conv_bn_relu import output_size, pair
from fastvr.ops.linear_backward import parameter_gradients
from fastvr.ops.pool_backward import AVG_POOL_LINEAR_BACKWARD, MAX_POOL_BACKWARD, too_many_taps
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


class MaxPoolArguments(NamedTuple):
    x: torch.Tensor
    window: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]


_Pair = tuple[torch.Tensor, torch.Tensor]


def _max_pool_key(a: MaxPoolArguments, op: str) -> str:
    n, c, oh, ow = _pooled_shape(*a)
    sizes = {"kh": a.window[0], "kw": a.window[1], "sh": a.stride[0], "sw": a.stride[1]}
    return tuning.key(op, a.x.dtype, m=tuning.bucket(n * oh * ow), c=c, **sizes)


def _max_pool_kernel(a: MaxPoolArguments) -> torch.Tensor:
    return _run_max_pool(a, "max_pool")


def _max_pool_kernel_training(a: MaxPoolArguments) -> _Pair:
    shape, layout = _pooled_shape(*a), torch.channels_last
    taps = backend.empty(shape, dtype=torch.uint8, device=a.x.device, memory_format=layout)
    return _run_max_pool(a, "max_pool_training", taps), taps


def _run_max_pool(a: MaxPoolArguments, op: str, taps: torch.Tensor | None = None) -> torch.Tensor:
    from fastvr.kernels.pool import (
        launch_max_pool_fwd,
        max_pool_candidate_configs,
        max_pool_default_config,
    )

    n, c, oh, ow = shape = _pooled_shape(*a)
    y = backend.empty(shape, dtype=a.x.dtype, device=a.x.device, memory_format=torch.channels_last)
    if n == 0:
        return y
    arch = backend.architecture(a.x.device)
    config = tuning.config(
        op,
        _max_pool_key(a, op),
        a.x.device,
        default=lambda: max_pool_default_config(n * oh * ow, c, a.x.dtype, arch),
        candidates=lambda: max_pool_candidate_configs(a.x.dtype, arch),
    )
    launch_max_pool_fwd(
        x=a.x,
        y=y,
        taps=taps,
        kernel_size=(a.window[0], a.window[1]),
        stride=(a.stride[0], a.stride[1]),
        padding=(a.padding[0], a.padding[1]),
        config=config,
    )
    return y


def _max_pool_fake(a: MaxPoolArguments) -> torch.Tensor:
    return torch.empty(
        _pooled_shape(*a), dtype=a.x.dtype, device=a.x.device, memory_format=torch.channels_last
    )


def _max_pool_fake_training(a: MaxPoolArguments) -> _Pair:
    y = _max_pool_fake(a)
    return y, torch.empty_like(y, dtype=reference.taps_dtype(a.window))


def _max_pool_unsupported(a: MaxPoolArguments) -> str | None:
    n, _, oh, ow = _pooled_shape(*a)
    return _check.too_many_pixels(n * oh * ow) or _check.kernel_dtypes(a.x)


def _max_pool_unsupported_training(a: MaxPoolArguments) -> str | None:
    return (
        too_many_taps(a.window)
        or _check.too_many_pixels(a.x.numel() // a.x.shape[1])
        or _max_pool_unsupported(a)
    )


def _max_pool_backward(
    a: MaxPoolArguments, results: Sequence[Any], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    return {"x": MAX_POOL_BACKWARD.where_supported(grad, results[1], *a[1:], a.x.shape[2:])}


MAX_POOL_TRAINING = Op(
    "max_pool_training",
    "Tensor x, int[] kernel_size, int[] stride, int[] padding",
    arguments=MaxPoolArguments,
    kernel=_max_pool_kernel_training,
    reference=reference.max_pool_training,
    fake=_max_pool_fake_training,
    unsupported=_max_pool_unsupported_training,
    # without a measurement PyTorch's own runs
    measured=lambda a: tuning.choice(_max_pool_key(a, "max_pool_training"), a.x.device, "reference"),
    cost=lambda a: Cost(0, nbytes(a) + nbytes(_max_pool_fake_training(a))),
    returns="(Tensor, Tensor)",
    gradient=Gradient(saves=lambda a, needs: (1,), backward=_max_pool_backward),
)


# A traced program holds the operator itself, and somebody may differentiate it later
def _max_pool_backward_of_traced(
    a: MaxPoolArguments, results: Sequence[Any], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    return _max_pool_backward(a, MAX_POOL_TRAINING.where_supported(*a), grad, needs)


MAX_POOL = Op(
    "max_pool",
    "Tensor x, int[] kernel_size, int[] stride, int[] padding",
    arguments=MaxPoolArguments,
    kernel=_max_pool_kernel,
    reference=reference.max_pool,
    fake=_max_pool_fake,
    unsupported=_max_pool_unsupported,
    measured=lambda a: tuning.choice(_max_pool_key(a, "max_pool"), a.x.device, "triton"),
    cost=lambda a: Cost(0, nbytes(a) + nbytes([_max_pool_fake(a)])),
    gradient=Gradient(saves=lambda a, needs: ("x",), backward=_max_pool_backward_of_traced),
    training=MAX_POOL_TRAINING,
)


class AvgPoolLinearArguments(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def _avg_pool_linear_key(a: AvgPoolLinearArguments, op: str) -> str:
    n, k = a.weight.shape
    sizes = {"n": n, "k": k, "p": a.x.shape[2] * a.x.shape[3]}
    return tuning.key(op, a.weight.dtype, m=tuning.bucket(a.x.shape[0]), **sizes)


def _avg_pool_linear_kernel(a: AvgPoolLinearArguments) -> torch.Tensor:
    return _run_avg_pool_linear(a, "avg_pool_linear")


def _avg_pool_linear_kernel_training(a: AvgPoolLinearArguments) -> _Pair:
    pooled = backend.empty(a.x.shape[:2], dtype=a.weight.dtype, device=a.x.device)
    return _run_avg_pool_linear(a, "avg_pool_linear_training", pooled), pooled


def _run_avg_pool_linear(
    a: AvgPoolLinearArguments, op: str, pooled: torch.Tensor | None = None
) -> torch.Tensor:
    from fastvr.kernels.pool import (
        avg_pool_linear_candidate_configs,
        avg_pool_linear_default_config,
        launch_avg_pool_linear_fwd,
    )

    b, n = a.x.shape[0], a.weight.shape[0]
    y = backend.empty((b, n), dtype=a.weight.dtype, device=a.x.device)
    if y.numel() == 0:
        # no gradient reads the features then
        return y
    arch = backend.architecture(a.x.device)
    config = tuning.config(
        op,
        _avg_pool_linear_key(a, op),
        a.x.device,
        default=lambda: avg_pool_linear_default_config(b, n, a.weight.dtype, arch),
        candidates=lambda: avg_pool_linear_candidate_configs(a.weight.dtype, arch),
    )
    launch_avg_pool_linear_fwd(
        x=a.x,
        weight=a.weight,
        bias=_check.dense(a.bias),
        y=y,
        pooled=pooled,
        config=config,
    )
    return y


def _avg_pool_linear_fake(a: AvgPoolLinearArguments) -> torch.Tensor:
    return a.weight.new_empty((a.x.shape[0], a.weight.shape[0]))


def _avg_pool_linear_fake_training(a: AvgPoolLinearArguments) -> _Pair:
    return _avg_pool_linear_fake(a), a.weight.new_empty(a.x.shape[:2])


def _avg_pool_linear_unsupported(a: AvgPoolLinearArguments) -> str | None:
    return _check.kernel_dtypes(a.x, a.weight, a.bias)


def _avg_pool_linear_cost(a: AvgPoolLinearArguments) -> Cost:
    return Cost(2 * a.x.shape[0] * a.weight.numel(), nbytes(a) + nbytes([_avg_pool_linear_fake(a)]))


def _avg_pool_linear_cost_training(a: AvgPoolLinearArguments) -> Cost:
    flops, moved = dataclasses.astuple(_avg_pool_linear_cost(a))
    return Cost(flops, moved + nbytes(_avg_pool_linear_fake_training(a)[1:]))


def _avg_pool_linear_backward(
    a: AvgPoolLinearArguments, results: Sequence[Any], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    found = {}
    if "x" in needs:
        dx = AVG_POOL_LINEAR_BACKWARD.where_supported(grad, a.weight, a.x.shape[2:])
        found["x"] = dx.to(a.x.dtype)
    if "weight" in needs:
        found["weight"], found["bias"], _ = parameter_gradients(
            grad, results[1], a.weight, a.bias, None, "bias" in needs
        )
    elif "bias" in needs:
        found["bias"] = grad.sum(0)
    return found


def _avg_pool_linear_saves(a: AvgPoolLinearArguments, needs: frozenset[str]) -> list[str | int]:
    return [*(["weight"] if "x" in needs else []), *([1] if "weight" in needs else [])]


AVG_POOL_LINEAR_TRAINING = Op(
    "avg_pool_linear_training",
    "Tensor x, Tensor weight, Tensor? bias",
    arguments=AvgPoolLinearArguments,
    kernel=_avg_pool_linear_kernel_training,
    reference=reference.avg_pool_linear_training,
    fake=_avg_pool_linear_fake_training,
    unsupported=_avg_pool_linear_unsupported,
    # without a measurement the vendor's GEMM runs
    measured=lambda a: tuning.choice(
        _avg_pool_linear_key(a, "avg_pool_linear_training"), a.x.device, "reference"
    ),
    cost=_avg_pool_linear_cost_training,
    returns="(Tensor, Tensor)",
    gradient=Gradient(saves=_avg_pool_linear_saves, backward=_avg_pool_linear_backward),
)


def _avg_pool_linear_backward_of_traced(
    a: AvgPoolLinearArguments, results: Sequence[Any], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    return _avg_pool_linear_backward(a, AVG_POOL_LINEAR_TRAINING.where_supported(*a), grad, needs)


AVG_POOL_LINEAR = Op(
    "avg_pool_linear",
    "Tensor x, Tensor weight, Tensor? bias",
    arguments=AvgPoolLinearArguments,
    kernel=_avg_pool_linear_kernel,
    reference=reference.avg_pool_linear,
    fake=_avg_pool_linear_fake,
    unsupported=_avg_pool_linear_unsupported,
    # without a measurement the vendor's GEMM runs
    measured=lambda a: tuning.choice(_avg_pool_linear_key(a, "avg_pool_linear"), a.x.device, "reference"),
    cost=_avg_pool_linear_cost,
    gradient=Gradient(
        saves=lambda a, needs: ("x", "weight", "bias"), backward=_avg_pool_linear_backward_of_traced
    ),
    training=AVG_POOL_LINEAR_TRAINING,
)
