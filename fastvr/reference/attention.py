"""softmax(scale * q k') v for every head of packed qkv."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange


def attention(qkv: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    q, k, v = rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=num_heads).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return rearrange(y, "b h n d -> b n (h d)")
