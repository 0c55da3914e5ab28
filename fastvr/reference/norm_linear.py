"""A linear layer with the LayerNorm before it folded into its weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastvr.reference.linear import activate
from fastvr.reference.linear_stats import STATS_CHUNK


def merge_row_stats(stats: torch.Tensor, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of rows of ``features`` elements, [rows, 1] each, from the (mean, M2) of their chunks
    by Chan's formula (Chan, Golub, LeVeque, 1979)."""
    mean, m2 = stats.unbind(-1)
    last = torch.full_like(mean[:1, :1], features - STATS_CHUNK * (mean.shape[1] - 1))
    size = torch.cat([torch.full_like(mean[:1, 1:], STATS_CHUNK), last], 1)
    whole = (mean * size).sum(1, keepdim=True) / features
    m2 = (m2 + (mean - whole).square() * size).sum(1, keepdim=True)
    return whole, m2 / features


def norm_linear(
    x: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    colsum: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    act: str = "none",
) -> torch.Tensor:
    # PyTorch has the normalised row to multiply, and colsum puts right what it has not
    features = x.shape[-1]
    mean, variance = merge_row_stats(stats, features)
    rows = x.reshape(-1, features).to(mean.dtype)
    normed = ((rows - mean) * torch.rsqrt(variance + eps)).to(x.dtype).view(x.shape)
    return activate(F.linear(normed, weight, None if bias is None else bias.to(x.dtype)), act)
