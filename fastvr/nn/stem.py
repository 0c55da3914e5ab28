"""The stem of a ResNet: from an image to the first stage's map."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn

from fastvr.nn.conv_bn_relu import (
    batch_norm,
    conv_bn_relu,
    convolve,
    norm_act,
    plain_conv,
    takes_batch_statistics,
    trains_frozen,
)
from fastvr.nn.head import plain_pool, pool_map
from fastvr.nn.plain import plain
from fastvr.nn.running_statistics import Moves, track
from fastvr.ops.batch_norm_act_max_pool import batch_norm_act_max_pool, fuses_max_pool
from fastvr.ops.conv_bn_relu_max_pool import conv_bn_relu_max_pool
from fastvr.ops.cpu import positive_pool
from fastvr.ops.cpu.magnitude import carry_on, is_finite
from fastvr.ops.cpu.prepared_pass import current
from fastvr.reference.image import normalize


def stem(
    conv: nn.Module,
    bn: nn.Module,
    relu: nn.Module,
    maxpool: nn.Module,
    x: torch.Tensor,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    dtype: torch.dtype,
    moves: Moves | None = None,
) -> torch.Tensor:
    """``maxpool(relu(bn(conv(x))))`` of images; uint8 ones become ``dtype`` by ``mean`` and ``std``.

    ``conv`` may be ResNet-D's: three 3x3 convolutions, the first two with BatchNorm and ReLU.

    One launch where ``bn`` normalises by its running statistics and no module is observed or replaced; where
    it does by the batch's own, everything behind the convolution is one op, if its kernels run, and ``moves``
    may take those of the running statistics, for the caller to apply.
    """
    if _deep(conv):
        conv, x = _last_of_deep(conv, normalize(x, mean, std, dtype))
        mean = std = None
    if current() is not None:
        made = conv_bn_relu(conv, bn, relu, normalize(x, mean, std, dtype))
        return carry_on(made, _pooled(maxpool, relu, made))
    norm = batch_norm(bn)
    if (
        norm is not None
        and plain_conv(conv)
        and conv.bias is None
        and conv.groups == 1
        and plain(relu, nn.ReLU)
        and plain_pool(maxpool)
    ):
        return conv_bn_relu_max_pool(
            x,
            conv.weight,
            norm,
            stride=conv.stride,
            padding=conv.padding,  # type: ignore[arg-type]
            pool_size=maxpool.kernel_size,
            pool_stride=maxpool.stride,
            pool_padding=maxpool.padding,
            mean=mean,
            std=std,
        )
    if trains_frozen(bn) and plain_conv(conv):
        # the convolution reads bytes as they are
        return pool_map(maxpool, norm_act(bn, relu, convolve(conv, x, mean, std)))
    image = normalize(x, mean, std, dtype)
    if takes_batch_statistics(bn) and plain(relu, nn.ReLU) and plain_pool(maxpool):
        made = convolve(conv, image)
        pool = maxpool.kernel_size, maxpool.stride, maxpool.padding
        if fuses_max_pool(made, bn, *pool):
            y, batch_mean, batch_var = batch_norm_act_max_pool(made, bn.weight, bn.bias, *pool, eps=bn.eps)
            track([bn], [(batch_mean, batch_var)], [made.numel() // made.shape[1]], moves)
            return y
        return pool_map(maxpool, norm_act(bn, relu, made))
    return pool_map(maxpool, conv_bn_relu(conv, bn, relu, image))


def stem_map(
    conv: nn.Module,
    bn: nn.Module,
    relu: nn.Module,
    x: torch.Tensor,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``relu(bn(conv(x)))`` of images, for who wants the map that :func:`stem` pools."""
    x = normalize(x, mean, std, dtype)
    if _deep(conv):
        conv, x = _last_of_deep(conv, x)
    return conv_bn_relu(conv, bn, relu, x)


def _pooled(maxpool: nn.Module, relu: nn.Module, made: torch.Tensor) -> torch.Tensor:
    """``maxpool(made)`` of what ``relu`` gave in a prepared model's own pass on a CPU."""
    if (
        is_finite(made)
        and plain(relu, nn.ReLU)
        and plain_pool(maxpool)
        and maxpool.kernel_size in (3, (3, 3))
        and maxpool.stride in (2, (2, 2))
        and maxpool.padding in (1, (1, 1))
        and made.is_contiguous(memory_format=torch.channels_last)
    ):
        return positive_pool.max_pool(made)
    return pool_map(maxpool, made)


def _deep(conv: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether ``conv`` is ResNet-D's."""
    return plain(conv, nn.Sequential) and len(conv) == 7


def _last_of_deep(conv: nn.Sequential, x: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """The last of three convolutions, and what the others make of ``x``."""
    for first in (0, 3):
        x = conv_bn_relu(conv[first], conv[first + 1], conv[first + 2], x)
    return conv[6], x
