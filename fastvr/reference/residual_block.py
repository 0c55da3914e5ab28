"""A residual block of a ResNet in training: y = relu(bn(conv(... relu(bn(conv(x))))) + shortcut)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastvr.reference.batch_norm_act import batch_norm_act


class Layer(NamedTuple):
    """A convolution without bias and a BatchNorm by the batch's own statistics.

    Args:
        weight: [O, C, k, k].
        bn_weight, bn_bias: [O].
        eps: added to the variance.
        stride, padding: of the convolution, in both directions.
    """

    weight: torch.Tensor
    bn_weight: torch.Tensor
    bn_bias: torch.Tensor
    eps: float = 1e-5
    stride: int = 1
    padding: int = 0


def residual_block(
    x: torch.Tensor, branch: Sequence[Layer], shortcut: Layer | None
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """y; mean and variance of every BatchNorm, the shortcut's last, one behind the other; what each of the
    convolutions made, likewise."""
    statistics: list[torch.Tensor] = []
    maps: list[torch.Tensor] = []

    def convolve_and_norm(x: torch.Tensor, layer: Layer, **options: object) -> torch.Tensor:
        z = F.conv2d(x, layer.weight, None, layer.stride, layer.padding)
        y, mean, var = batch_norm_act(z, layer.bn_weight, layer.bn_bias, layer.eps, **options)  # type: ignore[arg-type]
        statistics.extend((mean, var))
        maps.append(z.contiguous(memory_format=torch.channels_last))
        return y

    y = x
    for layer in branch[:-1]:
        y = convolve_and_norm(y, layer)
    y = convolve_and_norm(y, branch[-1], act="none")
    y = y + (x if shortcut is None else convolve_and_norm(x, shortcut, act="none"))
    y = F.relu(y).contiguous(memory_format=torch.channels_last)
    return y, torch.cat([t.detach() for t in statistics]), maps
