"""Tokens of an image: a convolution whose stride is its kernel, prefix tokens in front, positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastvr.reference.image import normalize
from fastvr.reference.linear_stats import row_stats


def patch_embed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    pos_embed: torch.Tensor | None = None,
    prefix_tokens: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> torch.Tensor:
    x = normalize(x, mean, std, weight.dtype)
    y = F.conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if prefix_tokens is not None:
        y = torch.cat([prefix_tokens.expand(x.shape[0], -1, -1), y], 1)
    if pos_embed is not None:
        y = y + pos_embed
    # the sum keeps the transposed strides of the convolution where nothing was put before it
    return y.contiguous()


def patch_embed_stats(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    pos_embed: torch.Tensor | None = None,
    prefix_tokens: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = patch_embed(x, weight, bias, pos_embed, prefix_tokens, mean, std)
    return y, row_stats(y)
