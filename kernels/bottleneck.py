"""The end of a residual bottleneck in one launch, and the first convolution of the next block with it:

    y = relu(bn3(conv1x1(relu(bn2(conv3x3(x))))) + shortcut)
    z = relu(bn1(conv1x1(y)))

where the shortcut is a tensor, or a 1x1 convolution of another one with its BatchNorm. Back-to-back implicit
GEMMs over output pixels, NHWC: a program holds all C channels of the 3x3 for its pixels, rounds them to the
compute dtype as a separate launch would store them, multiplies them by the 1x1's weight a block of output
channels at a time, and each such block of y, rounded too, by the next weight. Neither do the C channels ever
leave the SM, nor is y read back for z. Products are accumulated in float32, and every BatchNorm is applied to
its float32 accumulator as in ``conv_bn_relu``.

A tile of 128 pixels at C = 64, with z, takes 4.4 thousand clocks of the tensor cores, as many of issue, and 9
thousand of HBM: bound by memory. At C = 128 it is 17.4 thousand clocks of the first two; wider ones gain
nothing (model figures, H200).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.activations import relu
from fastvr.kernels.common import ceil_div, dot_precision, launch
from fastvr.kernels.conv_bn_relu import _batch_norm, _pixels, _window_offsets, pixel_rows
from fastvr.kernels.dual_conv_bn_relu import _product


# sizes of the image matter to nothing but divisions: one binary for every batch and resolution
@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def _bottleneck_fwd_kernel(
    x_ptr,  # [N, C, H, W], channels contiguous, as in every tensor here
    weight2_ptr,  # [C, C, 3, 3]
    bn2_weight_ptr,  # [C] or None
    bn2_bias_ptr,  # [C] or None
    running_mean2_ptr,  # [C] or None: bn2_weight and bn2_bias are scale and shift themselves
    running_var2_ptr,  # [C] or None
    weight3_ptr,  # [O, C, 1, 1]
    bn3_weight_ptr,  # [O] or None, and so on
    bn3_bias_ptr,
    running_mean3_ptr,
    running_var3_ptr,
    residual_ptr,  # [N, O, OH, OW] or None
    shortcut_ptr,  # [N, C_SHORTCUT, HS, WS] or None
    shortcut_weight_ptr,  # [O, C_SHORTCUT, 1, 1] or None
    bn_shortcut_weight_ptr,  # [O] or None, and so on
    bn_shortcut_bias_ptr,
    running_mean_shortcut_ptr,
    running_var_shortcut_ptr,
    weight1_ptr,  # [C_NEXT, O, 1, 1] or None
    bn1_weight_ptr,  # [C_NEXT] or None, and so on
    bn1_bias_ptr,
    running_mean1_ptr,
    running_var1_ptr,
    y_ptr,  # [N, O, OH, OW], channels_last
    z_ptr,  # [N, C_NEXT, OH, OW], channels_last, or None
    M,  # N * OH * OW
    O,  # noqa: E741
    H,
    W,
    OH,
    OW,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_w2o,
    stride_w2h,
    stride_w2w,
    stride_w3o,
    stride_rn,
    stride_rh,
    stride_rw,
    stride_sn,
    stride_sh,  # from one row that the convolution takes to the next, and so is stride_sw
    stride_sw,
    stride_wso,
    stride_w1o,
    stride_h,  # of the 3x3
    stride_w,
    eps2,
    eps3,
    eps_shortcut,
    eps1,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    C_SHORTCUT: tl.constexpr,
    C_NEXT: tl.constexpr,
    RESIDUAL_ROWS: tl.constexpr,  # pixel m lies at m * stride_rw
    SHORTCUT_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of y's channels, a divisor of O
    BLOCK_K: tl.constexpr,  # a divisor of C and C_SHORTCUT
):
    # the op keeps M below 2^31, and divisions of 32 bits are several times cheaper than those of 64
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < M)[:, None]
    # rows past the end repeat the last one: no masks along them, and they are never stored
    rows = tl.minimum(offs_m, M - 1)
    top = rows % (OH * OW) // OW * stride_h - 1
    left = rows % OW * stride_w - 1
    x_rows = (
        x_ptr
        + (rows // (OH * OW)).to(tl.int64) * stride_xn
        + top.to(tl.int64) * stride_xh
        + left.to(tl.int64) * stride_xw
    )
    offs_c = tl.arange(0, C)
    offs_n = tl.arange(0, BLOCK_N)
    w2_columns = weight2_ptr + offs_c.to(tl.int64) * stride_w2o

    acc = tl.zeros((BLOCK_M, C), tl.float32)
    for start in range(0, 9 * C, BLOCK_K):
        tap = start // C
        kh = tap // 3
        kw = tap % 3
        # Triton 3.6 does not see it, and neither widens nor pipelines the loads
        channels = tl.max_contiguous(tl.multiple_of(start % C + tl.arange(0, BLOCK_K), BLOCK_K), BLOCK_K)
        x_offs = _window_offsets(channels, kh, kw, 1, stride_xh, stride_xw)
        w_offs = _window_offsets(channels, kh, kw, 1, stride_w2h, stride_w2w)
        # as unsigned numbers, what lies before the image lies far behind it
        inside = ((top + kh).to(tl.uint32) < H.to(tl.uint32)) & ((left + kw).to(tl.uint32) < W.to(tl.uint32))
        x = tl.load(x_rows[:, None] + x_offs[None, :], mask=inside[:, None], other=0.0)
        w = tl.load(w2_columns[None, :] + w_offs[:, None])
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    scale2, shift2 = _batch_norm(
        bn2_weight_ptr, bn2_bias_ptr, running_mean2_ptr, running_var2_ptr, offs_c, offs_c < C, eps2, C
    )
    middle = relu(acc * scale2[None, :] + shift2[None, :]).to(x_ptr.dtype.element_ty)

    if residual_ptr is not None:
        residual_rows = _pixels(residual_ptr, rows, OH, OW, stride_rn, stride_rh, stride_rw, RESIDUAL_ROWS)
    if shortcut_ptr is not None:
        shortcut_rows = _pixels(shortcut_ptr, rows, OH, OW, stride_sn, stride_sh, stride_sw, SHORTCUT_ROWS)
    if z_ptr is not None:
        offs_z = tl.arange(0, C_NEXT)
        acc_z = tl.zeros((BLOCK_M, C_NEXT), tl.float32)
    y_rows = y_ptr + rows.to(tl.int64) * O
    for first in range(0, O, BLOCK_N):
        offs_o = first + offs_n
        mask_o = offs_o < O
        w3 = tl.load(weight3_ptr + offs_o.to(tl.int64)[None, :] * stride_w3o + offs_c[:, None])
        part = tl.dot(middle, w3, input_precision=PRECISION)
        scale3, shift3 = _batch_norm(
            bn3_weight_ptr, bn3_bias_ptr, running_mean3_ptr, running_var3_ptr, offs_o, mask_o, eps3, BLOCK_N
        )
        part = part * scale3[None, :] + shift3[None, :]
        if shortcut_ptr is not None:
            ws_columns = shortcut_weight_ptr + offs_o.to(tl.int64) * stride_wso
            product = _product(
                shortcut_rows, ws_columns, C_SHORTCUT, 1, 1, PRECISION, True, BLOCK_M, BLOCK_N, BLOCK_K
            )
            shortcut_scale, shortcut_shift = _batch_norm(
                bn_shortcut_weight_ptr,
                bn_shortcut_bias_ptr,
                running_mean_shortcut_ptr,
                running_var_shortcut_ptr,
                offs_o,
                mask_o,
                eps_shortcut,
                BLOCK_N,
            )
            part += product * shortcut_scale[None, :] + shortcut_shift[None, :]
        if residual_ptr is not None:
            residual = tl.load(residual_rows[:, None] + offs_o[None, :], mask=mask_m, other=0.0)
            part += residual.to(tl.float32)
        y = relu(part).to(y_ptr.dtype.element_ty)
        tl.store(y_rows[:, None] + offs_o[None, :], y, mask=mask_m)
        if z_ptr is not None:
            w1 = tl.load(weight1_ptr + offs_z.to(tl.int64)[None, :] * stride_w1o + offs_o[:, None])
            acc_z = tl.dot(y, w1, acc_z, input_precision=PRECISION)
    if z_ptr is not None:
        scale1, shift1 = _batch_norm(
            bn1_weight_ptr,
            bn1_bias_ptr,
            running_mean1_ptr,
            running_var1_ptr,
            offs_z,
            offs_z < C_NEXT,
            eps1,
            C_NEXT,
        )
        z = relu(acc_z * scale1[None, :] + shift1[None, :]).to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + rows.to(tl.int64)[:, None] * C_NEXT + offs_z[None, :], z, mask=mask_m)


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


def candidate_configs(
    dtype: torch.dtype, arch: str, planes: int, *, shortcut: bool = False, following: int = 0
) -> list[dict[str, int]]:
    """Configurations that fit ``arch`` for ``planes`` inner channels, larger tiles first.

    ``shortcut``: whether a convolution gives the residual. ``following``: channels of z, or 0.
    """
    k = min(planes, 64)
    if arch == "interpreter":
        return [_tile(256, 64, k, 4, 1), _tile(64, 32, k, 4, 1)]
    if dtype == torch.float32:
        # IEEE float32 has no matrix instruction on NVIDIA: multiply-adds out of registers. With TF32 ptxas
        # spills 4 warps on sm_100 beside a shortcut, to reach an eighth CTA
        return [_tile(32, 32, 16, 8 if arch == "sm_100" and shortcut else 4, 2)]
    if arch.startswith("gfx") and following:
        # 8 warps leave each 256 registers, which y's block beside z's accumulator overflows
        return [_tile(64, 64, k, 4, 2)]
    if shortcut and following:
        # three accumulators: narrow blocks of y, or they spill; on sm_120 ptxas spills the narrow one
        return [_tile(128, 64 if arch == "sm_120" and planes <= 64 else 32, k, 8, 2), _tile(64, 32, k, 8, 2)]
    # no third stage beside what a shortcut or z hold, nor where an SM has 100 KB of shared memory
    deep = arch in ("sm_80", "sm_90", "sm_100") and not shortcut and not following
    stages = 3 if deep else 2
    # ptxas spills the one of 4 warps on sm_100 where z is twice as wide as the block
    warps = 8 if arch == "sm_100" and following > planes else 4
    return [_tile(128, 64, k, 8, stages), _tile(64, 64, k, warps, stages)]


def default_config(
    m: int, dtype: torch.dtype, arch: str, planes: int, *, shortcut: bool = False, following: int = 0
) -> dict[str, int]:
    """For ``m`` output pixels: the large tile where it still makes two waves of programs on a large GPU."""
    tiles = candidate_configs(dtype, arch, planes, shortcut=shortcut, following=following)
    return tiles[0] if ceil_div(m, tiles[0]["BLOCK_M"]) >= 256 else tiles[-1]


# weight, bias, running mean and variance, eps
_BatchNorm = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, float]


def _batch_norm_arguments(which: str, bn: _BatchNorm) -> dict[str, Any]:
    names = (f"bn{which}_weight", f"bn{which}_bias", f"running_mean{which}", f"running_var{which}")
    vectors = {f"{name}_ptr": vector for name, vector in zip(names, bn[:4], strict=True)}
    return vectors | {f"eps{which}": bn[4]}


def launch_bottleneck_fwd(
    *,
    x: torch.Tensor,  # [N, C, H, W], channels contiguous, as in every tensor here
    weight2: torch.Tensor,  # [C, C, 3, 3]
    bn2: _BatchNorm,
    weight3: torch.Tensor,  # [O, C, 1, 1]
    bn3: _BatchNorm,
    stride: tuple[int, int],
    residual: torch.Tensor | None,  # [N, O, OH, OW]
    shortcut: torch.Tensor | None,  # [N, C_SHORTCUT, HS, WS]
    shortcut_weight: torch.Tensor | None,  # [O, C_SHORTCUT, 1, 1]
    shortcut_bn: _BatchNorm,
    shortcut_stride: tuple[int, int],
    weight1: torch.Tensor | None,  # [C_NEXT, O, 1, 1]
    bn1: _BatchNorm,
    y: torch.Tensor,  # [N, O, OH, OW], channels_last
    z: torch.Tensor | None,  # [N, C_NEXT, OH, OW], channels_last
    config: dict[str, int],
) -> None:
    N, C, H, W = x.shape
    _, O, OH, OW = y.shape  # noqa: E741
    M = N * OH * OW
    residual_strides = (0, 0, 0, 0) if residual is None else residual.stride()
    stride_sn, _, stride_sh, stride_sw = (0, 0, 0, 0) if shortcut is None else shortcut.stride()
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "weight2_ptr": weight2,
        **_batch_norm_arguments("2", bn2),
        "weight3_ptr": weight3,
        **_batch_norm_arguments("3", bn3),
        "residual_ptr": residual,
        "shortcut_ptr": shortcut,
        "shortcut_weight_ptr": shortcut_weight,
        **_batch_norm_arguments("_shortcut", shortcut_bn),
        "weight1_ptr": weight1,
        **_batch_norm_arguments("1", bn1),
        "y_ptr": y,
        "z_ptr": z,
        "M": M,
        "O": O,
        "H": H,
        "W": W,
        "OH": OH,
        "OW": OW,
        "stride_xn": x.stride(0),
        "stride_xh": x.stride(2),
        "stride_xw": x.stride(3),
        "stride_w2o": weight2.stride(0),
        "stride_w2h": weight2.stride(2),
        "stride_w2w": weight2.stride(3),
        "stride_w3o": weight3.stride(0),
        "stride_rn": residual_strides[0],
        "stride_rh": residual_strides[2],
        "stride_rw": residual_strides[3],
        "stride_sn": stride_sn,
        "stride_sh": shortcut_stride[0] * stride_sh,
        "stride_sw": shortcut_stride[1] * stride_sw,
        "stride_wso": 0 if shortcut_weight is None else shortcut_weight.stride(0),
        "stride_w1o": 0 if weight1 is None else weight1.stride(0),
        "stride_h": stride[0],
        "stride_w": stride[1],
        "PRECISION": dot_precision(x.dtype, convolution=True),
        "C": C,
        "C_SHORTCUT": 0 if shortcut is None else shortcut.shape[1],
        "C_NEXT": 0 if z is None else z.shape[1],
        "RESIDUAL_ROWS": residual is not None and pixel_rows(residual),
        "SHORTCUT_ROWS": shortcut is not None and shortcut_stride == (1, 1) and pixel_rows(shortcut),
    }
    launch(_bottleneck_fwd_kernel, (ceil_div(M, config["BLOCK_M"]),), config, **arguments)
