"""max_pool_backward and avg_pool_linear_backward: the gradients with respect to the map, one launch each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op, nbytes
from fastvr.reference import pool as reference


def too_many_taps(kernel_size: Sequence[int]) -> str | None:
    """The reason why kernels cannot keep which tap of a window is the largest."""
    taps = kernel_size[0] * kernel_size[1]
    return f"windows of {taps} taps; the kernel takes up to 255" if taps > 255 else None


class MaxPoolBackwardArguments(NamedTuple):
    grad: torch.Tensor
    taps: torch.Tensor
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    size: Sequence[int]


def _max_pool_key(a: MaxPoolBackwardArguments) -> str:
    n, c = a.grad.shape[:2]
    sizes = {"kh": a.kernel_size[0], "kw": a.kernel_size[1], "sh": a.stride[0], "sw": a.stride[1]}
    pixels = tuning.bucket(n * a.size[0] * a.size[1])
    return tuning.key("max_pool_backward", a.grad.dtype, m=pixels, c=c, **sizes)


def _max_pool_kernel(a: MaxPoolBackwardArguments) -> torch.Tensor:
    from fastvr.kernels.pool import max_pool_candidate_configs, max_pool_default_config
    from fastvr.kernels.pool_backward import launch_max_pool_bwd

    n, c = a.grad.shape[:2]
    h, w = a.size
    dtype, device, layout = a.grad.dtype, a.grad.device, torch.channels_last
    dx = backend.empty((n, c, h, w), dtype=dtype, device=device, memory_format=layout)
    if n == 0:
        return dx
    arch = backend.architecture(device)
    config = tuning.config(
        "max_pool_backward",
        _max_pool_key(a),
        device,
        default=lambda: max_pool_default_config(n * h * w, c, dtype, arch),
        candidates=lambda: max_pool_candidate_configs(dtype, arch),
    )
    launch_max_pool_bwd(
        grad=a.grad.contiguous(memory_format=layout),
        taps=a.taps.contiguous(memory_format=layout),
        dx=dx,
        kernel_size=(a.kernel_size[0], a.kernel_size[1]),
        stride=(a.stride[0], a.stride[1]),
        padding=(a.padding[0], a.padding[1]),
        config=config,
    )
    return dx


def _max_pool_fake(a: MaxPoolBackwardArguments) -> torch.Tensor:
    shape = (*a.grad.shape[:2], *a.size)
    return torch.empty(shape, dtype=a.grad.dtype, device=a.grad.device, memory_format=torch.channels_last)


def _max_pool_unsupported(a: MaxPoolBackwardArguments) -> str | None:
    pixels = a.grad.shape[0] * a.size[0] * a.size[1]
    return too_many_taps(a.kernel_size) or _check.too_many_pixels(pixels) or _check.kernel_dtypes(a.grad)


MAX_POOL_BACKWARD = Op(
    "max_pool_backward",
    "Tensor grad, Tensor taps, int[] kernel_size, int[] stride, int[] padding, SymInt[] size",
    arguments=MaxPoolBackwardArguments,
    kernel=_max_pool_kernel,
    reference=reference.max_pool_backward,
    fake=_max_pool_fake,
    unsupported=_max_pool_unsupported,
    # as the forward pass, which a kernel computed
    measured=lambda a: tuning.choice(_max_pool_key(a), a.grad.device, "triton"),
    cost=lambda a: Cost(0, nbytes(a) + nbytes([_max_pool_fake(a)])),
    differentiable=False,
)


class AvgPoolLinearBackwardArguments(NamedTuple):
    grad: torch.Tensor
    weight: torch.Tensor
    size: Sequence[int]


def _avg_pool_linear_key(a: AvgPoolLinearBackwardArguments) -> str:
    n, k = a.weight.shape
    sizes = {"n": n, "k": k, "p": a.size[0] * a.size[1]}
    return tuning.key("avg_pool_linear_backward", a.weight.dtype, m=tuning.bucket(a.grad.shape[0]), **sizes)


def _avg_pool_linear_kernel(a: AvgPoolLinearBackwardArguments) -> torch.Tensor:
    from fastvr.kernels.pool_backward import (
        avg_pool_linear_candidate_configs,
        avg_pool_linear_default_config,
        launch_avg_pool_linear_bwd,
    )

    device, dtype = a.grad.device, a.weight.dtype
    shape = (a.grad.shape[0], a.weight.shape[1], *a.size)
    dx = backend.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    if dx.numel() == 0:
        return dx
    arch = backend.architecture(device)
    config = tuning.config(
        "avg_pool_linear_backward",
        _avg_pool_linear_key(a),
        device,
        default=lambda: avg_pool_linear_default_config(dtype, arch),
        candidates=lambda: avg_pool_linear_candidate_configs(dtype, arch),
    )
    launch_avg_pool_linear_bwd(grad=a.grad, weight=a.weight, dx=dx, config=config)
    return dx


def _avg_pool_linear_fake(a: AvgPoolLinearBackwardArguments) -> torch.Tensor:
    # len() of the gradient would make a number of a compiler's symbol
    shape = (a.grad.shape[0], a.weight.shape[1], *a.size)
    return torch.empty(shape, dtype=a.weight.dtype, device=a.grad.device, memory_format=torch.channels_last)


AVG_POOL_LINEAR_BACKWARD = Op(
    "avg_pool_linear_backward",
    "Tensor grad, Tensor weight, SymInt[] size",
    arguments=AvgPoolLinearBackwardArguments,
    kernel=_avg_pool_linear_kernel,
    reference=reference.avg_pool_linear_backward,
    fake=_avg_pool_linear_fake,
    unsupported=lambda a: _check.kernel_dtypes(a.grad, a.weight),
    measured=lambda a: tuning.choice(_avg_pool_linear_key(a), a.grad.device, "triton"),
    cost=lambda a: Cost(2 * len(a.grad) * a.weight.numel(), nbytes(a) + nbytes([_avg_pool_linear_fake(a)])),
    differentiable=False,
)
