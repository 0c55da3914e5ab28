"""GEMM with everything around it in one launch:
y = residual + sample_scale * gamma * dropout(act(norm(x) @ weight.T + bias)).

x [M, K], weight [N, K], y [M, N]; every part but the product is optional. Products are summed in float32;
bias, activation, dropout, LayerScale, a factor for each sample (stochastic depth) and residual are applied to
the float32 accumulator: one rounding, on store.

LayerNorm comes in two ways. With ``ln_weight`` the rows of x pass through it on their way into the product:
their statistics are taken in a first sweep over K, (mean, M2) a block, merged by Chan's formula (Chan, Golub,
LeVeque, 1979), and the normalised row is rounded to the weight's dtype, as a separate LayerNorm would have
stored it. With ``colsum`` it is folded into the weight, and the product of the raw rows is put right behind:
``rstd * (x @ W'.T - mean * colsum)``, by the statistics that the launch before left in ``row_stats``. Such a
launch is one with ``stats``: (mean, M2) of each chunk of its own rows, of the values as they are stored.

For training, ``x_act`` activates x on its way in, so that what an activation gave need not be kept, and with
``hidden``, what an activation was given, the product is a gradient that passes back through it: it is
multiplied by the derivative there, and what the activation gave is left in ``activated``. With dropout behind
the activation both are dropped. Activating on the way in would draw the words of dropout once for each tile
of columns: so a forward pass that drops leaves two, ``y`` before the activation and ``activated`` behind
dropout.

One source, and what a configuration chooses of it:

- TMA: x and weight by tensor descriptors, which copy whole blocks to shared memory without registers.
- PERSISTENT: as many programs as the GPU has multiprocessors, each of which takes tile after tile.
- SPLIT_K: so many programs share a tile's K. Each leaves its float32 part in a workspace, and a second
  launch sums them in their order: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.activations import activate, activate_and_grad
from fastvr.kernels.common import (
    ceil_div,
    dot_precision,
    launch,
    let_next_launch_begin,
    multiprocessors,
    split_range,
    sum_parts,
    swizzle,
    tma_descriptor,
    wait_for_launch_before,
)
from fastvr.kernels.dropout import drop_factors
from fastvr.kernels.linear_configs import candidate_configs, default_config
from fastvr.kernels.moments import merge_row_stats, row_moments, store_row_stats
from fastvr.reference.dropout import keep_scale, threshold
from fastvr.reference.linear_stats import STATS_CHUNK

__all__ = ["candidate_configs", "default_config", "launch_linear_fwd"]


@triton.jit
def row_scale(
    row_stats_ptr,
    stride_sm,
    offs_m,
    M,
    K,
    eps,
    STATS_CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Mean and 1 / deviation of BLOCK_M rows of K elements, from the statistics of their chunks."""
    mean, m2 = merge_row_stats(
        row_stats_ptr + offs_m * stride_sm, offs_m < M, K, STATS_CHUNK, CHUNKS, BLOCK_M
    )
    return mean, tl.rsqrt(m2 / K + eps)


