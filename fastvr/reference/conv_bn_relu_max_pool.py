"""y = max_pool(relu(bn(conv(x))))."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastvr.reference.conv_bn_relu import conv_bn_relu
from fastvr.reference.pool import max_pool


def conv_bn_relu_max_pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> torch.Tensor:
    y = conv_bn_relu(
        x,
        weight,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        eps,
        stride,
        padding,
        mean=mean,
        std=std,
    )
    return max_pool(y, pool_size, pool_stride, pool_padding)
