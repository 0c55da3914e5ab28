"""y = max_pool(relu(bn(x))), BatchNorm by the batch's own statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastvr.reference.batch_norm_act import batch_norm_act
from fastvr.reference.pool import window_taps


def batch_norm_act_max_pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Beside y and the statistics which tap of its window each y is, uint8, 255 where it is not above 0."""
    made, mean, var = batch_norm_act(x, weight, bias, eps)
    y, places = F.max_pool2d(made, tuple(kernel_size), tuple(stride), tuple(padding), return_indices=True)
    taps = window_taps(places, x.shape[3], kernel_size, stride, padding)
    taps = torch.where(y <= 0, 255, taps).to(torch.uint8)
    layout = torch.channels_last
    return y.contiguous(memory_format=layout), mean, var, taps.contiguous(memory_format=layout)
