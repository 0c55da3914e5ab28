"""GEMM with everything around it in one launch: y = residual + gamma * act(norm(x) @ weight.T + bias).

x [M, K], weight [N, K], y [M, N]; every part but the product is optional. Products are summed in float32;
bias, activation, LayerScale and residual are applied to the float32 accumulator: one rounding, on store.

With ``ln_weight`` the rows of x pass through LayerNorm on their way into the product: their statistics are
taken in a first sweep over K, (mean, M2) a block, merged by Chan's formula (Chan, Golub, LeVeque, 1979), and
the normalised row is rounded to the weight's dtype, as a separate LayerNorm would have stored it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.common import activate, ceil_div, dot_precision, launch, swizzle


@triton.jit
def merge_moments(count, mean, m2, block_count, block_mean, block_m2):
    """(count, mean, M2) of two disjoint sets together: Chan's formula."""
    total = count + block_count
    delta = block_mean - mean
    share = block_count / total
    return total, mean + delta * share, m2 + block_m2 + delta * delta * (count * share)


@triton.jit
def row_moments(x_ptrs, row_mask, K, stride_xk, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and sum of squared deviations of BLOCK_M rows of K elements, in float32."""
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


@triton.jit(do_not_specialize=["M"])
def _linear_fwd_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    ln_weight_ptr,  # [K] or None: no LayerNorm
    ln_bias_ptr,  # [K] or None
    gamma_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    y_ptr,  # [M, N]
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_rm,
    stride_ym,
    eps,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < N
    # rows and columns past the end repeat the last ones: no masks along them, and they are never stored
    rows = tl.minimum(offs_m, M - 1)
    columns = tl.minimum(offs_n, N - 1)
    x_rows = x_ptr + rows[:, None] * stride_xm
    if ln_weight_ptr is not None:
        mean, m2 = row_moments(x_rows, mask_m, K, stride_xk, BLOCK_M, BLOCK_K)
        rstd = tl.rsqrt(m2 / K + eps)

    x_ptrs = x_rows + offs_k[None, :] * stride_xk
    w_ptrs = weight_ptr + columns[None, :] * stride_wn + offs_k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = offs_k < K - start
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        if ln_weight_ptr is not None:
            scale = tl.load(ln_weight_ptr + start + offs_k, mask=inside, other=0.0).to(tl.float32)
            normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * scale[None, :]
            if ln_bias_ptr is not None:
                shift = tl.load(ln_bias_ptr + start + offs_k, mask=inside, other=0.0).to(tl.float32)
                normed += shift[None, :]
            x = normed.to(w.dtype)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACT, y_ptr.dtype.element_ty)
    if gamma_ptr is not None:
        acc *= tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + offs_m[:, None] * stride_rm + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


def candidate_configs(
    dtype: torch.dtype, arch: str, *, norm: bool = False, residual: bool = False
) -> list[dict[str, int]]:
    """Configurations that fit ``arch``; the first is for many rows, the last for a few (one class token a
    sample)."""
    if arch == "interpreter":
        return [_tile(128, 128, 64, 4, 1), _tile(16, 256, 128, 4, 1)]
    if dtype == torch.float32:
        # IEEE float32 has no matrix instruction on NVIDIA: fused multiply-adds out of registers
        return [
            _tile(64, 64, 32, 4, 2),
            _tile(64, 64, 16, 8, 2),
            _tile(32, 64, 16, 4, 2),
            _tile(16, 64, 16, 4, 2),
        ]
    if arch.startswith("gfx"):
        stages, thin_k = 2, 64
    else:
        stages, thin_k = 3, 128
    tiles = [
        _tile(128, 128, 64, 8, stages),
        _tile(128, 64, 64, 4, stages),
        _tile(64, 64, 64, 4, stages),
        _tile(16, 64, thin_k, 4, stages),
    ]
    if arch in ("sm_90", "sm_100") and not norm and not residual:  # either makes this tile spill
        tiles.insert(0, _tile(128, 256, 64, 8, stages))
    return tiles


def default_config(
    m: int, n: int, dtype: torch.dtype, arch: str, *, norm: bool = False, residual: bool = False
) -> dict[str, int]:
    """The largest tile that still makes two waves of programs on a large GPU; a thin one for few rows."""
    tiles = candidate_configs(dtype, arch, norm=norm, residual=residual)
    if m <= 32:
        return tiles[-1]
    for tile in tiles[:-1]:
        if ceil_div(m, tile["BLOCK_M"]) * ceil_div(n, tile["BLOCK_N"]) >= 256:
            return tile
    return tiles[-2] if len(tiles) > 2 else tiles[0]


def launch_linear_fwd(
    *,
    x: torch.Tensor,  # [M, K], any strides
    weight: torch.Tensor,  # [N, K], any strides
    bias: torch.Tensor | None,
    ln_weight: torch.Tensor | None = None,
    ln_bias: torch.Tensor | None = None,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,  # [M, N], last dimension contiguous
    y: torch.Tensor,  # [M, N], last dimension contiguous
    act: str,
    eps: float = 0.0,
    config: dict[str, int],
) -> None:
    M, K = x.shape
    N = weight.shape[0]
    grid = (ceil_div(M, config["BLOCK_M"]) * ceil_div(N, config["BLOCK_N"]),)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "ln_weight_ptr": ln_weight,
        "ln_bias_ptr": ln_bias,
        "gamma_ptr": gamma,
        "residual_ptr": residual,
        "y_ptr": y,
        "M": M,
        "N": N,
        "K": K,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
        "stride_rm": 0 if residual is None else residual.stride(0),
        "stride_ym": y.stride(0),
        "eps": eps,
        "ACT": act,
        "PRECISION": dot_precision(weight.dtype),
        "EVEN_K": K % config["BLOCK_K"] == 0,
    }
    launch(_linear_fwd_kernel, grid, config, **arguments)
