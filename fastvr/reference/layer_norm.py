"""LayerNorm over the last dimension (Ba, Kiros, Hinton, 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    if weight.dtype != x.dtype:
        # autocast's LayerNorm: float32 parameters beside 16-bit activations are taken in float32
        wide = torch.promote_types(x.dtype, weight.dtype)
        y = F.layer_norm(
            x.to(wide), weight.shape, weight.to(wide), None if bias is None else bias.to(wide), eps
        )
        return y.to(out_dtype or x.dtype)
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return y if out_dtype is None else y.to(out_dtype)


def row_moments(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Mean and 1 / deviation of each row, [rows, 2], in float32 (float64 for float64)."""
    rows = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(rows, 1, correction=0)
    return torch.stack([mean, (var + eps).rsqrt()], 1)
