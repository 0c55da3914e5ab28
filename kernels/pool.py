"""Max pooling over NHWC memory, and global average pooling with the classifier behind it in one launch.

max_pool: a program takes some output pixels and a block of channels, and walks the window; a NaN in the
window is the result, as in PyTorch. For a gradient it also leaves which tap of the window that was: of equal
ones the first, of several NaNs the last, as PyTorch decides on a CPU.

avg_pool_linear: y = mean over pixels of x @ weight.T + bias, where each program pools its samples, block of
channels by block of channels, on their way into the product. Sums are float32, BLOCK_P partial ones a
channel; the mean is rounded once, to the weight's dtype, as a separate pooling would store it. For a gradient
the means are left too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.common import ceil_div, dot_precision, launch


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def _max_pool_fwd_kernel(
    x_ptr,  # [N, C, H, W], any strides
    y_ptr,  # [N, C, OH, OW], channels_last
    taps_ptr,  # [N, C, OH, OW], channels_last, uint8, or None
    M,  # N * OH * OW
    C,
    H,
    W,
    OH,
    OW,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_h,  # of the window
    stride_w,
    pad_h,
    pad_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    # the op keeps M below 2^31, and divisions of 32 bits are several times cheaper than those of 64
    offs_m = tl.program_id(0) // num_c * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = offs_c < C
    pixels = offs_m % (OH * OW)
    top = pixels // OW * stride_h - pad_h
    left = pixels % OW * stride_w - pad_w
    x_rows = (
        x_ptr
        + (offs_m // (OH * OW)).to(tl.int64) * stride_xn
        + top.to(tl.int64) * stride_xh
        + left.to(tl.int64) * stride_xw
    )
    x_ptrs = x_rows[:, None] + offs_c.to(tl.int64)[None, :] * stride_xc
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    taps = tl.full((BLOCK_M, BLOCK_C), -1, tl.int32)
    for kh in range(KH):
        for kw in range(KW):
            ih = top + kh
            iw = left + kw
            inside = mask_m & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            tap = tl.cast(kh, tl.int64) * stride_xh + tl.cast(kw, tl.int64) * stride_xw
            x = tl.load(x_ptrs + tap, mask=inside[:, None] & mask_c[None, :], other=float("-inf")).to(
                tl.float32
            )
            # a NaN is taken, and then kept: no comparison with it is true
            taken = (x > best) | (x != x)
            best = tl.where(taken, x, best)
            if taps_ptr is not None:
                # where all is -inf, the first inside
                taps = tl.where(taken | (inside[:, None] & (taps < 0)), kh * KW + kw, taps)
    mask = mask_m[:, None] & mask_c[None, :]
    offs = offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    tl.store(y_ptr + offs, best.to(y_ptr.dtype.element_ty), mask=mask)
    if taps_ptr is not None:
        tl.store(taps_ptr + offs, taps.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["B", "P", "W"])
def _avg_pool_linear_fwd_kernel(
    x_ptr,  # [B, K, H, W], any strides
    weight_ptr,  # [N, K], any strides
    bias_ptr,  # [N] or None
    y_ptr,  # [B, N]
    pooled_ptr,  # [B, K] or None
    B,
    N,
    K,
    P,  # H * W
    W,
    stride_xb,
    stride_xk,
    stride_xh,
    stride_xw,
    stride_wn,
    stride_wk,
    stride_yb,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_n = tl.cdiv(N, BLOCK_N)
    offs_b = (tl.program_id(0) // num_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_p = tl.arange(0, BLOCK_P)
    mask_b = offs_b < B
    mask_n = offs_n < N
    x_samples = x_ptr + offs_b * stride_xb
    w_columns = weight_ptr + tl.minimum(offs_n, N - 1) * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        offs = start + offs_k
        inside = offs < K
        x_rows = x_samples[:, None] + offs.to(tl.int64)[None, :] * stride_xk
        mask = mask_b[:, None] & inside[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_P, BLOCK_K), tl.float32)
        for first in range(0, P, BLOCK_P):
            pixels = first + offs_p
            x_pixels = (pixels // W).to(tl.int64) * stride_xh + (pixels % W).to(tl.int64) * stride_xw
            sums += tl.load(
                x_rows[:, None, :] + x_pixels[None, :, None],
                mask=mask[:, None, :] & (pixels < P)[None, :, None],
                other=0.0,
            ).to(tl.float32)
        pooled = (tl.sum(sums, 1) / P).to(weight_ptr.dtype.element_ty)
        if pooled_ptr is not None:
            pooled_ptrs = pooled_ptr + offs_b[:, None] * K + offs[None, :]
            # the programs of other columns have the same
            if tl.program_id(0) % num_n == 0:
                tl.store(pooled_ptrs, pooled, mask=mask)
        w_ptrs = w_columns[None, :] + offs.to(tl.int64)[:, None] * stride_wk
        w = tl.load(w_ptrs) if EVEN_K else tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(pooled, w, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_b[:, None] * stride_yb + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_b[:, None] & mask_n[None, :])


def window_arguments(
    x: torch.Tensor, y: torch.Tensor, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> dict[str, Any]:
    """A pool's sizes as kernels take them: ``x`` [N, C, H, W] is pooled to ``y``."""
    return {
        "C": x.shape[1],
        "H": x.shape[2],
        "W": x.shape[3],
        "OH": y.shape[2],
        "OW": y.shape[3],
        "stride_h": stride[0],
        "stride_w": stride[1],
        "pad_h": padding[0],
        "pad_w": padding[1],
        "KH": size[0],
        "KW": size[1],
    }


