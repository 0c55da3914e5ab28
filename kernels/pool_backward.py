"""The gradients of max_pool and avg_pool_linear with respect to the map.

max_pool: each pixel of x gathers from the windows that it lies in and that took it, in a fixed order: no
atomics. avg_pool_linear: dx = dy @ weight / (H W), the same for all pixels of a sample: a program multiplies
for some samples and a block of channels, in float32, and writes the result once for each pixel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvr.kernels.common import ceil_div, dot_precision, launch
from fastvr.kernels.pool import window_arguments


@triton.jit
def gather_from_windows(
    grad_ptr,  # [N, OH, OW, C]
    taps_ptr,  # [N, OH, OW, C] uint8
    rows,
    offs_c,
    mask,
    C,
    H,
    W,
    OH,
    OW,
    stride_h,  # of the window
    stride_w,
    pad_h,
    pad_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    WINDOWS_H: tl.constexpr,  # that a pixel may lie in, one below the other
    WINDOWS_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of pixels ``rows`` of what was pooled, float32: the sum over windows that took them."""
    pixels = rows % (H * W)
    down = pixels // W + pad_h
    right = pixels % W + pad_w
    first = (rows // (H * W)).to(tl.int64) * OH * OW
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for i in tl.static_range(WINDOWS_H):
        for j in tl.static_range(WINDOWS_W):
            oh = down // stride_h - i
            ow = right // stride_w - j
            kh = down - oh * stride_h
            kw = right - ow * stride_w
            inside = (oh >= 0) & (oh < OH) & (kh < KH) & (ow >= 0) & (ow < OW) & (kw < KW)
            offs = (first + oh.to(tl.int64) * OW + ow)[:, None] * C + offs_c[None, :]
            there = mask & inside[:, None]
            taps = tl.load(taps_ptr + offs, mask=there, other=255).to(tl.int32)
            grad = tl.load(grad_ptr + offs, mask=there, other=0.0).to(tl.float32)
            total += tl.where(taps == (kh * KW + kw)[:, None], grad, 0.0)
    return total


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def _max_pool_bwd_kernel(
    grad_ptr,  # [N, OH, OW, C]
    taps_ptr,  # [N, OH, OW, C] uint8
    dx_ptr,  # [M, C]
    M,  # N * H * W
    C,
    H,
    W,
    OH,
    OW,
    stride_h,  # of the window
    stride_w,
    pad_h,
    pad_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    WINDOWS_H: tl.constexpr,
    WINDOWS_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    # the op keeps M below 2^31
    rows = tl.program_id(0) // num_c * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < M)[:, None] & (offs_c < C)[None, :]
    grad = gather_from_windows(
        grad_ptr, taps_ptr, rows, offs_c, mask, C, H, W, OH, OW, stride_h, stride_w, pad_h, pad_w,
        KH, KW, WINDOWS_H, WINDOWS_W, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    dx_ptrs = dx_ptr + rows.to(tl.int64)[:, None] * C + offs_c[None, :]
    tl.store(dx_ptrs, grad.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "P"])
def _avg_pool_linear_bwd_kernel(
    grad_ptr,  # [B, N], any strides
    weight_ptr,  # [N, K], any strides
    dx_ptr,  # [B, P, K]
    B,
    N,
    K,
    P,  # H * W
    stride_gb,
    stride_gn,
    stride_wn,
    stride_wk,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_k = tl.cdiv(K, BLOCK_K)
    offs_b = (tl.program_id(0) // num_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(0) % num_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    mask_b = offs_b < B
    mask_k = offs_k < K
    grad_ptrs = grad_ptr + offs_b[:, None] * stride_gb
    weight_ptrs = weight_ptr + offs_k.to(tl.int64)[None, :] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = (start + offs_n).to(tl.int64)
        inside = columns < N
        grad = tl.load(
            grad_ptrs + columns[None, :] * stride_gn, mask=mask_b[:, None] & inside[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptrs + columns[:, None] * stride_wn, mask=inside[:, None] & mask_k[None, :], other=0.0
        )
        acc = tl.dot(grad, weight, acc, input_precision=PRECISION)
    dx = (acc / P).to(dx_ptr.dtype.element_ty)
    dx_ptrs = dx_ptr + offs_b[:, None] * P * K + offs_k[None, :]
    mask = mask_b[:, None] & mask_k[None, :]
    for pixel in range(P):
        tl.store(dx_ptrs + tl.cast(pixel, tl.int64) * K, dx, mask=mask)


def windows_a_pixel(size: tuple[int, int], stride: tuple[int, int]) -> dict[str, int]:
    """How many windows a pixel may lie in, vertically and horizontally."""
    return {"WINDOWS_H": ceil_div(size[0], stride[0]), "WINDOWS_W": ceil_div(size[1], stride[1])}


def launch_max_pool_bwd(
    *,
    grad: torch.Tensor,  # [N, C, OH, OW], this and all maps channels_last
    taps: torch.Tensor,  # [N, C, OH, OW] uint8
    dx: torch.Tensor,  # [N, C, H, W]
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    config: dict[str, int],
) -> None:
    C = dx.shape[1]
    M = dx.numel() // C
    launch(
        _max_pool_bwd_kernel,
        (ceil_div(M, config["BLOCK_M"]) * ceil_div(C, config["BLOCK_C"]),),
        config,
        grad_ptr=grad,
        taps_ptr=taps,
        dx_ptr=dx,
        M=M,
        **window_arguments(dx, grad, kernel_size, stride, padding),
        **windows_a_pixel(kernel_size, stride),
    )


def _tile(m: int, k: int, n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


def avg_pool_linear_candidate_configs(dtype: torch.dtype, arch: str) -> list[dict[str, int]]:
    """Configurations that fit ``arch``. Most of what moves is written: small tiles make programs enough."""
    if arch == "interpreter":
        return [_tile(32, 128, 64, 4, 1), _tile(16, 32, 32, 4, 1)]
    if dtype == torch.float32:
        return [_tile(16, 64, 32, 4, 2), _tile(16, 32, 32, 4, 2)]
    return [_tile(16, 64, 64, 4, 3), _tile(16, 128, 64, 4, 3), _tile(32, 64, 64, 4, 3)]


def avg_pool_linear_default_config(dtype: torch.dtype, arch: str) -> dict[str, int]:
    return avg_pool_linear_candidate_configs(dtype, arch)[0]


def launch_avg_pool_linear_bwd(
    *,
    grad: torch.Tensor,  # [B, N], any strides
    weight: torch.Tensor,  # [N, K], any strides
    dx: torch.Tensor,  # [B, K, H, W], channels_last
    config: dict[str, int],
) -> None:
    B, K, H, W = dx.shape
    launch(
        _avg_pool_linear_bwd_kernel,
        (ceil_div(B, config["BLOCK_M"]) * ceil_div(K, config["BLOCK_K"]),),
        config,
        grad_ptr=grad,
        weight_ptr=weight,
        dx_ptr=dx,
        B=B,
        N=grad.shape[1],
        K=K,
        P=H * W,
        stride_gb=grad.stride(0),
        stride_gn=grad.stride(1),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        PRECISION=dot_precision(weight.dtype),
    )
