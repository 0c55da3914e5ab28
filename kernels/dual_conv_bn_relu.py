"""Two 1x1 convolutions with a BatchNorm each, added, in one launch: y = act(bn(conv(x)) + bn2(conv2(x2))).

The end of a residual block whose shortcut is a convolution: the shortcut is K more columns of the same GEMM,
and is neither written nor read back. The two BatchNorms scale their products differently, so each has an
accumulator of its own; the first waits in registers while the second is summed, and the epilogue joins them
in float32, half a tile at a time. The rest is as in ``conv_bn_relu``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels import conv_bn_relu as single
from fastvr.kernels.activations import activate
from fastvr.kernels.common import ceil_div, dot_precision, launch, swizzle
from fastvr.kernels.conv_bn_relu import _batch_norm, _halves, _pixels, pixel_rows


@triton.jit
def _product(
    x_rows,  # [BLOCK_M] pointers
    w_columns,  # [BLOCK_N] pointers
    C,
    stride_xc,
    stride_wc,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] float32, summed over C channels."""
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        channels = start + offs_k
        x_ptrs = x_rows[:, None] + channels.to(tl.int64)[None, :] * stride_xc
        w_ptrs = w_columns[None, :] + channels.to(tl.int64)[:, None] * stride_wc
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            inside = channels < C
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