@triton.jit
def finish_tile(
    acc,  # [BLOCK_M, BLOCK_N] float32
    mean,  # [BLOCK_M] float32, with colsum
    rstd,  # [BLOCK_M] float32, with colsum
    offs_m,
    first_n,
    M,
    N,
    bias_ptr,  # [N] or None
    gamma_ptr,  # [N] or None
    sample_scale_ptr,  # [M / sample_rows] float32 or None: a factor for each sample
    residual_ptr,  # [M, N] or None
    colsum_ptr,  # [N] float32 or None: no LayerNorm folded into the weight
    y_ptr,  # [M, N]
    stats_ptr,  # [M, ceil(N / STATS_CHUNK), 2] float32 or None
    hidden_ptr,  # [M, N] dense, or None: what ACT was given in a forward pass, whose derivative is asked for
    activated_ptr,  # [M, N] dense, or None: what it gave; without hidden y is what it was given
    seed_ptr,  # [2] int64, or None: no dropout
    sample_rows,  # rows of a sample
    threshold,  # int32, with seed
    keep_scale,  # 1 / (1 - p), with seed
    stride_rm,
    stride_ym,
    ACT: tl.constexpr,
    STATS_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Everything behind the product, for the columns from ``first_n``, and the one rounding."""
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    if colsum_ptr is not None:
        colsum = tl.load(colsum_ptr + offs_n, mask=mask_n, other=0.0)
        acc = (acc - mean[:, None] * colsum[None, :]) * rstd[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if sample_scale_ptr is not None:
        # behind an activation; a gradient's product takes it first, where fewer registers are in use
        factor = tl.load(sample_scale_ptr + offs_m // sample_rows, mask=mask_m, other=0.0)[:, None]
        if hidden_ptr is not None:
            acc *= factor
    if hidden_ptr is not None:
        cells = offs_m[:, None] * N + offs_n[None, :]
        hidden = tl.load(hidden_ptr + cells, mask=mask, other=0.0).to(tl.float32)
        activated, slope = activate_and_grad(hidden, ACT, hidden_ptr.dtype.element_ty)
        acc *= slope
        if seed_ptr is not None:
            drop = drop_factors(seed_ptr, offs_m, first_n, threshold, keep_scale, BLOCK_M, BLOCK_N)
            acc *= drop
            activated *= drop
        if activated_ptr is not None:
            tl.store(activated_ptr + cells, activated.to(activated_ptr.dtype.element_ty), mask=mask)
    elif activated_ptr is None:
        acc = activate(acc, ACT, y_ptr.dtype.element_ty)
        if seed_ptr is not None:
            acc *= drop_factors(seed_ptr, offs_m, first_n, threshold, keep_scale, BLOCK_M, BLOCK_N)
    if gamma_ptr is not None:
        acc *= tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if sample_scale_ptr is not None:  # noqa: SIM102 (as it is for the compiler)
        if hidden_ptr is None:
            acc *= factor
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + offs_m[:, None] * stride_rm + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], y, mask=mask)
    if activated_ptr is not None:  # noqa: SIM102
        if hidden_ptr is None:
            # of the value as stored: its gradient is taken there
            activated = activate(y.to(tl.float32), ACT, activated_ptr.dtype.element_ty)
            if seed_ptr is not None:
                activated *= drop_factors(seed_ptr, offs_m, first_n, threshold, keep_scale, BLOCK_M, BLOCK_N)
            cells = offs_m[:, None] * N + offs_n[None, :]
            tl.store(activated_ptr + cells, activated.to(activated_ptr.dtype.element_ty), mask=mask)
    if stats_ptr is not None:
        # of the value as stored: the next launch multiplies that one
        store_row_stats(stats_ptr, y.to(tl.float32), offs_m, offs_n, M, N, STATS_CHUNK, BLOCK_M, BLOCK_N)


@triton.jit
def finish_parts(
    acc, mean, rstd, offs_m, first_n, M, N, bias_ptr, gamma_ptr, sample_scale_ptr, residual_ptr, colsum_ptr,
    y_ptr, stats_ptr, hidden_ptr, activated_ptr, seed_ptr, sample_rows, threshold, keep_scale, stride_rm,
    stride_ym, ACT: tl.constexpr, STATS_CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`finish_tile`, 64 columns after another where there are more, 32 with dropout: so the epilogue takes
    few registers, two programs of 128x128 stay on a multiprocessor, and one of 128x256 does not spill."""
    WIDEST: tl.constexpr = 64 if seed_ptr is None else 32
    if BLOCK_N > WIDEST:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        finish_parts(
            left, mean, rstd, offs_m, first_n, M, N, bias_ptr, gamma_ptr, sample_scale_ptr, residual_ptr,
            colsum_ptr, y_ptr, stats_ptr, hidden_ptr, activated_ptr, seed_ptr, sample_rows, threshold,
            keep_scale, stride_rm, stride_ym, ACT, STATS_CHUNK, BLOCK_M, HALF,
        )  # fmt: skip
        finish_parts(
            right, mean, rstd, offs_m, first_n + HALF, M, N, bias_ptr, gamma_ptr, sample_scale_ptr,
            residual_ptr, colsum_ptr, y_ptr, stats_ptr, hidden_ptr, activated_ptr, seed_ptr, sample_rows,
            threshold, keep_scale, stride_rm, stride_ym, ACT, STATS_CHUNK, BLOCK_M, HALF,
        )  # fmt: skip
    else:
        finish_tile(
            acc, mean, rstd, offs_m, first_n, M, N, bias_ptr, gamma_ptr, sample_scale_ptr, residual_ptr,
            colsum_ptr, y_ptr, stats_ptr, hidden_ptr, activated_ptr, seed_ptr, sample_rows, threshold,
            keep_scale, stride_rm, stride_ym, ACT, STATS_CHUNK, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "threshold"])
