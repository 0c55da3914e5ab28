"""Max pooling, and global average pooling with the classifier behind it; what their gradients are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastvr.reference.linear import as_kernels_write


def max_pool(
    x: torch.Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> torch.Tensor:
    y = F.max_pool2d(x, tuple(kernel_size), tuple(stride), tuple(padding))
    return as_kernels_write(y)


def max_pool_training(
    x: torch.Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Beside y which tap of its window each y is."""
    y, places = F.max_pool2d(x, tuple(kernel_size), tuple(stride), tuple(padding), return_indices=True)
    taps = window_taps(places, x.shape[3], kernel_size, stride, padding).to(taps_dtype(kernel_size))
    layout = torch.channels_last
    return y.contiguous(memory_format=layout), taps.contiguous(memory_format=layout)


def taps_dtype(kernel_size: Sequence[int]) -> torch.dtype:
    # kernels keep 255 for no tap
    return torch.uint8 if kernel_size[0] * kernel_size[1] <= 255 else torch.int32


def window_taps(
    places: torch.Tensor,
    width: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> torch.Tensor:
    """PyTorch's ``places`` in a map of ``width``, [..., OH, OW], as taps of the windows."""
    rows, columns = _corners(places, stride, padding)
    return (places // width - rows) * kernel_size[1] + places % width - columns


def window_places(
    taps: torch.Tensor,
    width: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> torch.Tensor:
    """:func:`window_taps` turned round: where in a map of ``width`` the taps are, int64."""
    rows, columns = _corners(taps, stride, padding)
    taken = taps.long()
    return (rows + taken // kernel_size[1]) * width + columns + taken % kernel_size[1]


def max_pool_backward(
    grad: torch.Tensor,
    taps: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    size: Sequence[int],
) -> torch.Tensor:
    places = window_places(taps, size[1], kernel_size, stride, padding)
    wide = torch.promote_types(grad.dtype, torch.float32)
    dx = torch.zeros((*grad.shape[:2], size[0] * size[1]), dtype=wide, device=grad.device)
    dx = dx.scatter_add(2, places.flatten(2), grad.to(wide).flatten(2)).to(grad.dtype)
    return dx.reshape(*dx.shape[:2], *size).contiguous(memory_format=torch.channels_last)


def _corners(
    pooled: torch.Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the windows of a pooled map begin: rows [OH, 1] and columns [OW]."""
    rows = torch.arange(pooled.shape[2], device=pooled.device)[:, None] * stride[0] - padding[0]
    return rows, torch.arange(pooled.shape[3], device=pooled.device) * stride[1] - padding[1]


def avg_pool_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return avg_pool_linear_training(x, weight, bias)[0]


def avg_pool_linear_training(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Beside y the means, [N, C] in weight's dtype."""
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1).to(weight.dtype)
    return F.linear(pooled, weight, bias), pooled


def avg_pool_linear_backward(grad: torch.Tensor, weight: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The map's gradient."""
    share = (grad @ weight) / (size[0] * size[1])
    dx = share[:, :, None, None].expand(-1, -1, *size)
    return dx.contiguous(memory_format=torch.channels_last)
