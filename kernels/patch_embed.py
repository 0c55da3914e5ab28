"""Patch embedding in one launch: y[b, t] = (patch @ weight.T + bias, or the prefix token) + pos_embed[t].

x [B, C, H, W], weight [D, C, p_h, p_w], y [B, T, D] with T = P + (H // p_h) * (W // p_w): P prefix tokens,
then the patches row by row. A GEMM over the rows of y: a patch is read out of the image through its strides,
so no unfolded copy is written; a prefix row multiplies zeros and takes its token instead. A uint8 image is
normalised on the way, and rounded to the weight's dtype before the product. Products are accumulated in
float32, bias, token and position are added to the accumulator: one rounding, on store. ``stats`` takes the
mean and M2 of each 64 columns of a row as stored, for the LayerNorm behind it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.common import ceil_div, dot_precision, launch, normalize, swizzle
from fastvr.kernels.moments import store_row_stats
from fastvr.reference.linear_stats import STATS_CHUNK


@triton.jit(do_not_specialize=["M"])
def _patch_embed_fwd_kernel(
    x_ptr,  # [B, C, H, W], uint8 with mean and std
    weight_ptr,  # [D, C, PATCH_H, PATCH_W]
    bias_ptr,  # [D] or None
    pos_ptr,  # [T, D] or None
    prefix_ptr,  # [PREFIX, D] or None
    mean_ptr,  # [C] or None
    std_ptr,  # [C] or None
    y_ptr,  # [B, T, D], contiguous
    stats_ptr,  # [B * T, ceil(D / STATS_CHUNK), 2] float32 or None
    M,  # B * T
    T,
    GRID_W,
    D,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wd,
    stride_wc,
    stride_wh,
    stride_ww,
    stride_pt,
    stride_ft,
    PREFIX: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # of image and weight: a row of a patch is contiguous in both
    PACKED_WEIGHT: tl.constexpr,
    STATS_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_N), GROUP_M)
    # rows stay int32 (the op refuses 2^31 of them): a 64-bit division costs more than a step of the product
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < D
    rows = tl.minimum(offs_m, M - 1)
    columns = tl.minimum(offs_n, D - 1)

    token = rows % T
    is_patch = token >= PREFIX
    patch = tl.maximum(token - PREFIX, 0)
    corner = (rows // T).to(tl.int64) * stride_xb
    corner += (patch // GRID_W * PATCH_H).to(tl.int64) * stride_xh
    corner += (patch % GRID_W * PATCH_W).to(tl.int64) * stride_xw
    # inside an image 32 bits do (the op sees to that)
    x_rows = x_ptr + corner[:, None]
    K: tl.constexpr = CHANNELS * PATCH_H * PATCH_W
    # a constant K says how rows are aligned, where patches of 14 x 14 make it no multiple of 16
    w_columns = weight_ptr + columns.to(tl.int64)[None, :] * (K if PACKED_WEIGHT else stride_wd)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + offs_k
        if CHANNELS_LAST:
            channel = k % CHANNELS
            x_offs = k // (PATCH_W * CHANNELS) * stride_xh + k % (PATCH_W * CHANNELS)
        else:
            channel = k // (PATCH_H * PATCH_W)
            i = k // PATCH_W % PATCH_H
            j = k % PATCH_W
            x_offs = channel * stride_xc + i * stride_xh + j * stride_xw
        if PACKED_WEIGHT:
            w_ptrs = w_columns + k[:, None]
        else:
            w_ptrs = w_columns + (channel * stride_wc + i * stride_wh + j * stride_ww)[:, None]
        x_ptrs = x_rows + x_offs[None, :]
        if K % BLOCK_K == 0:
            w = tl.load(w_ptrs)
            x = tl.load(x_ptrs, mask=is_patch[:, None], other=0)
        else:
            w = tl.load(w_ptrs, mask=(k < K)[:, None], other=0.0)
            x = tl.load(x_ptrs, mask=is_patch[:, None] & (k < K)[None, :], other=0)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + channel, mask=k < K, other=0.0)
            std = tl.load(std_ptr + channel, mask=k < K, other=1.0)
            x = normalize(x, mean[None, :], std[None, :], w.dtype == tl.float32)
            # a prefix row stays zero
            x = tl.where(is_patch[:, None], x, 0.0).to(w.dtype)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if prefix_ptr is not None:
        prefix_ptrs = prefix_ptr + token[:, None] * stride_ft + offs_n[None, :]
        prefix = tl.load(prefix_ptrs, mask=mask & (token < PREFIX)[:, None], other=0.0).to(tl.float32)
        acc = tl.where(is_patch[:, None], acc, prefix)
    if pos_ptr is not None:
        acc += tl.load(pos_ptr + token[:, None] * stride_pt + offs_n[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * D + offs_n[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptrs, y, mask=mask)
    if stats_ptr is not None:
        store_row_stats(
            stats_ptr, y.to(tl.float32), offs_m.to(tl.int64), offs_n, M, D, STATS_CHUNK, BLOCK_M, BLOCK_N
        )


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP_M": 8,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def candidate_configs(dtype: torch.dtype, arch: str) -> list[dict[str, int]]:
    """Configurations that fit ``arch``; the first is for many rows, the last for one image."""
    if arch == "interpreter":
        return [_tile(128, 128, 128, 4, 1), _tile(64, 256, 64, 4, 1)]
    if dtype == torch.float32:
        # IEEE float32 has no matrix instruction on NVIDIA: fused multiply-adds out of registers
        return [_tile(64, 64, 32, 8, 2), _tile(32, 64, 32, 8, 2)]
    if arch.startswith("gfx"):
        return [_tile(128, 128, 64, 8, 2), _tile(128, 64, 64, 4, 2), _tile(64, 64, 64, 4, 2)]
    return [_tile(128, 128, 64, 8, 3), _tile(128, 64, 64, 4, 3), _tile(64, 64, 64, 4, 3)]


def default_config(m: int, d: int, dtype: torch.dtype, arch: str) -> dict[str, int]:
    """The largest tile that still makes two waves' worth of programs on a large GPU."""
    tiles = candidate_configs(dtype, arch)
    for tile in tiles:
        if ceil_div(m, tile["BLOCK_M"]) * ceil_div(d, tile["BLOCK_N"]) >= 256:
            return tile
    return tiles[0] if arch == "interpreter" else tiles[-1]


