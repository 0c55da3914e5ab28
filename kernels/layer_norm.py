"""LayerNorm over the last dimension: y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps).

x [M, N], float32 arithmetic: a row's statistics are taken from the row itself held in registers (two passes
over registers, one over memory). Rows too long for that are swept in blocks, whose (mean, M2) are merged by
Chan's formula (Chan, Golub, LeVeque, 1979); sums of squares lose everything at a mean of 1,000 deviations.

Backward: with xhat = (x - mean) * rstd and g = dy * weight, dx = rstd * (g - mean(g) - xhat * mean(g xhat));
dweight and dbias are the sums of dy * xhat and of dy over rows. Statistics are taken again from x, which has
to be read anyhow. A program walks through rows of its own and sums their share of dweight and dbias in
registers; a second launch adds the shares in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvr.kernels.common import ceil_div, launch, sum_shares
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


@triton.jit(do_not_specialize=["M"])
def _layer_norm_bwd_kernel(
    grad_ptr,  # [M, N]
    x_ptr,  # [M, N]
    weight_ptr,  # [N]
    residual_ptr,  # [M, N] or None: a gradient that x has from elsewhere, added to dx
    dx_ptr,  # [M, N] or None
    parts_ptr,  # [programs, 2, N] float32: shares of dweight, then of dbias; or None
    M,
    N,
    stride_gm,
    stride_xm,
    stride_rm,
    stride_dxm,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        x = tl.load(x_ptr + rows * stride_xm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows * stride_gm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1) / N
        centred = tl.where(mask_n[None, :], x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
        xhat = centred * rstd[:, None]
        if dx_ptr is not None:
            g = grad * weight[None, :]
            along = tl.sum(g * xhat, 1) / N
            dx = (g - (tl.sum(g, 1) / N)[:, None] - xhat * along[:, None]) * rstd[:, None]
            if residual_ptr is not None:
                residual_ptrs = residual_ptr + rows * stride_rm + offs_n[None, :]
                dx += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
            dx_ptrs = dx_ptr + rows * stride_dxm + offs_n[None, :]
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if parts_ptr is not None:
            dweight += tl.sum(grad * xhat, 0)
            dbias += tl.sum(grad, 0)
    if parts_ptr is not None:
        parts = parts_ptr + tl.program_id(0).to(tl.int64) * 2 * N + offs_n
        tl.store(parts, dweight, mask=mask_n)
        tl.store(parts + N, dbias, mask=mask_n)


@triton.jit(do_not_specialize=["PARTS"])
def _layer_norm_sum_kernel(
    parts_ptr,  # [PARTS, 2, N]
    dweight_ptr,  # [N]
    dbias_ptr,  # [N] or None
    PARTS,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums over all programs, BLOCK_N columns of one of the two a program."""
    blocks = tl.cdiv(N, BLOCK_N)
    which = tl.program_id(0) // blocks
    offs_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    result = sum_shares(parts_ptr, which, offs_n, PARTS, N, BLOCK_M, BLOCK_N)
    if which == 0:
        tl.store(dweight_ptr + offs_n, result.to(dweight_ptr.dtype.element_ty), mask=mask_n)
    if dbias_ptr is not None and which == 1:
        tl.store(dbias_ptr + offs_n, result.to(dbias_ptr.dtype.element_ty), mask=mask_n)


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


# More programs than a GPU holds at a time make nothing faster, and each leaves a share that is read again
MAX_PROGRAMS = 512
_SUM = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}


def candidate_bwd_configs(n: int, arch: str) -> list[dict[str, int]]:
    """As :func:`candidate_configs`, for a kernel that holds two rows of values and two of sums."""
    block_n = triton.next_power_of_2(n)
    if arch == "interpreter":
        return [
            {"BLOCK_M": max(1, 65536 // block_n), "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1},
            {"BLOCK_M": 2, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1},
        ]
    rows = max(1, 2048 // block_n)
    warps = 4 if block_n <= 2048 else 8
    return [
        {"BLOCK_M": rows, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 1},
        {"BLOCK_M": 2 * rows, "BLOCK_N": block_n, "num_warps": 8, "num_stages": 1},
        {"BLOCK_M": max(1, rows // 2), "BLOCK_N": block_n, "num_warps": warps, "num_stages": 1},
    ]


def default_bwd_config(n: int, arch: str) -> dict[str, int]:
    return candidate_bwd_configs(n, arch)[0]


def bwd_programs(m: int, config: dict[str, int]) -> int:
    """How many shares of dweight and dbias `launch_layer_norm_bwd` leaves of ``m`` rows."""
    return min(ceil_div(m, config["BLOCK_M"]), MAX_PROGRAMS)


def launch_layer_norm_bwd(
    *,
    grad: torch.Tensor,  # [M, N], and all that follows; last dimensions contiguous
    x: torch.Tensor,
    weight: torch.Tensor,  # [N]
    residual: torch.Tensor | None = None,  # [M, N], with dx
    dx: torch.Tensor | None,  # [M, N]
    parts: torch.Tensor | None,  # [bwd_programs, 2, N] float32, with dweight
    dweight: torch.Tensor | None,  # [N]
    dbias: torch.Tensor | None,  # [N], with dweight
    eps: float,
    config: dict[str, int],
) -> None:
    M, N = x.shape
    programs = bwd_programs(M, config)
    launch(
        _layer_norm_bwd_kernel,
        (programs,),
        config,
        grad_ptr=grad,
        x_ptr=x,
        weight_ptr=weight,
        residual_ptr=residual,
        dx_ptr=dx,
        parts_ptr=parts,
        M=M,
        N=N,
        stride_gm=grad.stride(0),
        stride_xm=x.stride(0),
        stride_rm=0 if residual is None else residual.stride(0),
        stride_dxm=0 if dx is None else dx.stride(0),
        eps=eps,
    )
    if parts is not None:
        launch(
            _layer_norm_sum_kernel,
            ((1 if dbias is None else 2) * ceil_div(N, _SUM["BLOCK_N"]),),
            _SUM,
            parts_ptr=parts,
            dweight_ptr=dweight,
            dbias_ptr=dbias,
            PARTS=programs,
            N=N,
        )
