"""From features to logits: pooling and classifier."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn

from fastvr.nn.plain import linear, plain
from fastvr.ops.cpu.prepared_pass import current
from fastvr.ops.pool import avg_pool_linear, max_pool


def pool_tokens(x: torch.Tensor, global_pool: str, num_prefix_tokens: int) -> torch.Tensor:
    """[B, N, D] to [B, D]: the class token ("token"), the patches' mean ("avg"); "" leaves all tokens."""
    if global_pool == "token":
        return x[:, 0]
    return x[:, num_prefix_tokens:].mean(dim=1) if global_pool == "avg" else x


def classify_tokens(head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return linear(head, x)


def classify_map(avgpool: nn.Module, fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] to [N, num_classes], one launch where no module is observed or replaced."""
    if current() is not None:
        # the classifier's weight may be laid out for a product alone
        return linear(fc, torch.flatten(avgpool(x), 1))
    if plain(avgpool, nn.AdaptiveAvgPool2d) and avgpool.output_size in (1, (1, 1)) and plain(fc, nn.Linear):
        return avg_pool_linear(x, fc.weight, fc.bias)
    return linear(fc, torch.flatten(avgpool(x), 1))


def pool_map(maxpool: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``maxpool(x)``, through the op where ``maxpool`` is a plain ``nn.MaxPool2d``."""
    if plain_pool(maxpool):
        return max_pool(x, maxpool.kernel_size, maxpool.stride, maxpool.padding)
    y: torch.Tensor = maxpool(x)
    return y


def plain_pool(maxpool: nn.Module) -> TypeGuard[nn.MaxPool2d]:
    """Whether ``maxpool`` is a plain ``nn.MaxPool2d`` that the op can compute: no dilation, no indices."""
    return (
        plain(maxpool, nn.MaxPool2d)
        and not (maxpool.ceil_mode or maxpool.return_indices)
        and maxpool.dilation in (1, (1, 1))
    )
