"""LayerNorm over the last dimension: y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps).

x [M, N], float32 arithmetic: a row's statistics are taken from the row itself held in registers (two passes
over registers, one over memory). Rows too long for that are swept in blocks, whose (mean, M2) are merged by
Chan's formula (Chan, Golub, LeVeque, 1979); sums of squares lose everything at a mean of 1,000 deviations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvr.kernels.common import ceil_div, launch
from fastvr.kernels.moments import row_moments

# the longest row that is held in registers: 32 floats a thread at 8 warps
MAX_ROW = 8192


@triton.jit(do_not_specialize=["M"])
def _layer_norm_fwd_kernel(
    x_ptr,  # [M, N]
    weight_ptr,  # [N]
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N]
    M,
    N,
    stride_xm,
    stride_ym,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / N
    centred = tl.where(mask_n[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _layer_norm_fwd_long_kernel(
    x_ptr,  # [M, N]
    weight_ptr,  # [N]
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N]
    M,
    N,
    stride_xm,
    stride_ym,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    mean, m2 = row_moments(x_rows, mask_m, N, 1, BLOCK_M, BLOCK_N)
    rstd = tl.rsqrt(m2 / N + eps)
    for start in range(0, N, BLOCK_N):
        columns = start + offs_n
        mask_n = columns < N
        mask = mask_m[:, None] & mask_n[None, :]
        x = tl.load(x_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=mask_n, other=0.0).to(tl.float32)
        y = (x - mean[:, None]) * rstd[:, None] * weight[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + columns, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y_ptrs = y_ptr + offs_m[:, None] * stride_ym + columns[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


def candidate_configs(n: int, arch: str) -> list[dict[str, int]]:
    """Rows a program (BLOCK_M) by warps; a row lies across BLOCK_N lanes."""
    if n > MAX_ROW:
        return [{"BLOCK_M": 1, "BLOCK_N": 4096, "num_warps": 8, "num_stages": 1}]
    block_n = triton.next_power_of_2(n)
    if arch == "interpreter":
        return [
            {"BLOCK_M": max(1, 65536 // block_n), "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1},
            {"BLOCK_M": 2, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1},
        ]
    # 4 warps hold 4,096 float32 at 32 a thread; memory-bound, so more bytes in flight beat fewer programs
    rows = max(1, 4096 // block_n)
    warps = 4 if block_n <= 4096 else 8
    return [
        {"BLOCK_M": rows, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 1},
        {"BLOCK_M": max(1, rows // 2), "BLOCK_N": block_n, "num_warps": warps, "num_stages": 1},
        {"BLOCK_M": max(1, rows // 4), "BLOCK_N": block_n, "num_warps": max(1, warps // 4), "num_stages": 1},
    ]


def default_config(n: int, arch: str) -> dict[str, int]:
    return candidate_configs(n, arch)[0]


def launch_layer_norm_fwd(
    *,
    x: torch.Tensor,  # [M, N], last dimension contiguous
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,  # [M, N], last dimension contiguous
    eps: float,
    config: dict[str, int],
) -> None:
    M, N = x.shape
    launch(
        _layer_norm_fwd_kernel if config["BLOCK_N"] >= N else _layer_norm_fwd_long_kernel,
        (ceil_div(M, config["BLOCK_M"]),),
        config,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        y_ptr=y,
        M=M,
        N=N,
        stride_xm=x.stride(0),
        stride_ym=y.stride(0),
        eps=eps,
    )