def _max_pool_tile(m: int, c: int, num_warps: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_C": c, "num_warps": num_warps, "num_stages": 1}


def max_pool_candidate_configs(dtype: torch.dtype, arch: str) -> list[dict[str, int]]:
    """Configurations that fit ``arch``; the last is for few channels."""
    if arch == "interpreter":
        return [_max_pool_tile(512, 64, 4), _max_pool_tile(512, 16, 4)]
    return [_max_pool_tile(32, 64, 4), _max_pool_tile(16, 64, 4), _max_pool_tile(64, 16, 4)]


def max_pool_default_config(m: int, c: int, dtype: torch.dtype, arch: str) -> dict[str, int]:
    tiles = max_pool_candidate_configs(dtype, arch)
    if c <= 32:
        return tiles[-1]
    # half the pixels a program where a large GPU would otherwise stand half empty
    return tiles[0] if -(-m // tiles[0]["BLOCK_M"]) * -(-c // 64) >= 1024 else tiles[-2]


def launch_max_pool_fwd(
    *,
    x: torch.Tensor,  # [N, C, H, W], any strides
    y: torch.Tensor,  # [N, C, OH, OW], channels_last
    taps: torch.Tensor | None = None,  # [N, C, OH, OW], channels_last, uint8
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    config: dict[str, int],
) -> None:
    C = x.shape[1]
    M = y.numel() // C
    launch(
        _max_pool_fwd_kernel,
        (ceil_div(M, config["BLOCK_M"]) * ceil_div(C, config["BLOCK_C"]),),
        config,
        x_ptr=x,
        y_ptr=y,
        taps_ptr=taps,
        M=M,
        **{f"stride_x{d}": s for d, s in zip("nchw", x.stride(), strict=True)},
        **window_arguments(x, y, kernel_size, stride, padding),
    )


def _head_tile(m: int, n: int, k: int, p: int, num_warps: int, num_stages: int) -> dict[str, int]:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BLOCK_P": p}
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


def avg_pool_linear_candidate_configs(dtype: torch.dtype, arch: str) -> list[dict[str, int]]:
    """Configurations that fit ``arch``; the first is for many samples, the last for a few."""
    if arch == "interpreter":
        return [_head_tile(16, 64, 64, 16, 4, 1), _head_tile(32, 128, 32, 4, 4, 1)]
    if dtype == torch.float32:
        return [_head_tile(16, 32, 16, 8, 4, 1), _head_tile(16, 16, 32, 4, 4, 1)]
    return [_head_tile(16, 128, 64, 4, 4, 1), _head_tile(16, 32, 64, 4, 4, 1)]


def avg_pool_linear_default_config(b: int, n: int, dtype: torch.dtype, arch: str) -> dict[str, int]:
    tiles = avg_pool_linear_candidate_configs(dtype, arch)
    # each tile of columns pools its samples again: wide ones, as long as there are programs for a large GPU
    wide = tiles[0]
    return wide if -(-b // wide["BLOCK_M"]) * -(-n // wide["BLOCK_N"]) >= 128 else tiles[-1]


def launch_avg_pool_linear_fwd(
    *,
    x: torch.Tensor,  # [B, K, H, W], any strides
    weight: torch.Tensor,  # [N, K], any strides
    bias: torch.Tensor | None,
    y: torch.Tensor,  # [B, N], last dimension contiguous
    pooled: torch.Tensor | None = None,  # [B, K], weight's dtype
    config: dict[str, int],
) -> None:
    B, K, H, W = x.shape
    N = weight.shape[0]
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "y_ptr": y,
        "pooled_ptr": pooled,
        "B": B,
        "N": N,
        "K": K,
        "P": H * W,
        "W": W,
        **{f"stride_x{d}": s for d, s in zip("bkhw", x.stride(), strict=True)},
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
        "stride_yb": y.stride(0),
        "PRECISION": dot_precision(weight.dtype),
        "EVEN_K": K % config["BLOCK_K"] == 0,
    }
    grid = (ceil_div(B, config["BLOCK_M"]) * ceil_div(N, config["BLOCK_N"]),)
    launch(_avg_pool_linear_fwd_kernel, grid, config, **arguments)
