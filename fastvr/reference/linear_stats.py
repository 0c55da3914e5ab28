"""linear, and the statistics of its rows that a LayerNorm behind it needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastvr.reference.linear import linear

# Columns that one (mean, M2) covers: every tile of a GEMM holds whole chunks, so that who writes the
# statistics and who reads them need not know each other's tiles.
STATS_CHUNK = 64


def row_stats(y: torch.Tensor) -> torch.Tensor:
    """(mean, M2) of each chunk of :data:`STATS_CHUNK` columns of y's rows.

    M2 is the sum of squared deviations from the chunk's mean; the last chunk may be narrower.

    Args:
        y: [..., features].

    Returns:
        [rows, ceil(features / STATS_CHUNK), 2], float32 (float64 for float64).
    """
    rows = y.reshape(-1, y.shape[-1]).to(torch.promote_types(y.dtype, torch.float32))
    width = rows.shape[1]
    padding = (0, -width % STATS_CHUNK)
    inside = F.pad(rows.new_ones(width), padding).view(-1, STATS_CHUNK)
    chunks = F.pad(rows, padding).view(len(rows), *inside.shape)
    mean = chunks.sum(-1) / inside.sum(-1)
    m2 = ((chunks - mean[..., None]) * inside).square().sum(-1)
    return torch.stack((mean, m2), -1)


def linear_stats(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    act: str = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    y = linear(x, weight, bias, gamma, residual, act)
    return y, row_stats(y)