def _linear_fwd_kernel(
    x,  # [M, K], a pointer; with TMA a descriptor of blocks [BLOCK_M, BLOCK_K]
    weight,  # [N, K], a pointer; with TMA a descriptor of blocks [BLOCK_N, BLOCK_K], with K_FIRST of [K, N]'s
    bias_ptr,  # [N] or None
    ln_weight_ptr,  # [K] or None: no LayerNorm on the way in
    ln_bias_ptr,  # [K] or None
    gamma_ptr,  # [N] or None
    sample_scale_ptr,  # [M / sample_rows] float32 or None: a factor for each sample
    residual_ptr,  # [M, N] or None
    row_stats_ptr,  # [M, ceil(K / STATS_CHUNK), 2] float32, with colsum
    colsum_ptr,  # [N] float32 or None: no LayerNorm folded into the weight
    y_ptr,  # [M, N]; with SPLIT_K [SPLIT_K, M, N] float32
    stats_ptr,  # [M, ceil(N / STATS_CHUNK), 2] float32 or None
    moments_ptr,  # [M, 2] float32 or None: mean and 1 / deviation of the rows, with ln_weight
    hidden_ptr,  # [M, N] or None: what ACT was given in a forward pass; its derivative there is a factor
    activated_ptr,  # [M, N] or None: what ACT gave, with hidden or where y is what it was given
    seed_ptr,  # [2] int64, or None: no dropout
    M,
    N,
    K,
    sample_rows,
    threshold,  # int32, with seed
    keep_scale,  # 1 / (1 - p), with seed
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_rm,
    stride_ym,
    stride_sm,
    eps,
    ACT: tl.constexpr,
    X_ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    STATS_CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr = 1,
    TMA: tl.constexpr = 0,
    K_FIRST: tl.constexpr = 0,
    PERSISTENT: tl.constexpr = 0,
    PDL: tl.constexpr = 0,
):
    wait_for_launch_before(PDL)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    first, stop = split_range(K, BLOCK_K, SPLIT_K)
    rounds = 1  # a constant, which the compiler sees through
    if PERSISTENT:
        rounds = tl.cdiv(num_m * num_n - tl.program_id(0), tl.num_programs(0))
    for turn in range(rounds):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        pid_m, pid_n = swizzle(tile, num_m, num_n, GROUP_M)
        offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if not TMA:
            # rows and columns past the end repeat the last ones: no masks along them, and they are never
            # stored
            x_rows = x + tl.minimum(offs_m, M - 1)[:, None] * stride_xm
            w_columns = weight + tl.minimum(offs_n, N - 1).to(tl.int64)[None, :] * stride_wn
            x_ptrs = x_rows + (first + offs_k)[None, :] * stride_xk
            w_ptrs = w_columns + (first + offs_k)[:, None] * stride_wk
        mean = tl.zeros((BLOCK_M,), tl.float32)
        rstd = mean
        if ln_weight_ptr is not None:
            mean, m2 = row_moments(x_rows, offs_m < M, K, stride_xk, BLOCK_M, BLOCK_K)
            rstd = tl.rsqrt(m2 / K + eps)
            if moments_ptr is not None:  # noqa: SIM102 (one is known to the compiler, the other is not)
                if pid_n == 0:
                    tl.store(moments_ptr + offs_m * 2, mean, mask=offs_m < M)
                    tl.store(moments_ptr + offs_m * 2 + 1, rstd, mask=offs_m < M)

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(first, stop, BLOCK_K):
            inside = offs_k < K - start
            if TMA:
                x_block = x.load([pid_m * BLOCK_M, start])
                if K_FIRST:
                    w_block = weight.load([start, pid_n * BLOCK_N])
                else:
                    w_block = weight.load([pid_n * BLOCK_N, start]).T
            elif EVEN_K:
                x_block = tl.load(x_ptrs)
                w_block = tl.load(w_ptrs)
            else:
                x_block = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
                w_block = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
            if ln_weight_ptr is not None:
                scale = tl.load(ln_weight_ptr + start + offs_k, mask=inside, other=0.0).to(tl.float32)
                normed = (x_block.to(tl.float32) - mean[:, None]) * rstd[:, None] * scale[None, :]
                if ln_bias_ptr is not None:
                    shift = tl.load(ln_bias_ptr + start + offs_k, mask=inside, other=0.0).to(tl.float32)
                    normed += shift[None, :]
                x_block = normed.to(w_block.dtype)
            if X_ACT != "none":
                x_block = activate(x_block.to(tl.float32), X_ACT, x_block.dtype).to(w_block.dtype)
            acc = tl.dot(x_block, w_block, acc, input_precision=PRECISION)
            if not TMA:
                x_ptrs += BLOCK_K * stride_xk
                w_ptrs += BLOCK_K * stride_wk

        let_next_launch_begin(PDL)
        if SPLIT_K > 1:
            # y is the workspace here, [SPLIT_K, M, N]
            rows = y_ptr + (tl.program_id(1).to(tl.int64) * M + offs_m)[:, None] * N
            tl.store(rows + offs_n[None, :], acc, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])
        else:
            if colsum_ptr is not None:
                mean, rstd = row_scale(
                    row_stats_ptr, stride_sm, offs_m, M, K, eps, STATS_CHUNK, CHUNKS, BLOCK_M
                )
            finish_parts(
                acc, mean, rstd, offs_m, pid_n * BLOCK_N, M, N, bias_ptr, gamma_ptr, sample_scale_ptr,
                residual_ptr, colsum_ptr, y_ptr, stats_ptr, hidden_ptr, activated_ptr, seed_ptr, sample_rows,
                threshold, keep_scale, stride_rm, stride_ym, ACT, STATS_CHUNK, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "threshold"])
