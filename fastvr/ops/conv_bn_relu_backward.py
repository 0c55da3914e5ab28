"""conv_bn_relu_backward: conv_bn_relu's gradient, by the vendor's convolutions and kernels around them.

For all but BatchNorm's weight: what the convolution made is neither kept nor made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._convolution import convolution_gradients
from fastvr.ops._op import Cost, Kind, Op, _like, nbytes
from fastvr.ops.batch_norm_act import map_like, map_rows, reduction_parts, row_config, table_key
from fastvr.reference.conv_bn_relu import conv_bn_relu_backward as reference
from fastvr.reference.image import normalize

# what gradients may be asked for, in the order of ``needs``
WANTED = ("x", "weight", "bn_bias", "residual")


class BackwardArguments(NamedTuple):
    grad: torch.Tensor
    y: torch.Tensor | None  # the result, of a ReLU
    x: torch.Tensor | None  # where the weight's gradient is needed
    size: Sequence[int]  # x's
    weight: torch.Tensor
    bn_weight: torch.Tensor | None
    bn_bias: torch.Tensor | None
    running_var: torch.Tensor | None
    eps: float
    stride: Sequence[int]
    padding: Sequence[int]
    groups: int
    mean: torch.Tensor | None
    std: torch.Tensor | None
    needs: Sequence[bool]


def _results(a: BackwardArguments) -> list[torch.Tensor]:
    """Empty gradients of what is needed, in the order of WANTED."""
    wide, layout = a.grad, torch.channels_last
    dx = torch.empty(a.size, dtype=a.weight.dtype, device=wide.device, memory_format=layout)
    bias = a.grad if a.bn_bias is None else a.bn_bias
    masked = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device, memory_format=layout)
    made = [dx, torch.empty_like(a.weight), bias.new_empty(bias.shape), masked]
    return [result for result, need in zip(made, a.needs, strict=True) if need]


def _kernel(a: BackwardArguments) -> list[torch.Tensor]:
    from fastvr.kernels.conv_bn_relu_backward import (
        launch_masked_grad,
        launch_parameters,
        launch_scaled_weight,
    )

    needs_x, needs_weight, needs_bias, needs_residual = a.needs
    if a.grad.numel() == 0:
        return [result.zero_() for result in _results(a)]
    device, dtype, layout = a.grad.device, a.weight.dtype, torch.channels_last
    grad = a.grad.contiguous(memory_format=layout)
    parts, masked = None, grad
    if needs_bias or a.y is not None:
        config, rows = row_config("conv_bn_relu_backward", grad), map_rows(grad)
        parts = reduction_parts(rows, 1, config) if needs_bias else None
        masked = grad if a.y is None else map_like(grad, grad.dtype)
        launch_masked_grad(
            grad=rows,
            y=None if a.y is None else map_rows(a.y),
            masked=None if a.y is None else map_rows(masked),
            parts=parts,
            config=config,
        )
    weight = a.weight.contiguous(memory_format=layout)
    scales: dict[str, Any] = {
        "bn_weight": _check.dense(a.bn_weight),
        "var": _check.dense(a.running_var),
        "eps": a.eps,
    }
    scaling = a.bn_weight is not None or a.running_var is not None
    scaled = weight
    if needs_x and scaling:
        scaled = _filters(weight)
        launch_scaled_weight(weight=_rows(weight), scaled=_rows(scaled), **scales)
    x: torch.Tensor | Kind = Kind(torch.Size(a.size), dtype)
    if a.x is not None:
        x = normalize(a.x, a.mean, a.std, dtype)
    dx, dweight = convolution_gradients(
        masked.to(dtype), x, scaled, a.stride, a.padding, a.groups, needs_x=needs_x, needs_weight=needs_weight
    )
    product, bias = None, a.bn_bias
    if dweight is not None and scaling:
        product = dweight.contiguous(memory_format=layout)
        dweight = _filters(weight)
    if bias is not None and needs_bias:
        bias = backend.empty(bias.shape, dtype=bias.dtype, device=device)
    if product is not None or needs_bias:
        launch_parameters(
            product=None if product is None else _rows(product),
            parts=parts,
            dweight=None if product is None or dweight is None else _rows(dweight),
            dbn_bias=bias if needs_bias else None,
            **scales,
        )
    # strides as the fake says
    found = [
        None if dx is None else dx.contiguous(memory_format=layout),
        None if dweight is None else _like(dweight, a.weight),
        bias if needs_bias else None,
        masked if needs_residual else None,
    ]
    return [gradient for gradient in found if gradient is not None]


def _filters(weight: torch.Tensor) -> torch.Tensor:
    layout = torch.channels_last
    return backend.empty(weight.shape, dtype=weight.dtype, device=weight.device, memory_format=layout)


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """A channels_last weight's memory, [O, kh * kw * C]."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _cost(a: BackwardArguments) -> Cost:
    flops = 2 * a.grad.numel() * math.prod(a.weight.shape[1:]) * (a.needs[0] + a.needs[1])
    return Cost(flops, nbytes(a) + nbytes(_results(a)))


CONV_BN_RELU_BACKWARD = Op(
    "conv_bn_relu_backward",
    "Tensor grad, Tensor? y, Tensor? x, SymInt[] size, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor? running_var, float eps, int[] stride, int[] padding, int groups, "
    "Tensor? mean, Tensor? std, bool[] needs",
    arguments=BackwardArguments,
    kernel=_kernel,
    reference=reference,
    fake=_results,
    unsupported=lambda a: _check.kernel_dtypes(a.grad, a.y, a.weight, *a[5:8]),
    # as the forward pass, which a kernel computed
    measured=lambda a: tuning.choice(
        table_key("conv_bn_relu_backward", a.grad.dtype, a.grad.shape), a.grad.device, "triton"
    ),
    cost=_cost,
    returns="Tensor[]",
    differentiable=False,
)
