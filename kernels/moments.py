"""Mean and variance of rows in float32, as (count, mean, M2): M2 is the sum of squared deviations.

Parts of a row are merged by Chan's formula (Chan, Golub, LeVeque, 1979); sums of squares would lose their
digits where the mean is many deviations.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_moments(count, mean, m2, block_count, block_mean, block_m2):
    """(count, mean, M2) of two disjoint sets together: Chan's formula."""
    total = count + block_count
    delta = block_mean - mean
    share = block_count / total
    return total, mean + delta * share, m2 + block_m2 + delta * delta * (count * share)


@triton.jit
def row_moments(x_ptrs, row_mask, K, stride_xk, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and M2 of BLOCK_M rows of K elements."""
    count = 0.0
    mean = tl.zeros((BLOCK_M,), tl.float32)
    m2 = tl.zeros((BLOCK_M,), tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        inside = offs_k < K - start
        x = tl.load(
            x_ptrs + (start + offs_k)[None, :] * stride_xk,
            mask=row_mask[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        block_count = tl.minimum(K - start, BLOCK_K).to(tl.float32)
        block_mean = tl.sum(x, 1) / block_count
        deviation = tl.where(inside[None, :], x - block_mean[:, None], 0.0)
        block_m2 = tl.sum(deviation * deviation, 1)
        count, mean, m2 = merge_moments(count, mean, m2, block_count, block_mean, block_m2)
    return mean, m2


@triton.jit
def merge_row_stats(row_ptrs, row_mask, K, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Mean and M2 of BLOCK_M rows of K elements, from the statistics of their chunks (`store_row_stats`);
    CHUNKS is a power of two that holds them all."""
    chunks = tl.cdiv(K, CHUNK)
    # both of a chunk in one load: half as many addresses to hold
    part = tl.arange(0, 2 * CHUNKS)
    ptrs = row_ptrs[:, None] + part[None, :]
    both = tl.load(ptrs, mask=row_mask[:, None] & (part < 2 * chunks)[None, :], other=0.0)
    mean, m2 = tl.split(tl.reshape(both, (BLOCK_M, CHUNKS, 2)))
    size = tl.minimum(tl.maximum(K - tl.arange(0, CHUNKS) * CHUNK, 0), CHUNK).to(tl.float32)[None, :]
    whole = tl.sum(mean * size, 1) / K
    deviation = mean - whole[:, None]
    return whole, tl.sum(m2 + deviation * deviation * size, 1)


@triton.jit
def store_row_stats(
    stats_ptr,
    values,
    offs_m,
    offs_n,
    M,
    N,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(mean, M2) of each CHUNK columns of a tile of float32 values, into [M, ceil(N / CHUNK), 2]."""
    CHUNKS: tl.constexpr = BLOCK_N // CHUNK
    values = tl.reshape(values, (BLOCK_M, CHUNKS, CHUNK))
    inside = tl.reshape(offs_n < N, (1, CHUNKS, CHUNK))
    # the first column of the tile's chunks; BLOCK_N is a multiple of CHUNK
    first = tl.min(tl.reshape(offs_n, (CHUNKS, CHUNK)), 1)
    size = tl.minimum(tl.maximum(N - first, 1), CHUNK).to(tl.float32)
    mean = tl.sum(tl.where(inside, values, 0.0), 2) / size[None, :]
    deviation = tl.where(inside, values - mean[:, :, None], 0.0)
    m2 = tl.sum(deviation * deviation, 2)
    ptrs = stats_ptr + (offs_m[:, None] * tl.cdiv(N, CHUNK) + (first // CHUNK)[None, :]) * 2
    mask = (offs_m < M)[:, None] & (first < N)[None, :]
    tl.store(ptrs, mean, mask=mask)
    tl.store(ptrs + 1, m2, mask=mask)
