"""y = act(bn(conv(x)) + bn2(conv2(x2))), both windows one pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastvr.reference.conv_bn_relu import conv_bn_relu


def dual_conv_bn_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    eps: float,
    x2: torch.Tensor,
    weight2: torch.Tensor,
    bn2_weight: torch.Tensor | None,
    bn2_bias: torch.Tensor | None,
    running_mean2: torch.Tensor | None,
    running_var2: torch.Tensor | None,
    eps2: float,
    stride2: Sequence[int] = (1, 1),
    act: str = "relu",
) -> torch.Tensor:
    shortcut = conv_bn_relu(
        x2, weight2, bn2_weight, bn2_bias, running_mean2, running_var2, eps2, stride2, act="none"
    )
    return conv_bn_relu(
        x, weight, bn_weight, bn_bias, running_mean, running_var, eps, act=act, residual=shortcut
    )