def launch_patch_embed_fwd(
    *,
    x: torch.Tensor,  # [B, C, H, W], any strides; uint8 with mean and std
    weight: torch.Tensor,  # [D, C, p_h, p_w], any strides
    bias: torch.Tensor | None,
    pos_embed: torch.Tensor | None,  # [T, D], last dimension contiguous
    prefix_tokens: torch.Tensor | None,  # [P, D], last dimension contiguous
    mean: torch.Tensor | None,  # [C]
    std: torch.Tensor | None,  # [C]
    y: torch.Tensor,  # [B, T, D], contiguous
    stats: torch.Tensor | None = None,  # [B * T, ceil(D / STATS_CHUNK), 2] float32, contiguous
    config: dict[str, int],
) -> None:
    B, T, D = y.shape
    _, channels, patch_h, patch_w = weight.shape
    channels_last = (
        x.stride(1) == 1 and x.stride(3) == channels and weight.permute(0, 2, 3, 1).is_contiguous()
    )
    grid = (ceil_div(B * T, config["BLOCK_M"]) * ceil_div(D, config["BLOCK_N"]),)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "pos_ptr": pos_embed,
        "prefix_ptr": prefix_tokens,
        "mean_ptr": mean,
        "std_ptr": std,
        "y_ptr": y,
        "stats_ptr": stats,
        "M": B * T,
        "T": T,
        "GRID_W": x.shape[3] // patch_w,
        "D": D,
        "stride_xb": x.stride(0),
        "stride_xc": x.stride(1),
        "stride_xh": x.stride(2),
        "stride_xw": x.stride(3),
        "stride_wd": weight.stride(0),
        "stride_wc": weight.stride(1),
        "stride_wh": weight.stride(2),
        "stride_ww": weight.stride(3),
        "stride_pt": 0 if pos_embed is None else pos_embed.stride(0),
        "stride_ft": 0 if prefix_tokens is None else prefix_tokens.stride(0),
        "PREFIX": 0 if prefix_tokens is None else prefix_tokens.shape[0],
        "CHANNELS": channels,
        "PATCH_H": patch_h,
        "PATCH_W": patch_w,
        "CHANNELS_LAST": channels_last,
        "PACKED_WEIGHT": channels_last or weight.is_contiguous(),
        "STATS_CHUNK": STATS_CHUNK,
        "PRECISION": dot_precision(weight.dtype, convolution=True),
    }
    launch(_patch_embed_fwd_kernel, grid, config, **arguments)
