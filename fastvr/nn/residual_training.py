"""A residual block in training as one computation, where its modules are the ones that it computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastvr import backend
from fastvr.nn.conv_bn_relu import plain_conv, takes_batch_statistics
from fastvr.nn.plain import plain
from fastvr.nn.running_statistics import Moves, track
from fastvr.ops import _check
from fastvr.ops.residual_block import Layer, fuses_residual_block, normalised_pixels, residual_block


def train_block(
    branch: Sequence[tuple[nn.Module, nn.Module]],
    relu: nn.Module,
    shortcut: nn.Module | None,
    x: torch.Tensor,
    moves: Moves | None,
) -> torch.Tensor | None:
    """``relu(branch(x) + shortcut(x))``; None where modules have to be called.

    Args:
        branch: convolutions with their BatchNorms, ``relu`` between two of them.
        relu: also behind the sum.
        shortcut: a convolution and a BatchNorm; None is x itself.
        moves: take those of the running statistics; None moves them at once.
    """
    if not torch.is_grad_enabled() or not backend.kernels_possible(x.device) or not plain(relu, nn.ReLU):
        return None
    pairs = list(branch)
    if shortcut is not None:
        if not plain(shortcut, nn.Sequential) or len(shortcut) != 2:
            return None
        pairs.append((shortcut[0], shortcut[1]))
    layers: list[Layer] = []
    norms: list[nn.BatchNorm2d] = []
    for conv, bn in pairs:
        layer = _layer(conv, bn, x)
        if layer is None:
            return None
        assert isinstance(bn, nn.BatchNorm2d)
        layers.append(layer)
        norms.append(bn)
    inside, other = layers[: len(branch)], layers[-1] if shortcut is not None else None
    if not fuses_residual_block(x, inside, other):
        return None
    y, statistics = residual_block(x, inside, other)
    track(norms, statistics, normalised_pixels(x, inside, other), moves)
    return y


def _layer(conv: nn.Module, bn: nn.Module, x: torch.Tensor) -> Layer | None:
    if not (plain_conv(conv) and takes_batch_statistics(bn)):
        return None
    (stride, across), padding = conv.stride, conv.padding
    assert not isinstance(padding, str)
    # under autocast the residual stream must be of its dtype already: a float32 one is not rounded there
    autocast = _check.autocast_dtype(x.device)
    if (
        conv.bias is not None
        or conv.groups != 1
        or stride != across
        or padding[0] != padding[1]
        or bn.num_features != conv.out_channels
        or x.dtype != (autocast or conv.weight.dtype)
        or bn.weight.dtype not in (x.dtype, torch.float32)
        or bn.eps <= 0
    ):
        return None
    return Layer(conv.weight, bn.weight, bn.bias, bn.eps, stride, padding[0])
