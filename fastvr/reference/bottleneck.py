"""The end of a residual bottleneck, alone and with the next block's first convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastvr.reference.conv_bn_relu import conv_bn_relu


def bottleneck(
    x: torch.Tensor,
    weight2: torch.Tensor,
    bn2_weight: torch.Tensor | None,
    bn2_bias: torch.Tensor | None,
    running_mean2: torch.Tensor | None,
    running_var2: torch.Tensor | None,
    eps2: float,
    weight3: torch.Tensor,
    bn3_weight: torch.Tensor | None,
    bn3_bias: torch.Tensor | None,
    running_mean3: torch.Tensor | None,
    running_var3: torch.Tensor | None,
    eps3: float,
    stride: Sequence[int],
    residual: torch.Tensor | None = None,
    shortcut: torch.Tensor | None = None,
    shortcut_weight: torch.Tensor | None = None,
    bn_shortcut_weight: torch.Tensor | None = None,
    bn_shortcut_bias: torch.Tensor | None = None,
    running_mean_shortcut: torch.Tensor | None = None,
    running_var_shortcut: torch.Tensor | None = None,
    eps_shortcut: float = 1e-5,
    shortcut_stride: Sequence[int] = (1, 1),
) -> torch.Tensor:
    y = conv_bn_relu(
        x, weight2, bn2_weight, bn2_bias, running_mean2, running_var2, eps2, stride, padding=(1, 1)
    )
    if shortcut is not None:
        assert shortcut_weight is not None
        residual = conv_bn_relu(
            shortcut,
            shortcut_weight,
            bn_shortcut_weight,
            bn_shortcut_bias,
            running_mean_shortcut,
            running_var_shortcut,
            eps_shortcut,
            shortcut_stride,
            act="none",
        )
    return conv_bn_relu(
        y, weight3, bn3_weight, bn3_bias, running_mean3, running_var3, eps3, residual=residual
    )


def bottleneck_chain(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    """``bottleneck``'s arguments, then the next block's first convolution's weight and BatchNorm."""
    *block, weight1, weight, bias, mean, var, eps = args
    y = bottleneck(*block)  # type: ignore[arg-type]
    return y, conv_bn_relu(y, weight1, weight, bias, mean, var, eps)  # type: ignore[arg-type]
