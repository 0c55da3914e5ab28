"""Attention over packed keys and values: softmax(scale * q k') v for every head, in one launch.

qkv [B, N, 3 * H * D] holds q, k and v side by side, each head-major (timm's packing); or the queries come by
themselves, q [B, M, H * D], and kv [B, N, 2 * H * D] holds the rest. y [B, M, H * D]. A program takes BLOCK_M
queries of one head and walks the keys once with an online softmax (Milakov and Gimelshein, 2018;
FlashAttention, Dao et al., 2022): scores, maxima, sums and the accumulator are float32, the unnormalised
probabilities are rounded to v's dtype before the second product, and the result is rounded once.

For the gradient the same kernel also leaves each query's log-sum-exp, in base 2 as it computes it: what
backward subtracts is then rounded once, and the errors of a score's own rounding cancel.

With ``seed`` the weights are dropped (`dropout.py`) behind their sum, and the result is scaled once.

Vision sequences are a few keys longer than a multiple of 64 (a class token, registers): whole blocks run
without masks, and what is left runs in steps of 16, so that one extra key does not cost a block of 64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.common import ceil_div, dot_precision, launch
from fastvr.kernels.dropout import kept
from fastvr.reference.dropout import keep_scale, threshold

TAIL = 16  # the smallest inner dimension of a 16-bit tensor-core product
FEW_QUERIES = 16  # its least number of rows


@triton.jit
def _attend(
    q,
    k_ptrs,
    v_ptrs,
    keys,
    columns,
    running_max,
    total,
    acc,
    scale_log2,
    seed_ptr,
    plane,
    first_query,
    first_key,
    threshold,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys; ``running_max`` is the running maximum of ``score * scale_log2``."""
    if MASKED:
        # zeros, not whatever follows: a probability of 0 times a neighbour's NaN is NaN
        k = tl.load(k_ptrs, mask=keys[:, None] & columns[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=keys[:, None] & columns[None, :], other=0.0)
    elif EVEN_D:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    else:
        k = tl.load(k_ptrs, mask=columns[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=columns[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(keys[None, :], scores, float("-inf"))
    # a NaN that the maximum drops comes back through the exponential
    new_max = tl.maximum(running_max, tl.max(scores, 1) * scale_log2)
    # where every score so far is -inf, subtracting the maximum would make NaN of a probability of 0
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores * scale_log2 - shift[:, None])
    correction = tl.exp2(running_max - shift)
    total = total * correction + tl.sum(p, 1)
    if seed_ptr is not None:
        p = tl.where(kept(seed_ptr, plane, first_query, first_key, threshold, BLOCK_M, KEYS), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
    return new_max, total, acc


@triton.jit
def _attention_fwd_kernel(
    q_ptr,  # [B, M, H, D]
    k_ptr,  # [B, N, 2, H, D]: keys, then values
    y_ptr,  # [B, M, H, D], contiguous
    lse_ptr,  # [B, H, M] float32, or None: the base-2 logarithm of the sum of 2 ** (score * scale_log2)
    seed_ptr,  # [2] int64, or None: no dropout
    M,
    N,
    stride_qb,
    stride_qm,
    stride_kb,
    stride_kn,
    scale_log2,  # scale * log2(e), positive
    threshold,  # int32, with seed
    keep_scale,  # 1 / (1 - p), with seed
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEY_COLUMN: tl.constexpr,  # where keys start in a row behind k_ptr
    PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # neighbours share keys and values, in L2; all in one grid dimension, since y and z end at 65,535
    blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    sample = (pid // (blocks * NUM_HEADS)).to(tl.int64)
    head = pid // blocks % NUM_HEADS
    first = pid % blocks * BLOCK_M
    stride_row = tl.cast(stride_kn, tl.int64)
    EVEN_D: tl.constexpr = HEAD_DIM == BLOCK_D
    offs_d = tl.arange(0, BLOCK_D)
    columns = offs_d < HEAD_DIM

    # 64-bit pointers to the head of a block, 32-bit offsets inside it (the op sees to that): 64-bit ones cost
    # registers enough to spill
    q_head = q_ptr + sample * stride_qb + first * tl.cast(stride_qm, tl.int64) + head * HEAD_DIM
    # queries past the end repeat the last one and are never stored
    rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first)
    q_ptrs = q_head + (rows[:, None] * stride_qm + offs_d[None, :])
    q = tl.load(q_ptrs, mask=columns[None, :], other=0.0)

    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    k_head = k_ptr + sample * stride_kb + KEY_COLUMN + head * HEAD_DIM
    offs_n = tl.arange(0, BLOCK_N)
    block = offs_n[:, None] * stride_kn + offs_d[None, :]
    whole = N // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        # no pointer is carried from step to step: Triton 3.6 fails on that for AMD
        k_ptrs = k_head + start * stride_row + block
        running_max, total, acc = _attend(
            q, k_ptrs, k_ptrs + NUM_HEADS * HEAD_DIM, offs_n < N, columns, running_max, total, acc,
            scale_log2, seed_ptr, pid // blocks, first, start, threshold, BLOCK_M, BLOCK_N, False, EVEN_D,
            PRECISION,
        )  # fmt: skip

    offs_t = tl.arange(0, TAIL)
    tail = offs_t[:, None] * stride_kn + offs_d[None, :]
    for start in tl.range(whole, N, TAIL, num_stages=1):
        k_ptrs = k_head + start * stride_row + tail
        running_max, total, acc = _attend(
            q, k_ptrs, k_ptrs + NUM_HEADS * HEAD_DIM, start + offs_t < N, columns, running_max, total, acc,
            scale_log2, seed_ptr, pid // blocks, first, start, threshold, BLOCK_M, TAIL, True, EVEN_D,
            PRECISION,
        )  # fmt: skip

    acc *= (1.0 / total)[:, None]
    if seed_ptr is not None:
        acc *= keep_scale
    offs_m = tl.arange(0, BLOCK_M)
    if lse_ptr is not None:
        lse_ptrs = lse_ptr + (sample * NUM_HEADS + head) * M + first + offs_m
        tl.store(lse_ptrs, running_max + tl.log2(total), mask=offs_m < M - first)
    y_head = y_ptr + (sample * M + first) * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
    y_ptrs = y_head + (offs_m[:, None] * (NUM_HEADS * HEAD_DIM) + offs_d[None, :])
    mask = (offs_m < M - first)[:, None] & columns[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def _tile(m: int, n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": num_warps, "num_stages": num_stages}


def candidate_configs(
    dtype: torch.dtype, arch: str, *, head_dim: int, few: bool = False, dropout: bool = False
) -> list[dict[str, int]]:
    """Configurations that fit ``arch`` for this head_dim; the first is the default. ``few``: at most
    ``FEW_QUERIES`` queries, where reading keys and values is all that takes time."""
    wide = head_dim > 64
    if dropout and arch != "interpreter":
        # random numbers take registers: those of the others that spill nowhere
        if dtype == torch.float32:
            return [_tile(16, 16, 4, 1)]
        return [_tile(64, 64, 4, 2), _tile(64, 32, 4, 2) if wide else _tile(128, 64, 8, 2)]
    if few:
        if dtype == torch.float32:
            # two warps would spill where the inner dimension unrolls past 64
            return [_tile(FEW_QUERIES, 16, 4, 1)] + [_tile(FEW_QUERIES, 16, 2, 1)] * (not wide)
        return [_tile(FEW_QUERIES, 64, 4, 2), _tile(FEW_QUERIES, 128, 4, 2), _tile(FEW_QUERIES, 32, 2, 3)]
    if arch == "interpreter":
        return [_tile(128, 64, 4, 1), _tile(64, 128, 4, 1)]
    if arch.startswith("gfx"):
        if dtype == torch.float32:
            return [_tile(32, 32, 4, 1), _tile(16, 16, 4, 1)]
        return [_tile(64, 64, 4, 2), _tile(64, 32, 4, 2), _tile(128, 64, 8, 2)]
    if dtype == torch.float32:
        # IEEE float32 has no matrix instruction on NVIDIA, and its products unroll the whole inner dimension
        # into registers: larger tiles spill
        return (
            [_tile(32, 16, 8, 1), _tile(16, 16, 4, 1)] if wide else [_tile(32, 32, 4, 1), _tile(64, 16, 8, 1)]
        )
    if wide:
        return [_tile(64, 64, 4, 2), _tile(64, 32, 4, 2), _tile(128, 64, 8, 2)]
    if arch == "sm_100":
        # ptxas holds the others to few registers, for the sake of one program more, and spills
        return [_tile(64, 64, 4, 2), _tile(128, 64, 8, 2)] if head_dim > 32 else [_tile(128, 64, 8, 2)]
    # 128 keys a step save a rescaling of the accumulator, and lose where many keys are left for the tail
    return [_tile(64, 64, 4, 2), _tile(128, 64, 8, 2), _tile(64, 128, 4, 2)]


def default_config(
    dtype: torch.dtype, arch: str, *, head_dim: int, few: bool = False, dropout: bool = False
) -> dict[str, int]:
    """The configuration without a measurement: 64 queries waste little of 197 or 257."""
    return candidate_configs(dtype, arch, head_dim=head_dim, few=few, dropout=dropout)[0]


def launch_attention_fwd(
    *,
    q: torch.Tensor,  # [B, M, H * D], or packed qkv [B, N, 3 * H * D] again; last dimension contiguous
    kv: torch.Tensor,  # [B, N, 2 * H * D], or packed qkv [B, N, 3 * H * D]; last dimension contiguous
    y: torch.Tensor,  # [B, M, H * D], contiguous
    lse: torch.Tensor | None = None,  # [B, H, M] float32, contiguous
    num_heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,  # [2] int64, contiguous, with dropout_p
    config: dict[str, int],
) -> None:
    B, M, width = y.shape
    head_dim = width // num_heads
    grid = (B * num_heads * ceil_div(M, config["BLOCK_M"]),)
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": kv,
        "y_ptr": y,
        "lse_ptr": lse,
        "seed_ptr": seed,
        "M": M,
        "N": kv.shape[1],
        "stride_qb": q.stride(0),
        "stride_qm": q.stride(1),
        "stride_kb": kv.stride(0),
        "stride_kn": kv.stride(1),
        "scale_log2": scale * 1.4426950408889634,
        "threshold": 0 if seed is None else threshold(dropout_p),
        "keep_scale": keep_scale(dropout_p),
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "KEY_COLUMN": kv.shape[2] - 2 * width,
        "PRECISION": dot_precision(q.dtype),
        "TAIL": TAIL,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }
    launch(_attention_fwd_kernel, grid, config, **arguments)
