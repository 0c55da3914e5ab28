"""Attention of bfloat16 heads on a CPU by oneDNN's products, in place of PyTorch's own kernel.

A product leaves scores rounded to bfloat16, too coarse for a softmax. So it is taken twice: once for the
scores, and once for what rounding took from them, ``q @ k.T - scores``, which oneDNN subtracts before it
rounds. The sum of both in float32 has twice the digits.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch

# scores at once, of which three copies live: as many as stay in a shared cache
_SCORES = 2**20


def key(qkv: torch.Tensor, num_heads: int, scale: float) -> Hashable:
    """What decides whether it is the faster way; one key for all batch sizes."""
    return "attention", qkv.dtype, tuple(qkv.shape[1:]), num_heads, scale


def takes(qkv: torch.Tensor) -> bool:
    return qkv.dtype == torch.bfloat16 and qkv.numel() > 0


def attention(qkv: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    """``softmax(scale * q @ k.T) @ v`` of qkv [B, N, 3 * D] in any layout; [B, N, D]."""
    batch, n, width = qkv.shape
    heads = qkv.reshape(batch, n, 3, num_heads, width // 3 // num_heads).permute(2, 0, 3, 1, 4)
    heads, some = heads.contiguous().flatten(1, 2), max(_SCORES // n**2, 1)
    y = torch.empty_like(heads[0])
    for (q, k, v), made in zip(heads.split(some, 1), y.split(some), strict=True):
        weights = _scores(q, k.transpose(1, 2), scale).softmax(-1)
        torch.bmm(weights.to(qkv.dtype), v, out=made)
    result: torch.Tensor = y.unflatten(0, (batch, num_heads)).transpose(1, 2).flatten(2)
    return result


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * q @ k`` in float32."""
    if math.frexp(scale)[0] == 0.5:
        # a power of two changes no digit
        q, scale = q * scale, 1.0
    rounded = torch.bmm(q, k)
    scores = rounded.float()
    scores += rounded.baddbmm_(q, k, beta=-1)
    return scores if scale == 1 else scores.mul_(scale)
