"""softmax(scale * q k') v for every head of packed qkv."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(qkv: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    batch, n, width = qkv.shape
    head_dim = width // (3 * num_heads)
    q, k, v = qkv.reshape(batch, n, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return y.transpose(1, 2).reshape(batch, n, num_heads * head_dim)
