"""The end of a ResNet's stem in training: y = max_pool(relu(bn(x))), BatchNorm by statistics that are given.

x is a channels_last map. A program takes some pixels of y and a block of channels, normalises each tap of
their windows and keeps the largest, and which tap it was: a byte, 255 where ReLU lets nothing through. A NaN
in a window is its maximum, as in PyTorch; of equal ones the first.

Backward: the gradient of a pixel of relu(bn(x)) is the sum over the windows that took it. Nothing of it is
written: the launch that leaves shares of BatchNorm's sums and the one that writes dx gather it each for
themselves. The formulas are `batch_norm_act`'s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvr.kernels.activations import relu
from fastvr.kernels.batch_norm_act import merge_gradient_sums
from fastvr.kernels.batch_norm_stats import rows_a_part
from fastvr.kernels.common import ceil_div, launch
from fastvr.kernels.pool import window_arguments
from fastvr.kernels.pool_backward import gather_from_windows, windows_a_pixel


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def _batch_norm_act_max_pool_fwd_kernel(
    x_ptr,  # [N, H, W, C]
    mean_ptr,  # [C] float32
    var_ptr,  # [C] float32
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # [M, C]
    taps_ptr,  # [M, C] uint8
    M,  # N * OH * OW
    C,
    H,
    W,
    OH,
    OW,
    stride_h,  # of the window
    stride_w,
    pad_h,
    pad_w,
    eps,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    offs_m = tl.program_id(0) // num_c * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = offs_c < C
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
    rstd = tl.rsqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=0.0) + eps)
    scale = (rstd * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32))[None, :]
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    pixels = offs_m % (OH * OW)
    top = pixels // OW * stride_h - pad_h
    left = pixels % OW * stride_w - pad_w
    images = x_ptr + (offs_m // (OH * OW)).to(tl.int64) * H * W * C
    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    taps = tl.full((BLOCK_M, BLOCK_C), 255, tl.int32)
    for kh in range(KH):
        for kw in range(KW):
            ih = top + kh
            iw = left + kw
            inside = mask_m & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            x_ptrs = (images + (ih.to(tl.int64) * W + iw) * C)[:, None] + offs_c[None, :]
            x = tl.load(x_ptrs, mask=inside[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
            x = (x - mean) * scale + bias
            # a NaN is taken, and then kept: no comparison with it is true
            taken = inside[:, None] & ((x > best) | (x != x))
            best = tl.where(taken, x, best)
            taps = tl.where(taken, kh * KW + kw, taps)
    mask = mask_m[:, None] & mask_c[None, :]
    offs = offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    tl.store(y_ptr + offs, relu(best).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(taps_ptr + offs, tl.where(best <= 0.0, 255, taps).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["M", "ROWS", "H", "W", "OH", "OW"])
def _batch_norm_act_max_pool_bwd_sums_kernel(
    grad_ptr,  # [N, OH, OW, C]
    taps_ptr,  # [N, OH, OW, C] uint8
    x_ptr,  # [M, C]
    mean_ptr,  # [C] float32
    var_ptr,  # [C] float32
    parts_ptr,  # [ceil(M / ROWS), 2, C] float32: shares of dbias, then of dweight
    M,  # N * H * W
    C,
    ROWS,  # of each part
    H,
    W,
    OH,
    OW,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    eps,
    KH: tl.constexpr,
    KW: tl.constexpr,
    WINDOWS_H: tl.constexpr,  # that a pixel may lie in, one below the other
    WINDOWS_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // num_c
    offs_c = tl.program_id(0) % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.rsqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=0.0) + eps)
    first = part * ROWS
    stop = tl.minimum(first + ROWS, M)
    dbias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    along = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, stop, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < stop)[:, None] & mask_c[None, :]
        grad = gather_from_windows(
            grad_ptr, taps_ptr, rows, offs_c, mask, C, H, W, OH, OW, stride_h, stride_w, pad_h, pad_w,
            KH, KW, WINDOWS_H, WINDOWS_W, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        offs = rows.to(tl.int64)[:, None] * C + offs_c[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dbias += grad
        along += grad * (x - mean[None, :])
    parts = parts_ptr + part.to(tl.int64) * 2 * C + offs_c
    tl.store(parts, tl.sum(dbias, 0), mask=mask_c)
    tl.store(parts + C, tl.sum(along, 0) * rstd, mask=mask_c)


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def _batch_norm_act_max_pool_bwd_kernel(
    grad_ptr,  # [N, OH, OW, C]
    taps_ptr,  # [N, OH, OW, C] uint8
    x_ptr,  # [M, C]
    mean_ptr,  # [C] float32
    var_ptr,  # [C] float32
    weight_ptr,  # [C]
    sums_ptr,  # [2, C] float32
    dx_ptr,  # [M, C]
    M,  # N * H * W
    C,
    H,
    W,
    OH,
    OW,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    eps,
    KH: tl.constexpr,
    KW: tl.constexpr,
    WINDOWS_H: tl.constexpr,
    WINDOWS_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_c = tl.cdiv(C, BLOCK_C)
    rows = tl.program_id(0) // num_c * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(0) % num_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (rows < M)[:, None] & mask_c[None, :]
    grad = gather_from_windows(
        grad_ptr, taps_ptr, rows, offs_c, mask, C, H, W, OH, OW, stride_h, stride_w, pad_h, pad_w,
        KH, KW, WINDOWS_H, WINDOWS_W, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    offs = rows.to(tl.int64)[:, None] * C + offs_c[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.rsqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=0.0) + eps)
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    dbias = tl.load(sums_ptr + offs_c, mask=mask_c, other=0.0) / M
    along = tl.load(sums_ptr + C + offs_c, mask=mask_c, other=0.0) / M * rstd
    dx = grad - dbias[None, :] - (x - mean[None, :]) * along[None, :]
    tl.store(dx_ptr + offs, (dx * (rstd * weight)[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)


def launch_batch_norm_act_max_pool_fwd(
    *,
    x: torch.Tensor,  # [N, C, H, W], this and all maps channels_last
    mean: torch.Tensor,  # [C] float32
    var: torch.Tensor,  # [C] float32
    weight: torch.Tensor,  # [C]
    bias: torch.Tensor,  # [C]
    y: torch.Tensor,  # [N, C, OH, OW]
    taps: torch.Tensor,  # [N, C, OH, OW] uint8
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    eps: float,
    config: dict[str, int],
) -> None:
    M = y.numel() // y.shape[1]
    grid = (ceil_div(M, config["BLOCK_M"]) * ceil_div(y.shape[1], config["BLOCK_C"]),)
    launch(
        _batch_norm_act_max_pool_fwd_kernel,
        grid,
        config,
        x_ptr=x,
        mean_ptr=mean,
        var_ptr=var,
        weight_ptr=weight,
        bias_ptr=bias,
        y_ptr=y,
        taps_ptr=taps,
        M=M,
        eps=eps,
        **window_arguments(x, y, kernel_size, stride, padding),
    )


def launch_batch_norm_act_max_pool_bwd(
    *,
    grad: torch.Tensor,  # [N, C, OH, OW], this and all maps channels_last
    taps: torch.Tensor,  # [N, C, OH, OW] uint8
    x: torch.Tensor,  # [N, C, H, W]
    mean: torch.Tensor,  # [C] float32
    var: torch.Tensor,  # [C] float32
    weight: torch.Tensor,  # [C]
    parts: torch.Tensor,  # [ceil(N * H * W / rows_a_part), 2, C] float32
    sums: torch.Tensor,  # [2, C] float32
    dx: torch.Tensor | None,  # [N, C, H, W]
    dweight: torch.Tensor,  # [C]
    dbias: torch.Tensor,  # [C]
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    eps: float,
    config: dict[str, int],
) -> None:
    C = x.shape[1]
    M = x.numel() // C
    arguments = {
        "grad_ptr": grad,
        "taps_ptr": taps,
        "x_ptr": x,
        "mean_ptr": mean,
        "var_ptr": var,
        "M": M,
        "eps": eps,
        **windows_a_pixel(kernel_size, stride),
        **window_arguments(x, grad, kernel_size, stride, padding),
    }
    num_c = ceil_div(C, config["BLOCK_C"])
    launch(
        _batch_norm_act_max_pool_bwd_sums_kernel,
        (len(parts) * num_c,),
        config,
        parts_ptr=parts,
        ROWS=rows_a_part(M, C, config),
        **arguments,
    )
    merge_gradient_sums(parts=parts, sums=sums, dweight=dweight, dbias=dbias, config=config)
    if dx is not None:
        launch(
            _batch_norm_act_max_pool_bwd_kernel,
            (ceil_div(M, config["BLOCK_M"]) * num_c,),
            config,
            weight_ptr=weight,
            sums_ptr=sums,
            dx_ptr=dx,
            **arguments,
        )
