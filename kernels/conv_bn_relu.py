"""Convolution, BatchNorm, residual addition and activation in one launch: y = act(bn(conv(x)) + residual).

An implicit GEMM: rows are output pixels (N*OH*OW), columns the output channels of one group, and K runs over
the window's taps and, innermost, the group's input channels, as in channels_last memory. Products are
accumulated in float32. BatchNorm is applied to that accumulator from its four vectors as they are,
scale = bn_weight * rsqrt(running_var + eps), shift = bn_bias - running_mean * scale: folded into 16-bit
weights it would cost a rounding of each (RMS error 0.85 to 1.04 of eager's, against 0.67 to 0.72 so).

In training a 1x1 convolution may compute relu(bn(x)) of what it loads, by batch statistics that are given,
and leave shares of those of its own result, of the values as stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.activations import activate, relu
from fastvr.kernels.common import (
    ceil_div,
    dot_precision,
    launch,
    normalize,
    split_range,
    sum_parts,
    swizzle,
)
from fastvr.kernels.conv_configs import candidate_configs, default_config

__all__ = ["candidate_configs", "default_config", "launch_conv_bn_relu_fwd", "pixel_rows"]


@triton.jit
def _window_offsets(channels, kh, kw, stride_c, stride_h, stride_w):
    tap = tl.cast(kh, tl.int64) * stride_h + tl.cast(kw, tl.int64) * stride_w
    return channels.to(tl.int64) * stride_c + tap


@triton.jit
def _pixels(ptr, rows, OH, OW, stride_n, stride_h, stride_w, ROWS: tl.constexpr):
    """Pointers to the pixels ``rows``, counted through the whole batch of OH x OW."""
    if ROWS:  # pixel m lies at m * stride_w
        pointers = ptr + rows.to(tl.int64) * stride_w
    else:
        pointers = (
            ptr
            + (rows // (OH * OW)).to(tl.int64) * stride_n
            + (rows % (OH * OW) // OW).to(tl.int64) * stride_h
            + (rows % OW).to(tl.int64) * stride_w
        )
    return pointers


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns. An epilogue takes one after the other: a whole tile's
    scale, shift and residual beside its accumulator do not fit in registers."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _batch_norm(weight_ptr, bias_ptr, mean_ptr, var_ptr, offs, mask, eps, BLOCK: tl.constexpr):
    """Scale and shift of BLOCK output channels, float32."""
    scale = tl.full((BLOCK,), 1.0, tl.float32)
    if var_ptr is not None:
        scale = tl.rsqrt(tl.load(var_ptr + offs, mask=mask, other=1.0).to(tl.float32) + eps)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    shift = tl.zeros((BLOCK,), tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if mean_ptr is not None:
        shift -= tl.load(mean_ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale
    return scale, shift


@triton.jit
def finish_pixels(
    acc,  # [pixels, BLOCK] float32
    y_rows,  # [pixels] pointers to their channels, and so is residual_rows; None without a residual
    residual_rows,
    mask_m,
    first_o,  # of the group's channels
    first_n,  # of the block's, in the group
    GROUP_O,
    bn_weight_ptr,
    bn_bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    stride_rc,
    eps,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything behind the product, for BLOCK channels, and the one rounding."""
    offs_n = first_n + tl.arange(0, BLOCK)
    offs_o = first_o + offs_n
    mask_o = offs_n < GROUP_O
    scale, shift = _batch_norm(
        bn_weight_ptr, bn_bias_ptr, running_mean_ptr, running_var_ptr, offs_o, mask_o, eps, BLOCK
    )
    acc = acc * scale[None, :] + shift[None, :]
    mask = mask_m[:, None] & mask_o[None, :]
    if residual_rows is not None:
        residual_ptrs = residual_rows[:, None] + offs_o[None, :] * stride_rc
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = y_rows.dtype.element_ty
    acc = activate(acc, ACT, dtype)
    tl.store(y_rows[:, None] + offs_o[None, :], acc.to(dtype), mask=mask)


@triton.jit
def _normalised(x, mean_ptr, var_ptr, weight_ptr, bias_ptr, channels, inside, eps):
    """relu(bn(x)) of a block [pixels, channels], rounded as if it had been stored."""
    mean = tl.load(mean_ptr + channels, mask=inside, other=0.0)
    rstd = tl.rsqrt(tl.load(var_ptr + channels, mask=inside, other=1.0) + eps)
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    y = (x.to(tl.float32) - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :]
    return relu(y).to(x.dtype)


