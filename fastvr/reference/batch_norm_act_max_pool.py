"""y = max_pool(relu(bn(x))), BatchNorm by the batch's own statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastvr.reference.batch_norm_act import batch_norm_act


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
    rows = torch.arange(y.shape[2], device=y.device)[:, None] * stride[0] - padding[0]
    columns = torch.arange(y.shape[3], device=y.device) * stride[1] - padding[1]
    width = x.shape[3]
    taps = (places // width - rows) * kernel_size[1] + places % width - columns
    taps = torch.where(y <= 0, 255, taps).to(torch.uint8)
    layout = torch.channels_last
    return y.contiguous(memory_format=layout), mean, var, taps.contiguous(memory_format=layout)
