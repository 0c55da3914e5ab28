"""Max pooling, and global average pooling with the classifier behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def max_pool(
    x: torch.Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> torch.Tensor:
    y = F.max_pool2d(x, tuple(kernel_size), tuple(stride), tuple(padding))
    return y.contiguous(memory_format=torch.channels_last)


def avg_pool_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
    return F.linear(pooled.to(weight.dtype), weight, bias)
