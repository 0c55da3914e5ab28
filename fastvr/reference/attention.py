"""softmax(scale * q k') v for every head of packed qkv, or of queries beside packed keys and values; and with
what their gradient needs, the base-2 logarithm of every query's sum of exp(scale * q k'). With a seed weights
are dropped by their place."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange

from fastvr.reference.dropout import keep_scale, kept


def attention(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    q, k, v = rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=num_heads).unbind(0)
    if seed is None:
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        weights = (q * scale @ k.transpose(-2, -1)).softmax(-1)
        batch, _, queries, keys = weights.shape
        stays = kept(seed, batch, num_heads, queries, keys, dropout_p)
        y = torch.where(stays, weights * keep_scale(dropout_p), 0.0) @ v
    return rearrange(y, "b h n d -> b n (h d)")


def attention_kv(q: torch.Tensor, kv: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    heads = rearrange(q, "b m (h d) -> b h m d", h=num_heads)
    k, v = rearrange(kv, "b n (kv h d) -> kv b h n d", kv=2, h=num_heads).unbind(0)
    y = F.scaled_dot_product_attention(heads, k, v, scale=scale)
    return rearrange(y, "b h m d -> b m (h d)")


def attention_training(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, kv = qkv.tensor_split([qkv.shape[-1] // 3], dim=-1)
    return attention(qkv, num_heads, scale, dropout_p, seed), _log_sum_exp(q, kv, num_heads, scale)


def attention_kv_training(
    q: torch.Tensor, kv: torch.Tensor, num_heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_kv(q, kv, num_heads, scale), _log_sum_exp(q, kv, num_heads, scale)


def _log_sum_exp(q: torch.Tensor, kv: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    # in float64: what computes the scores again subtracts this from them, and has rounding errors of its own
    heads = rearrange(q.double(), "b m (h d) -> b h m d", h=num_heads)
    keys = rearrange(kv[..., : q.shape[-1]].double(), "b n (h d) -> b h d n", h=num_heads)
    lse = torch.logsumexp(heads @ keys * scale, -1) * math.log2(math.e)
    return lse.to(torch.promote_types(q.dtype, torch.float32))
