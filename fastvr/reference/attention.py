"""softmax(scale * q k') v for every head of packed qkv, or of queries beside packed keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange


def attention(qkv: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    q, k, v = rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=num_heads).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return rearrange(y, "b h n d -> b n (h d)")


def attention_kv(q: torch.Tensor, kv: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    heads = rearrange(q, "b m (h d) -> b h m d", h=num_heads)
    k, v = rearrange(kv, "b n (kv h d) -> kv b h n d", kv=2, h=num_heads).unbind(0)
    y = F.scaled_dot_product_attention(heads, k, v, scale=scale)
    return rearrange(y, "b h m d -> b m (h d)")