@triton.jit
def _leave_shares(acc, shares_ptr, part, rows, first_n, C, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Sum and M2, the squared deviations from their mean, of BLOCK channels over a tile's first ``rows``."""
    offs_n = first_n + tl.arange(0, BLOCK)
    mask_n = offs_n < C
    inside = (tl.arange(0, acc.shape[0]) < rows)[:, None]
    stored = tl.where(inside, acc.to(dtype).to(tl.float32), 0.0)
    total = tl.sum(stored, 0)
    deviation = tl.where(inside, stored - (total / rows)[None, :], 0.0)
    shares = shares_ptr + part.to(tl.int64) * 2 * C + offs_n
    tl.store(shares, total, mask=mask_n)
    tl.store(shares + C, tl.sum(deviation * deviation, 0), mask=mask_n)


# sizes of the image matter to nothing but divisions: one binary for every batch and resolution
@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def _conv_bn_relu_fwd_kernel(
    x_ptr,  # [N, C * groups, H, W], any strides; uint8 with mean and std
    weight_ptr,  # [O, C, KH, KW], any strides
    bn_weight_ptr,  # [O] or None
    bn_bias_ptr,  # [O] or None
    running_mean_ptr,  # [O] or None: bn_weight and bn_bias are scale and shift themselves
    running_var_ptr,  # [O] or None
    residual_ptr,  # [N, O, OH, OW], any strides, or None
    mean_ptr,  # [C * groups] of uint8 x, or None
    std_ptr,
    y_ptr,  # [N, O, OH, OW], channels_last; with SPLIT_K [SPLIT_K, M, O] float32
    M,  # N * OH * OW
    GROUP_O,  # output channels of a group
    C,  # input channels of a group
    H,
    W,
    OH,
    OW,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wo,
    stride_wc,
    stride_wh,
    stride_ww,
    stride_rn,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_ym,  # O
    stride_h,  # of the convolution
    stride_w,
    pad_h,
    pad_w,
    eps,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    CHANNELS: tl.constexpr,  # C where K is split into tap and channel: divisions by a constant
    PADDED: tl.constexpr,
    X_ROWS: tl.constexpr,  # the window is one pixel and row m of the GEMM lies at m * stride_xw
    RESIDUAL_ROWS: tl.constexpr,  # row m of the residual lies at m * stride_rw
    FLAT_K: tl.constexpr,  # a block of K may cross taps
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr = 1,
    # of a 1x1 convolution in training; no groups
    before_mean_ptr=None,  # [C] float32: relu(bn(x)) is convolved
    before_var_ptr=None,  # [C] float32
    before_weight_ptr=None,  # [C]
    before_bias_ptr=None,  # [C]
    before_eps=0.0,
    shares_ptr=None,  # [ceil(M / BLOCK_M), 2, O] float32: sum and M2 of what is stored
):
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(GROUP_O, BLOCK_N)
    group = tl.program_id(0) // (num_m * num_n)
    pid_m, pid_n = swizzle(tl.program_id(0) % (num_m * num_n), num_m, num_n, GROUP_M)
    # the op keeps M below 2^31, and divisions of 32 bits are several times cheaper than those of 64
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # rows and columns past the end repeat the last ones: no masks along them, and they are never stored
    rows = tl.minimum(offs_m, M - 1)
    columns = tl.minimum(offs_n, GROUP_O - 1)
    first_o = group.to(tl.int64) * GROUP_O

    x_group = x_ptr + group.to(tl.int64) * C * stride_xc
    if X_ROWS:
        x_rows = x_group + rows.to(tl.int64) * stride_xw
    else:
        pixels = rows % (OH * OW)
        top = pixels // OW * stride_h - pad_h
        left = pixels % OW * stride_w - pad_w
        x_rows = (
            x_group
            + (rows // (OH * OW)).to(tl.int64) * stride_xn
            + top.to(tl.int64) * stride_xh
            + left.to(tl.int64) * stride_xw
        )
    w_columns = weight_ptr + (first_o + columns) * stride_wo

    K = KH * KW * C
    first, stop = split_range(K, BLOCK_K, SPLIT_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, stop, BLOCK_K):
        offs = start + offs_k
        inside = offs < K
        if KH * KW == 1:
            channels = offs
            kh = 0
            kw = 0
        else:
            # without FLAT_K a block lies inside one tap, whose place is then a scalar
            tap = offs // CHANNELS if FLAT_K else start // CHANNELS
            channels = offs % CHANNELS if FLAT_K else start % CHANNELS + offs_k
            if not FLAT_K:
                # Triton 3.6 does not see it, and neither widens nor pipelines the loads
                channels = tl.max_contiguous(tl.multiple_of(channels, BLOCK_K), BLOCK_K)
            kh = tap // KW
            kw = tap % KW
        x_offs = _window_offsets(channels, kh, kw, stride_xc, stride_xh, stride_xw)
        w_offs = _window_offsets(channels, kh, kw, stride_wc, stride_wh, stride_ww)

        x_ptrs = x_rows[:, None] + x_offs[None, :]
        if PADDED:
            if FLAT_K:
                ih = top[:, None] + (tap // KW)[None, :]
                iw = left[:, None] + (tap % KW)[None, :]
            else:
                ih = (top + kh)[:, None]
                iw = (left + kw)[:, None]
            # as unsigned numbers, what lies before the image lies far behind it
            mask = (ih.to(tl.uint32) < H.to(tl.uint32)) & (iw.to(tl.uint32) < W.to(tl.uint32))
            if not EVEN_K:
                mask = mask & inside[None, :]
            x = tl.load(x_ptrs, mask=mask, other=0)
        elif EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=inside[None, :], other=0)
        if mean_ptr is not None:
            image_channels = group * C + channels
            mean = tl.load(mean_ptr + image_channels, mask=inside, other=0.0)
            std = tl.load(std_ptr + image_channels, mask=inside, other=1.0)
            x = normalize(x, mean[None, :], std[None, :], weight_ptr.dtype.element_ty == tl.float32)
            if PADDED:
                x = tl.where(mask, x, 0.0)
            x = x.to(weight_ptr.dtype.element_ty)
        if before_mean_ptr is not None:
            x = _normalised(
                x, before_mean_ptr, before_var_ptr, before_weight_ptr, before_bias_ptr, channels, inside,
                before_eps,
            )  # fmt: skip
        w_ptrs = w_columns[None, :] + w_offs[:, None]
        w = tl.load(w_ptrs) if EVEN_K else tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    if SPLIT_K > 1:
        # y is the workspace here, [SPLIT_K, M, O]
        y_rows = y_ptr + (tl.program_id(1).to(tl.int64) * M + offs_m) * stride_ym + first_o
        mask = (offs_m < M)[:, None] & (offs_n < GROUP_O)[None, :]
        tl.store(y_rows[:, None] + offs_n[None, :], acc, mask=mask)
    else:
        residual_rows = residual_ptr
        if residual_ptr is not None:
            residual_rows = _pixels(
                residual_ptr, rows, OH, OW, stride_rn, stride_rh, stride_rw, ROWS=RESIDUAL_ROWS
            )
        y_rows = y_ptr + rows.to(tl.int64) * stride_ym
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            finish_pixels(
                left if half == 0 else right, y_rows, residual_rows, offs_m < M, first_o,
                pid_n * BLOCK_N + half * (BLOCK_N // 2), GROUP_O, bn_weight_ptr, bn_bias_ptr,
                running_mean_ptr, running_var_ptr, stride_rc, eps, ACT, BLOCK_N // 2,
            )  # fmt: skip
            if shares_ptr is not None:
                _leave_shares(
                    left if half == 0 else right, shares_ptr, pid_m, tl.minimum(M - pid_m * BLOCK_M, BLOCK_M),
                    pid_n * BLOCK_N + half * (BLOCK_N // 2), GROUP_O, y_ptr.dtype.element_ty, BLOCK_N // 2,
                )  # fmt: skip


@triton.jit(do_not_specialize=["M", "OH", "OW"])
def _conv_sum_kernel(
    workspace_ptr,  # [SPLIT_K, M, O] float32; what follows as above
    bn_weight_ptr,
    bn_bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    residual_ptr,
    y_ptr,
    M,
    O,  # noqa: E741
    OH,
    OW,
    stride_rn,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_ym,
    eps,
    ACT: tl.constexpr,
    RESIDUAL_ROWS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What `_conv_bn_relu_fwd_kernel` does behind its product, for one that was split."""
    num_n = tl.cdiv(O, COLUMNS)
    offs_m = tl.program_id(0) // num_n * ROWS + tl.arange(0, ROWS)
    first_n = tl.program_id(0) % num_n * COLUMNS
    acc = sum_parts(workspace_ptr, offs_m, first_n + tl.arange(0, COLUMNS), M, O, SPLIT_K, ROWS, COLUMNS)
    rows = tl.minimum(offs_m, M - 1)
    residual_rows = residual_ptr
    if residual_ptr is not None:
        residual_rows = _pixels(
            residual_ptr, rows, OH, OW, stride_rn, stride_rh, stride_rw, ROWS=RESIDUAL_ROWS
        )
    y_rows = y_ptr + rows.to(tl.int64) * stride_ym
    finish_pixels(
        acc, y_rows, residual_rows, offs_m < M, 0, first_n, O, bn_weight_ptr, bn_bias_ptr, running_mean_ptr,
        running_var_ptr, stride_rc, eps, ACT, COLUMNS,
    )  # fmt: skip


def pixel_rows(t: torch.Tensor) -> bool:
    """Whether pixel m of [N, C, H, W], counted through the whole batch, lies at m * stride(3)."""
    _, _, h, w = t.shape
    sn, _, sh, sw = t.stride()
    # of one sample too, so that batch 1 is no binary of its own
    return (h == 1 or sh == w * sw) and sn == h * w * sw


def epilogue_arguments(
    *,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    act: str,
    eps: float,
) -> dict[str, Any]:
    """What a kernel hands to `finish_pixels`, and `_pixels` of the residual."""
    residual_strides = (0, 0, 0, 0) if residual is None else residual.stride()
    return {
        "bn_weight_ptr": bn_weight,
        "bn_bias_ptr": bn_bias,
        "running_mean_ptr": running_mean,
        "running_var_ptr": running_var,
        "residual_ptr": residual,
        "y_ptr": y,
        "OH": y.shape[2],
        "OW": y.shape[3],
        **{f"stride_r{d}": s for d, s in zip("nchw", residual_strides, strict=True)},
        "stride_ym": y.shape[1],
        "eps": eps,
        "ACT": act,
        "RESIDUAL_ROWS": residual is not None and pixel_rows(residual),
    }


# The launch behind a split product has little to do: small tiles make many programs
_SUM = {"ROWS": 8, "COLUMNS": 64, "num_warps": 4}


def launch_conv_bn_relu_fwd(
    *,
    x: torch.Tensor,  # [N, C, H, W], any strides
    weight: torch.Tensor,  # [O, C / groups, KH, KW], any strides
    mean: torch.Tensor | None,  # [C] of uint8 x
    std: torch.Tensor | None,
    y: torch.Tensor,  # [N, O, OH, OW], channels_last
    workspace: torch.Tensor | None = None,  # [SPLIT_K, N * OH * OW, O] float32, where config has SPLIT_K
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int,
    config: dict[str, int],
    before: dict[str, Any] | None = None,  # mean, var, weight, bias [C] and eps of a BatchNorm of x
    shares: torch.Tensor | None = None,  # [ceil(N * OH * OW / BLOCK_M), 2, O] float32
    **epilogue: Any,  # of `epilogue_arguments`
) -> None:
    N, _, H, W = x.shape
    O, C, KH, KW = weight.shape  # noqa: E741
    M = N * y.shape[2] * y.shape[3]
    group_o = O // groups
    point = KH == KW == 1
    padded = padding[0] > 0 or padding[1] > 0
    split = config.get("SPLIT_K", 1)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "mean_ptr": mean,
        "std_ptr": std,
        "M": M,
        "GROUP_O": group_o,
        "C": C,
        "H": H,
        "W": W,
        **{f"stride_x{d}": s for d, s in zip("nchw", x.stride(), strict=True)},
        **{f"stride_w{d}": s for d, s in zip("ochw", weight.stride(), strict=True)},
        "stride_h": stride[0],
        "stride_w": stride[1],
        "pad_h": padding[0],
        "pad_w": padding[1],
        "PRECISION": dot_precision(weight.dtype, convolution=True),
        "KH": KH,
        "KW": KW,
        "CHANNELS": 0 if point else C,
        "PADDED": padded,
        "X_ROWS": point and stride == (1, 1) and not padded and pixel_rows(x),
        "FLAT_K": not point and C % config["BLOCK_K"] != 0,
        "EVEN_K": KH * KW * C % config["BLOCK_K"] == 0,
    }
    finish = epilogue_arguments(y=y, **epilogue)
    grid = (groups * ceil_div(M, config["BLOCK_M"]) * ceil_div(group_o, config["BLOCK_N"]), split)
    if split == 1:
        if before is not None:
            finish |= {f"before_{name}" + "_ptr" * (name != "eps"): value for name, value in before.items()}
        launch(_conv_bn_relu_fwd_kernel, grid, config, shares_ptr=shares, **arguments, **finish)
        return
    assert workspace is not None
    nothing: dict[str, Any] = dict.fromkeys(epilogue)
    plain = epilogue_arguments(y=y, **nothing | {"act": "none", "eps": 0.0})
    launch(_conv_bn_relu_fwd_kernel, grid, config, **arguments, **plain | {"y_ptr": workspace})
    programs = ceil_div(M, _SUM["ROWS"]) * ceil_div(O, _SUM["COLUMNS"])
    launch(_conv_sum_kernel, (programs,), _SUM, workspace_ptr=workspace, M=M, O=O, SPLIT_K=split, **finish)
