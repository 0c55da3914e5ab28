"""The gradient of attention over packed keys and values, in two launches or one, without atomics.

With p = exp2(scale * log2(e) * q k' - lse), where lse is the base-2 log-sum-exp that the forward pass left,
and delta = rowsum(grad * y): dv = p' grad, ds = p * (grad v' - delta), dq = scale * ds k, dk = scale * ds' q
(FlashAttention-2, Dao, 2023). Probabilities are computed again, once for dk and dv and once for dq: seven
products where five and an atomic sum would do, and the same bits in every run. Sums are float32; p and ds are
rounded to the operands' dtype before a product takes them, as PyTorch's flash kernels do. With ``seed`` the
weights that the forward pass dropped are found again (`dropout.py`): dv takes those that stayed, and so does
grad v'.

The first launch leaves delta. It reads grad and y once; inside the second launch every block of keys would
read y again beside q and grad, half as many loads again in a loop that is short of registers. In the second
one a program takes BLOCK_M keys of one head and walks its queries, or BLOCK_M queries and walks their keys:
both read the same q, k, v and grad, so that one launch fetches them from memory once.

Up to TAIL keys are one block, and there is no first launch: the second takes the softmax anew, and delta as
rowsum(p * dp). Delta by way of y has the roundings of y and of another product's sums, and where one key has
nearly all of p, dp - delta is little else. PyTorch's backward pass through the weights themselves, which is
its own with dropout, does not have them; among many rows others outweigh such a one, among a few it shows.

Layouts are the forward kernel's, and so are its whole blocks without masks and its tail in steps of 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.attention import TAIL
from fastvr.kernels.common import ceil_div, dot_precision, launch
from fastvr.kernels.dropout import kept
from fastvr.reference.dropout import keep_scale, threshold

LOG2_E = 1.4426950408889634


@triton.jit
def _rows(ptrs, rows, columns, MASKED: tl.constexpr, EVEN_D: tl.constexpr):
    """A block of one head's rows; zeros past its end, not a neighbour's NaN."""
    if MASKED:
        x = tl.load(ptrs, mask=rows[:, None] & columns[None, :], other=0.0)
    elif EVEN_D:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=columns[None, :], other=0.0)
    return x


@triton.jit
def _softmax(scores, keys, scale_log2, AXIS: tl.constexpr):
    """Of whole rows, without lse and its rounding. The division is exact: a key that has all of p has 1."""
    scores = tl.where(keys, scores, float("-inf"))
    p = tl.exp2((scores - tl.expand_dims(tl.max(scores, AXIS), AXIS)) * scale_log2)
    return tl.div_rn(p, tl.expand_dims(tl.sum(p, AXIS), AXIS))


@triton.jit
def _centred(p, dp, keys, AXIS: tl.constexpr):
    """dp less its mean by p, of whole rows. Where one key has nearly all of p they nearly cancel: what the
    first mean lost by rounding, the second takes away."""
    dp = tl.where(keys, dp, 0.0)
    dp -= tl.expand_dims(tl.sum(p * dp, AXIS), AXIS)
    lost = tl.sum(p * dp, AXIS)
    # beside an infinite mean it is NaN, and nothing is lost
    return dp - tl.expand_dims(tl.where(lost == lost, lost, 0.0), AXIS)


@triton.jit
def _add_queries(
    k,
    v,
    q_ptrs,
    grad_ptrs,
    lse_ptrs,
    delta_ptrs,
    queries,
    keys,
    columns,
    dk,
    dv,
    scale_log2,
    seed_ptr,
    plane,
    first_query,
    first_key,
    threshold,
    keep_scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one block of queries adds to dk / scale and dv of a block of keys; scores are transposed."""
    q = _rows(q_ptrs, queries, columns, MASKED, EVEN_D)
    grad = _rows(grad_ptrs, queries, columns, MASKED, EVEN_D)
    if not WHOLE_ROWS:
        if MASKED:
            lse = tl.load(lse_ptrs, mask=queries, other=0.0)
            delta = tl.load(delta_ptrs, mask=queries, other=0.0)
        else:
            lse = tl.load(lse_ptrs)
            delta = tl.load(delta_ptrs)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if WHOLE_ROWS:
        p = _softmax(scores, keys[:, None], scale_log2, 0)
    else:
        p = tl.exp2(scores * scale_log2 - lse[None, :])
    if MASKED:
        # an infinite key would make NaN of a missing query's zeros
        p = tl.where(queries[None, :], p, 0.0)
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    if seed_ptr is not None:
        stays = tl.trans(kept(seed_ptr, plane, first_query, first_key, threshold, QUERIES, KEYS))
        dv = tl.dot(tl.where(stays, p, 0.0).to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.where(stays, dp * keep_scale, 0.0)
    else:
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    if WHOLE_ROWS:
        dp = _centred(p, dp, keys[:, None], 0)
    else:
        dp -= delta[None, :]
    ds = p * dp
    if MASKED:
        ds = tl.where(queries[None, :], ds, 0.0)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _add_keys(
    q,
    grad,
    lse,
    delta,
    k_ptrs,
    v_ptrs,
    keys,
    columns,
    dq,
    scale_log2,
    seed_ptr,
    plane,
    first_query,
    first_key,
    threshold,
    keep_scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one block of keys adds to dq / scale of a block of queries."""
    k = _rows(k_ptrs, keys, columns, MASKED, EVEN_D)
    v = _rows(v_ptrs, keys, columns, MASKED, EVEN_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if WHOLE_ROWS:
        p = _softmax(scores, keys[None, :], scale_log2, 1)
    else:
        p = tl.exp2(scores * scale_log2 - lse[:, None])
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    if seed_ptr is not None:
        stays = kept(seed_ptr, plane, first_query, first_key, threshold, QUERIES, KEYS)
        dp = tl.where(stays, dp * keep_scale, 0.0)
    if WHOLE_ROWS:
        dp = _centred(p, dp, keys[None, :], 1)
    else:
        dp -= delta[:, None]
    ds = p * dp
    if MASKED:
        ds = tl.where(keys[None, :], ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _attention_delta_kernel(
    grad_ptr,  # [B, M, H, D]
    y_ptr,  # [B, M, H, D], contiguous
    delta_ptr,  # [B, H, M] float32
    M,
    stride_gb,
    stride_gm,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(M, ROWS)
    pid = tl.program_id(0)
    # the heads of a row lie side by side: neighbours read neighbouring memory
    head = pid % NUM_HEADS
    sample = (pid // (blocks * NUM_HEADS)).to(tl.int64)
    offs_m = pid // NUM_HEADS % blocks * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < M)[:, None] & (offs_d < HEAD_DIM)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    columns = head * HEAD_DIM + offs_d[None, :]
    grad = tl.load(grad_ptr + sample * stride_gb + rows * stride_gm + columns, mask=mask, other=0.0)
    y = tl.load(y_ptr + (sample * M + rows) * (NUM_HEADS * HEAD_DIM) + columns, mask=mask, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta_ptr + (sample * NUM_HEADS + head) * M + offs_m, delta, mask=offs_m < M)


@triton.jit
def _attention_bwd_kernel(
    grad_ptr,  # [B, M, H, D]
    q_ptr,  # [B, M, H, D]
    k_ptr,  # [B, N, 2, H, D]: keys, then values
    lse_ptr,  # [B, H, M] float32
    delta_ptr,  # [B, H, M] float32, or None: N <= TAIL, a block holds whole rows
    dq_ptr,  # [B, M, H, D] in rows of DQ_WIDTH, or None
    dk_ptr,  # [B, N, 2, H, D] in rows of DK_WIDTH, as k; or None
    seed_ptr,  # [2] int64, or None: no dropout
    M,
    N,
    stride_gb,
    stride_gm,
    stride_qb,
    stride_qm,
    stride_kb,
    stride_kn,
    scale,
    scale_log2,  # scale * log2(e)
    threshold,  # int32, with seed
    keep_scale,  # 1 / (1 - p), with seed
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEY_COLUMN: tl.constexpr,  # where keys start in a row behind k_ptr and dk_ptr
    DQ_WIDTH: tl.constexpr,
    DK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # neighbours share a head, in L2; all in one grid dimension, since y and z end at 65,535
    key_blocks = 0
    if dk_ptr is not None:
        key_blocks = tl.cdiv(N, BLOCK_M)
    blocks = key_blocks
    if dq_ptr is not None:
        blocks += tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % blocks
    sample = (pid // (blocks * NUM_HEADS)).to(tl.int64)
    plane = pid // blocks
    head = plane % NUM_HEADS
    EVEN_D: tl.constexpr = HEAD_DIM == BLOCK_D
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_DIM
    offs_d = tl.arange(0, BLOCK_D)
    columns = offs_d < HEAD_DIM
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_t = tl.arange(0, TAIL)

    # 64-bit pointers to the head of a block, 32-bit offsets inside it, and none carried from step to step:
    # as in the forward kernel
    grad_head = grad_ptr + sample * stride_gb + head * HEAD_DIM
    q_head = q_ptr + sample * stride_qb + head * HEAD_DIM
    k_head = k_ptr + sample * stride_kb + KEY_COLUMN + head * HEAD_DIM
    lse_head = lse_ptr + (sample * NUM_HEADS + head) * M
    WHOLE_ROWS: tl.constexpr = delta_ptr is None
    delta_head = lse_head  # and what is read there is not used
    if not WHOLE_ROWS:
        delta_head = delta_ptr + (sample * NUM_HEADS + head) * M
    step_g = tl.cast(stride_gm, tl.int64)
    step_q = tl.cast(stride_qm, tl.int64)
    step_k = tl.cast(stride_kn, tl.int64)

    if block < key_blocks:
        if dk_ptr is not None:
            first = block * BLOCK_M
            # keys past the end repeat the last one and are never stored
            own = tl.minimum(offs_m, N - 1 - first)
            k_ptrs = k_head + first * step_k + (own[:, None] * stride_kn + offs_d[None, :])
            k = _rows(k_ptrs, own, columns, False, EVEN_D)
            v = _rows(k_ptrs + WIDTH, own, columns, False, EVEN_D)
            dk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            q_block = offs_n[:, None] * stride_qm + offs_d[None, :]
            g_block = offs_n[:, None] * stride_gm + offs_d[None, :]
            whole = M // BLOCK_N * BLOCK_N
            for start in range(0, whole, BLOCK_N):
                dk, dv = _add_queries(
                    k, v, q_head + start * step_q + q_block, grad_head + start * step_g + g_block,
                    lse_head + start + offs_n, delta_head + start + offs_n, offs_n < M,
                    offs_m < N - first, columns, dk, dv, scale_log2, seed_ptr, plane, start, first, threshold,
                    keep_scale, BLOCK_N, BLOCK_M, False, WHOLE_ROWS, EVEN_D, PRECISION,
                )  # fmt: skip
            q_tail = offs_t[:, None] * stride_qm + offs_d[None, :]
            g_tail = offs_t[:, None] * stride_gm + offs_d[None, :]
            for start in tl.range(whole, M, TAIL, num_stages=1):
                dk, dv = _add_queries(
                    k, v, q_head + start * step_q + q_tail, grad_head + start * step_g + g_tail,
                    lse_head + start + offs_t, delta_head + start + offs_t, start + offs_t < M,
                    offs_m < N - first, columns, dk, dv, scale_log2, seed_ptr, plane, start, first, threshold,
                    keep_scale, TAIL, BLOCK_M, True, WHOLE_ROWS, EVEN_D, PRECISION,
                )  # fmt: skip
            dk_head = dk_ptr + (sample * N + first) * DK_WIDTH + KEY_COLUMN + head * HEAD_DIM
            dk_ptrs = dk_head + (offs_m[:, None] * DK_WIDTH + offs_d[None, :])
            mask = (offs_m < N - first)[:, None] & columns[None, :]
            tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
            if seed_ptr is not None:
                dv *= keep_scale
            tl.store(dk_ptrs + WIDTH, dv.to(dk_ptr.dtype.element_ty), mask=mask)
    else:
        if dq_ptr is not None:
            first = (block - key_blocks) * BLOCK_M
            own = tl.minimum(offs_m, M - 1 - first)
            q_ptrs = q_head + first * step_q + (own[:, None] * stride_qm + offs_d[None, :])
            g_ptrs = grad_head + first * step_g + (own[:, None] * stride_gm + offs_d[None, :])
            q = _rows(q_ptrs, own, columns, False, EVEN_D)
            grad = _rows(g_ptrs, own, columns, False, EVEN_D)
            lse = tl.load(lse_head + first + own)
            delta = tl.load(delta_head + first + own)
            dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            k_block = offs_n[:, None] * stride_kn + offs_d[None, :]
            whole = N // BLOCK_N * BLOCK_N
            for start in range(0, whole, BLOCK_N):
                k_ptrs = k_head + start * step_k + k_block
                dq = _add_keys(
                    q, grad, lse, delta, k_ptrs, k_ptrs + WIDTH, offs_n < N, columns, dq, scale_log2,
                    seed_ptr, plane, first, start, threshold, keep_scale, BLOCK_M, BLOCK_N, False,
                    WHOLE_ROWS, EVEN_D, PRECISION,
                )  # fmt: skip
            k_tail = offs_t[:, None] * stride_kn + offs_d[None, :]
            for start in tl.range(whole, N, TAIL, num_stages=1):
                k_ptrs = k_head + start * step_k + k_tail
                dq = _add_keys(
                    q, grad, lse, delta, k_ptrs, k_ptrs + WIDTH, start + offs_t < N, columns, dq, scale_log2,
                    seed_ptr, plane, first, start, threshold, keep_scale, BLOCK_M, TAIL, True,
                    WHOLE_ROWS, EVEN_D, PRECISION,
                )  # fmt: skip
            dq_head = dq_ptr + (sample * M + first) * DQ_WIDTH + head * HEAD_DIM
            dq_ptrs = dq_head + (offs_m[:, None] * DQ_WIDTH + offs_d[None, :])
            mask = (offs_m < M - first)[:, None] & columns[None, :]
            tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


_DELTA = {"ROWS": 64, "num_warps": 4}


def _tile(m: int, n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": num_warps, "num_stages": num_stages}


def candidate_configs(
    dtype: torch.dtype, arch: str, *, head_dim: int, few: bool = False, dropout: bool = False
) -> list[dict[str, int]]:
    """Configurations that fit ``arch`` for this head_dim; the first is the default. BLOCK_M rows are a
    program's own, BLOCK_N those it walks at a time. ``few``: at most ``TAIL`` keys."""
    if few:
        if arch == "sm_100" and 32 < head_dim <= 64:
            # ptxas holds the others to few registers, for the sake of one program more, and spills
            return [_tile(16, 16, 2, 1)]
        # no larger than need be: the rows' sums and their division take registers too
        return [_tile(16, 16, 4, 1) if dtype == torch.float32 else _tile(16, 32, 2, 1)]
    if arch == "interpreter":
        return [_tile(128, 64, 4, 1), _tile(64, 128, 4, 1)]
    wide = head_dim > 64
    if dropout:
        # random numbers take registers: what spills nowhere
        if dtype == torch.float32:
            return [_tile(16 if wide else 32, 16, 4, 1)]
        return [_tile(64, 32, 4, 1), _tile(32, 32, 4, 1)] if wide else [_tile(64, 32, 4, 2)]
    if arch.startswith("gfx"):
        if dtype == torch.float32:
            return [_tile(32, 16, 4, 1), _tile(16, 16, 4, 1)]
        return [_tile(64, 32, 4, 2)] if wide else [_tile(64, 64, 4, 1), _tile(64, 32, 4, 2)]
    if dtype == torch.float32:
        # as forward: products without a matrix instruction unroll the inner dimension into registers
        if arch in ("sm_80", "sm_86", "sm_89") and not wide:
            # ptxas holds the other to few registers, for the sake of one program more, and spills
            return [_tile(16, 16, 4, 1)]
        return [_tile(32, 16, 8, 1), _tile(16, 16, 4, 1)]
    if wide and arch == "sm_100":
        # the same with eight warps
        return [_tile(64, 32, 4, 2), _tile(64, 32, 4, 1)]
    if wide:
        # the sums of dk and dv alone take 128 registers of each thread of four warps
        return [_tile(64, 32, 8, 2), _tile(64, 32, 4, 1)]
    return [_tile(64, 64, 4, 2), _tile(64, 32, 4, 2), _tile(128, 64, 8, 2)]


def default_config(
    dtype: torch.dtype, arch: str, *, head_dim: int, few: bool = False, dropout: bool = False
) -> dict[str, int]:
    return candidate_configs(dtype, arch, head_dim=head_dim, few=few, dropout=dropout)[0]


def launch_attention_bwd(
    *,
    grad: torch.Tensor,  # [B, M, H * D]; last dimension contiguous
    q: torch.Tensor,  # [B, M, H * D], or packed qkv [B, N, 3 * H * D] again; last dimension contiguous
    kv: torch.Tensor,  # [B, N, 2 * H * D], or packed qkv [B, N, 3 * H * D]; last dimension contiguous
    y: torch.Tensor,  # [B, M, H * D], contiguous
    lse: torch.Tensor,  # [B, H, M] float32, contiguous
    delta: torch.Tensor | None,  # as lse: a workspace; None where there are no more than TAIL keys
    dq: torch.Tensor | None,  # shaped as q, contiguous
    dkv: torch.Tensor | None,  # shaped as kv, contiguous; packed gradients are the same tensor twice
    num_heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,  # [2] int64, contiguous, with dropout_p
    config: dict[str, int],
) -> None:
    B, M, width = y.shape
    N = kv.shape[1]
    heads: dict[str, Any] = {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": width // num_heads,
        "BLOCK_D": triton.next_power_of_2(width // num_heads),
    }
    assert delta is not None or N <= TAIL
    if delta is not None:
        launch(
            _attention_delta_kernel,
            (B * num_heads * ceil_div(M, _DELTA["ROWS"]),),
            _DELTA,
            grad_ptr=grad,
            y_ptr=y,
            delta_ptr=delta,
            M=M,
            stride_gb=grad.stride(0),
            stride_gm=grad.stride(1),
            **heads,
        )
    own = (0 if dkv is None else ceil_div(N, config["BLOCK_M"])) + (
        0 if dq is None else ceil_div(M, config["BLOCK_M"])
    )
    launch(
        _attention_bwd_kernel,
        (B * num_heads * own,),
        config,
        grad_ptr=grad,
        q_ptr=q,
        k_ptr=kv,
        lse_ptr=lse,
        delta_ptr=delta,
        dq_ptr=dq,
        dk_ptr=dkv,
        seed_ptr=seed,
        M=M,
        N=N,
        stride_gb=grad.stride(0),
        stride_gm=grad.stride(1),
        stride_qb=q.stride(0),
        stride_qm=q.stride(1),
        stride_kb=kv.stride(0),
        stride_kn=kv.stride(1),
        scale=scale,
        scale_log2=scale * LOG2_E,
        threshold=0 if seed is None else threshold(dropout_p),
        keep_scale=keep_scale(dropout_p),
        KEY_COLUMN=kv.shape[2] - 2 * width,
        DQ_WIDTH=0 if dq is None else dq.shape[2],
        DK_WIDTH=0 if dkv is None else dkv.shape[2],
        PRECISION=dot_precision(q.dtype),
        TAIL=TAIL,
        **heads,
    )
