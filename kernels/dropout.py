"""Dropout's random numbers by their place: the words of Philox 4x32-10 (Salmon et al., 2011) at a counter
that says which cell they are for: of attention weights the sample and head, the query and the key, of a
matrix its row and column. Whatever a program's tiles, forward or backward, the same cell finds the same word,
and nothing is kept.

One counter gives four words, for four keys or columns that are neighbours. `fastvr.reference.dropout` is the
same in PyTorch. Epilogues of products take their words here too (`linear.py`); a gradient that only enters
products is dropped by a launch of its own, since a product's prologue would draw its words anew for every
tile of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvr.kernels.common import ceil_div, launch
from fastvr.reference.dropout import keep_scale, threshold


@triton.jit
def kept_at(
    seed_ptr,  # [2] int64: Philox's key, and the last word of its counter
    plane,
    queries,  # [QUERIES, 1] int32
    first_key,  # a multiple of 4
    threshold,  # int32: a word below it, as a signed number, drops its cell
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,  # a multiple of 4
):
    """Which cells of a block [QUERIES, KEYS] stay."""
    GROUPS: tl.constexpr = KEYS // 4
    groups = first_key // 4 + tl.arange(0, GROUPS)[None, :]
    zeros = tl.zeros((QUERIES, GROUPS), tl.int32)
    last = tl.load(seed_ptr + 1).to(tl.int32)
    a, b, c, d = tl.philox(tl.load(seed_ptr), zeros + groups, zeros + queries, zeros + plane, zeros + last)
    # bytes: what moves between threads where a block's layout is the product's
    a = (a.to(tl.int32, bitcast=True) >= threshold).to(tl.int8)
    b = (b.to(tl.int32, bitcast=True) >= threshold).to(tl.int8)
    c = (c.to(tl.int32, bitcast=True) >= threshold).to(tl.int8)
    d = (d.to(tl.int32, bitcast=True) >= threshold).to(tl.int8)
    four = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(four, (QUERIES, KEYS)) != 0


@triton.jit
def kept(
    seed_ptr,
    plane,  # sample * heads + head
    first_query,
    first_key,
    threshold,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Which of QUERIES x KEYS attention weights stay."""
    queries = first_query + tl.arange(0, QUERIES)[:, None]
    return kept_at(seed_ptr, plane, queries, first_key, threshold, QUERIES, KEYS)


@triton.jit
def drop_factors(
    seed_ptr, offs_m, first_n, threshold, keep_scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """What the cells of a block of a matrix's rows ``offs_m`` are multiplied by, 0 or 1 / (1 - p): so a
    dropped NaN stays one, as in PyTorch."""
    rows = offs_m.to(tl.int32)[:, None]
    stays = kept_at(seed_ptr, 0, rows, first_n, threshold, BLOCK_M, BLOCK_N)
    return tl.where(stays, keep_scale, 0.0)


@triton.jit(do_not_specialize=["M", "threshold"])
def _dropout_kernel(
    x_ptr,  # [M, N]
    y_ptr,  # [M, N] dense
    seed_ptr,  # [2] int64
    M,
    N,
    stride_xm,
    stride_xn,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = tl.program_id(1) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_n.to(tl.int64)[None, :] * stride_xn
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    y = x * drop_factors(seed_ptr, offs_m, first_n, threshold, keep_scale, BLOCK_M, BLOCK_N)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def candidate_configs(n: int, arch: str) -> list[dict[str, int]]:
    """Configurations for rows of ``n``; the first is the default."""
    if arch == "interpreter":
        # there a program costs more than its elements; the second makes several
        return [_config(64, 256, 4), _config(4, 32, 4)]
    # 8 or 16 elements a thread: two or four counters
    width = min(512, max(16, triton.next_power_of_2(n)))
    return [_config(max(1, size // width), width, warps) for size, warps in ((1024, 4), (2048, 4), (2048, 8))]


def default_config(n: int, arch: str) -> dict[str, int]:
    return candidate_configs(n, arch)[0]


def _config(m: int, n: int, warps: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": 1}


def launch_dropout(
    *,
    x: torch.Tensor,  # [M, N], any strides
    y: torch.Tensor,  # [M, N], contiguous
    p: float,
    seed: torch.Tensor,  # [2] int64, contiguous
    config: dict[str, int],
) -> None:
    m, n = x.shape
    launch(
        _dropout_kernel,
        (ceil_div(m, config["BLOCK_M"]), ceil_div(n, config["BLOCK_N"])),
        config,
        x_ptr=x,
        y_ptr=y,
        seed_ptr=seed,
        M=m,
        N=n,
        stride_xm=x.stride(0),
        stride_xn=x.stride(1),
        threshold=threshold(p),
        keep_scale=keep_scale(p),
    )
