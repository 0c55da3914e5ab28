"""Dropout's random numbers by their place: Philox 4x32-10 (Salmon et al., 2011) in PyTorch, bit for bit what
the kernels draw."""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(seed: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Four words for each counter of four words, int64 tensors of values below 2**32 that broadcast together;
    ``seed`` is an int64 tensor, whose 64 bits are the key."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # products overflow 63 bits, and come out right modulo 2**64
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (high >> 32 & _WORD) ^ c1 ^ k0, high & _WORD
        c2, c3 = (low >> 32 & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = k0 + _STEPS[0] & _WORD, k1 + _STEPS[1] & _WORD
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """What a word, as a signed number, must not be below to stay: of 2**32 words ``p`` times as many are."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def keep_scale(p: float) -> float:
    """What the cells that stay are multiplied by; where every cell is dropped 0, for one word is left."""
    return 0.0 if p >= 1 else 1 / (1 - p)


def kept(seed: torch.Tensor, batch: int, num_heads: int, queries: int, keys: int, p: float) -> torch.Tensor:
    """Which attention weights stay, [batch, num_heads, queries, keys]; ``seed`` [2] int64: the key, and the
    last word of the counter, behind key // 4, query, and sample * num_heads + head."""
    groups, rows, planes = (
        torch.arange(n, device=seed.device) for n in (-(-keys // 4), queries, batch * num_heads)
    )
    counter = (groups[None, None, :], rows[None, :, None], planes[:, None, None], seed[1] & _WORD)
    words = torch.stack(torch.broadcast_tensors(*philox(seed[0], counter)), dim=-1).flatten(-2)
    # as a signed number: its upper half is negative
    signed = words - (words >> 31 << 32)
    stays: torch.Tensor = (signed >= threshold(p))[..., :keys]
    return stays.reshape(batch, num_heads, queries, keys)


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """x [..., N] times 0 or 1 / (1 - p), by row and column; 0 times NaN is NaN, as in PyTorch."""
    n = x.shape[-1]
    stays = kept(seed, 1, 1, x.numel() // max(n, 1), n, p).view(x.shape)
    return torch.where(stays, x * keep_scale(p), x * 0.0)