# sizes of the image matter to nothing but divisions: one binary for every batch and resolution
@triton.jit(do_not_specialize=["M", "OH", "OW"])
def _dual_conv_bn_relu_fwd_kernel(
    x_ptr,  # [N, C, OH, OW], any strides
    weight_ptr,  # [O, C, 1, 1], any strides
    bn_weight_ptr,  # [O] or None
    bn_bias_ptr,  # [O] or None
    running_mean_ptr,  # [O] or None: bn_weight and bn_bias are scale and shift themselves
    running_var_ptr,  # [O] or None
    x2_ptr,  # [N, C2, H, W], any strides
    weight2_ptr,  # [O, C2, 1, 1], any strides
    bn2_weight_ptr,  # [O] or None, and so on
    bn2_bias_ptr,
    running_mean2_ptr,
    running_var2_ptr,
    y_ptr,  # [N, O, OH, OW], channels_last
    M,  # N * OH * OW
    O,  # noqa: E741
    C,
    C2,
    OH,
    OW,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wo,
    stride_wc,
    stride_x2n,
    stride_x2c,
    stride_x2h,  # from one row that the convolution takes to the next, and so is stride_x2w
    stride_x2w,
    stride_w2o,
    stride_w2c,
    eps,
    eps2,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    X_ROWS: tl.constexpr,  # pixel m lies at m * stride_xw
    X2_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_K2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_N), GROUP_M)
    # the op keeps M below 2^31, and divisions of 32 bits are several times cheaper than those of 64
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns past the end repeat the last ones: no masks along them, and they are never stored
    rows = tl.minimum(offs_m, M - 1)
    columns = tl.minimum(offs_n, O - 1).to(tl.int64)

    x_rows = _pixels(x_ptr, rows, OH, OW, stride_xn, stride_xh, stride_xw, ROWS=X_ROWS)
    w_columns = weight_ptr + columns * stride_wo
    acc = _product(x_rows, w_columns, C, stride_xc, stride_wc, PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
    x2_rows = _pixels(x2_ptr, rows, OH, OW, stride_x2n, stride_x2h, stride_x2w, ROWS=X2_ROWS)
    w2_columns = weight2_ptr + columns * stride_w2o
    acc2 = _product(
        x2_rows, w2_columns, C2, stride_x2c, stride_w2c, PRECISION, EVEN_K2, BLOCK_M, BLOCK_N, BLOCK_K
    )

    y_rows = y_ptr + rows.to(tl.int64) * O
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = _halves(acc, BLOCK_M, BLOCK_N)
    left2, right2 = _halves(acc2, BLOCK_M, BLOCK_N)
    for half in tl.static_range(2):
        # not the clamped columns, whose contiguity, and so wide loads and stores, the compiler cannot see
        offs_o = pid_n * BLOCK_N + half * HALF + tl.arange(0, HALF)
        mask_o = offs_o < O
        scale, shift = _batch_norm(
            bn_weight_ptr, bn_bias_ptr, running_mean_ptr, running_var_ptr, offs_o, mask_o, eps, HALF
        )
        scale2, shift2 = _batch_norm(
            bn2_weight_ptr, bn2_bias_ptr, running_mean2_ptr, running_var2_ptr, offs_o, mask_o, eps2, HALF
        )
        part = left if half == 0 else right
        part2 = left2 if half == 0 else right2
        y = part * scale[None, :] + shift[None, :] + (part2 * scale2[None, :] + shift2[None, :])
        y = activate(y, ACT, y_ptr.dtype.element_ty).to(y_ptr.dtype.element_ty)
        tl.store(y_rows[:, None] + offs_o[None, :], y, mask=(offs_m < M)[:, None] & mask_o[None, :])


def candidate_configs(dtype: torch.dtype, arch: str, *, gathered: bool = False) -> list[dict[str, int]]:
    """conv_bn_relu's, where two accumulators of them fit in registers."""
    tiles = single.candidate_configs(dtype, arch, gathered=gathered)
    # ptxas spills that one in float32, where multiply-adds take their operands from registers
    return [tile for tile in tiles if (tile["BLOCK_M"], tile["BLOCK_N"]) != (32, 64)]


def default_config(
    m: int, n: int, dtype: torch.dtype, arch: str, *, gathered: bool = False
) -> dict[str, int]:
    """conv_bn_relu's, but for 128 x 128: two accumulators of it leave one CTA an SM, and nothing that
    computes while its tile is stored."""
    tiles = candidate_configs(dtype, arch, gathered=gathered)
    config = single.default_config(m, n, dtype, arch, gathered=gathered)
    return config if config in tiles and config["BLOCK_N"] < 128 else tiles[1]


def launch_dual_conv_bn_relu_fwd(
    *,
    x: torch.Tensor,  # [N, C, OH, OW], any strides
    weight: torch.Tensor,  # [O, C, 1, 1], any strides
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    x2: torch.Tensor,  # [N, C2, H, W], any strides
    weight2: torch.Tensor,  # [O, C2, 1, 1], any strides
    bn2_weight: torch.Tensor | None,
    bn2_bias: torch.Tensor | None,
    running_mean2: torch.Tensor | None,
    running_var2: torch.Tensor | None,
    y: torch.Tensor,  # [N, O, OH, OW], channels_last
    stride2: tuple[int, int],
    act: str,
    eps: float,
    eps2: float,
    config: dict[str, int],
) -> None:
    N, O, OH, OW = y.shape  # noqa: E741
    C, C2 = x.shape[1], x2.shape[1]
    M = N * OH * OW
    x2_strides = (x2.stride(0), x2.stride(1), stride2[0] * x2.stride(2), stride2[1] * x2.stride(3))
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bn_weight_ptr": bn_weight,
        "bn_bias_ptr": bn_bias,
        "running_mean_ptr": running_mean,
        "running_var_ptr": running_var,
        "x2_ptr": x2,
        "weight2_ptr": weight2,
        "bn2_weight_ptr": bn2_weight,
        "bn2_bias_ptr": bn2_bias,
        "running_mean2_ptr": running_mean2,
        "running_var2_ptr": running_var2,
        "y_ptr": y,
        "M": M,
        "O": O,
        "C": C,
        "C2": C2,
        "OH": OH,
        "OW": OW,
        **{f"stride_x{d}": s for d, s in zip("nchw", x.stride(), strict=True)},
        "stride_wo": weight.stride(0),
        "stride_wc": weight.stride(1),
        **{f"stride_x2{d}": s for d, s in zip("nchw", x2_strides, strict=True)},
        "stride_w2o": weight2.stride(0),
        "stride_w2c": weight2.stride(1),
        "eps": eps,
        "eps2": eps2,
        "ACT": act,
        "PRECISION": dot_precision(x.dtype, convolution=True),
        "X_ROWS": pixel_rows(x),
        "X2_ROWS": tuple(stride2) == (1, 1) and pixel_rows(x2),
        "EVEN_K": C % config["BLOCK_K"] == 0,
        "EVEN_K2": C2 % config["BLOCK_K"] == 0,
    }
    grid = (ceil_div(M, config["BLOCK_M"]) * ceil_div(O, config["BLOCK_N"]),)
    launch(_dual_conv_bn_relu_fwd_kernel, grid, config, **arguments)