def _linear_sum_kernel(
    workspace_ptr,  # [SPLIT_K, M, N] float32; what follows as above
    bias_ptr,
    gamma_ptr,
    sample_scale_ptr,
    residual_ptr,
    row_stats_ptr,
    colsum_ptr,
    y_ptr,
    stats_ptr,
    hidden_ptr,
    activated_ptr,
    seed_ptr,
    M,
    N,
    K,
    sample_rows,
    threshold,
    keep_scale,
    stride_rm,
    stride_ym,
    stride_sm,
    eps,
    ACT: tl.constexpr,
    STATS_CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """What `_linear_fwd_kernel` does behind its product, for one that was split: ROWS rows of one chunk."""
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    num_n = tl.cdiv(N, STATS_CHUNK)
    offs_m = (tl.program_id(0) // num_n).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_n = (tl.program_id(0) % num_n) * STATS_CHUNK
    offs_n = first_n + tl.arange(0, STATS_CHUNK)
    acc = sum_parts(workspace_ptr, offs_m, offs_n, M, N, SPLIT_K, ROWS, STATS_CHUNK)
    mean = tl.zeros((ROWS,), tl.float32)
    rstd = mean
    if colsum_ptr is not None:
        mean, rstd = row_scale(row_stats_ptr, stride_sm, offs_m, M, K, eps, STATS_CHUNK, CHUNKS, ROWS)
    finish_tile(
        acc, mean, rstd, offs_m, first_n, M, N, bias_ptr, gamma_ptr, sample_scale_ptr, residual_ptr,
        colsum_ptr, y_ptr, stats_ptr, hidden_ptr, activated_ptr, seed_ptr, sample_rows, threshold, keep_scale,
        stride_rm, stride_ym, ACT, STATS_CHUNK, ROWS, STATS_CHUNK,
    )  # fmt: skip


# A second launch has little to do: small tiles make many programs
_SUM_ROWS = 8


def launch_linear_fwd(
    *,
    x: torch.Tensor,  # [M, K], any strides
    weight: torch.Tensor,  # [N, K], any strides
    bias: torch.Tensor | None,
    ln_weight: torch.Tensor | None = None,
    ln_bias: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    sample_scale: torch.Tensor | None = None,  # [samples] float32, contiguous; M is a multiple of samples
    residual: torch.Tensor | None = None,  # [M, N], last dimension contiguous
    row_stats: torch.Tensor | None = None,  # [M, ceil(K / STATS_CHUNK), 2] float32, rows dense, with colsum
    colsum: torch.Tensor | None = None,  # [N] float32
    y: torch.Tensor,  # [M, N], last dimension contiguous
    stats: torch.Tensor | None = None,  # [M, ceil(N / STATS_CHUNK), 2] float32, contiguous
    moments: torch.Tensor | None = None,  # [M, 2] float32, contiguous, with ln_weight
    hidden: torch.Tensor | None = None,  # [M, N], contiguous
    activated: torch.Tensor | None = None,  # [M, N], contiguous; without hidden y is before the activation
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,  # [2] int64, contiguous, with dropout_p
    workspace: torch.Tensor | None = None,  # [SPLIT_K, M, N] float32, contiguous, where config has SPLIT_K
    act: str,
    x_act: str = "none",
    eps: float = 0.0,
    config: dict[str, int],
) -> None:
    M, K = x.shape
    N = weight.shape[0]
    operands: tuple[Any, Any] = (x, weight)
    if config.get("TMA"):
        k_first = weight.stride(0) == 1 and weight.stride(1) != 1
        columns = (config["BLOCK_N"], config["BLOCK_K"])
        described = [
            tma_descriptor(x, (config["BLOCK_M"], config["BLOCK_K"])),
            tma_descriptor(weight.t(), columns[::-1]) if k_first else tma_descriptor(weight, columns),
        ]
        if None in described:
            config = config | {"TMA": 0, "PERSISTENT": 0}
        else:
            operands = (described[0], described[1])
            config = config | {"K_FIRST": int(k_first)}
    tiles = ceil_div(M, config["BLOCK_M"]) * ceil_div(N, config["BLOCK_N"])
    split = config.get("SPLIT_K", 1)
    grid = (min(tiles, multiprocessors(x.device)) if config.get("PERSISTENT") else tiles, split)
    epilogue: dict[str, Any] = {
        "bias_ptr": bias,
        "gamma_ptr": gamma,
        "sample_scale_ptr": sample_scale,
        "residual_ptr": residual,
        "row_stats_ptr": row_stats,
        "colsum_ptr": colsum,
        "y_ptr": y,
        "stats_ptr": stats,
        "hidden_ptr": hidden,
        "activated_ptr": activated,
        "seed_ptr": seed,
        "stride_rm": 0 if residual is None else residual.stride(0),
        "stride_ym": y.stride(0),
        "stride_sm": 0 if row_stats is None else row_stats.stride(0),
        "ACT": act,
    }
    # of the rows that are normalised, as a power of two
    chunks = 0 if colsum is None else 1 << (ceil_div(K, STATS_CHUNK) - 1).bit_length()
    shared: dict[str, Any] = {
        "M": M,
        "N": N,
        "K": K,
        "sample_rows": 1 if sample_scale is None else M // sample_scale.shape[0],
        "threshold": 0 if seed is None else threshold(dropout_p),
        "keep_scale": keep_scale(dropout_p),
        "eps": eps,
        "STATS_CHUNK": STATS_CHUNK,
        "CHUNKS": chunks,
    }
    arguments: dict[str, Any] = {
        "x": operands[0],
        "weight": operands[1],
        "ln_weight_ptr": ln_weight,
        "ln_bias_ptr": ln_bias,
        "moments_ptr": moments,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
        "X_ACT": x_act,
        "PRECISION": dot_precision(weight.dtype),
        "EVEN_K": K % config["BLOCK_K"] == 0,
    }
    if split == 1:
        launch(_linear_fwd_kernel, grid, config, **arguments, **epilogue, **shared)
        return
    assert workspace is not None
    nothing = dict.fromkeys(epilogue) | {"stride_rm": 0, "stride_ym": N, "stride_sm": 0}
    nothing |= {"y_ptr": workspace, "ACT": "none"}
    launch(_linear_fwd_kernel, grid, config, **arguments, **nothing, **shared)
    programs = ceil_div(M, _SUM_ROWS) * ceil_div(N, STATS_CHUNK)
    finishing = {"SPLIT_K": split, "ROWS": _SUM_ROWS, "num_warps": 4}
    launch(_linear_sum_kernel, (programs,), finishing, workspace_ptr=workspace, **epilogue, **shared)
