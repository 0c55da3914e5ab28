"""Convolution, BatchNorm, ReLU and 3x3 max pooling by 2 in one launch: the stem of a ResNet.

y = max over the window of relu(bn(conv(x))); the map in between, four times as large as y, is never written.

A program makes a strip of ROWS rows and BLOCK_M - 1 columns of y. It walks down the map's rows, two implicit
GEMMs each, for the map's even and its odd columns, BatchNorm applied to their float32 accumulators as in
``conv_bn_relu``. A window is the even column, the odd one and the odd one before, which is the neighbouring
lane's: only the first lane works for its neighbour alone. An odd row's maximum is carried down to the window
below; only a strip's first row is computed for that alone. So 16 lanes and 7 rows compute
16 / 15 * 15 / 14 = 1.14 of the map (1.22 where 56 columns take four programs), where each window by itself
would compute 9 / 4. ReLU and rounding commute with the maximum and come last.

A stem's window has too few channels for wide loads: it loads element by element, and so is bound neither by
tensor cores nor by memory but by issue slots. So the weight is loaded once a program and kept, an element's
address is one addition, the odd column's is the same plus a constant, and one comparison masks an element. As
compiled for sm_90 (16 lanes, 4 warps; a model's figure, not a measurement) an image of 224 pixels takes 1.3
million issue slots, where the two launches apart take 3.3 and 0.4 million, and 0.7 MB instead of 3.9.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastvr.kernels.activations import relu
from fastvr.kernels.common import ceil_div, dot_precision, launch, normalize
from fastvr.kernels.conv_bn_relu import _batch_norm, _window_offsets


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _taps(
    pointers,  # [BLOCK_M, BLOCK_K]
    columns,  # [BLOCK_M, BLOCK_K] of the image; what lies before it lies, as unsigned numbers, far behind it
    limit,  # [BLOCK_K] W, or 0 where the row lies outside
    mean,  # [BLOCK_K] of uint8 images, or None
    std,
    dtype: tl.constexpr,
):
    mask = columns.to(tl.uint32) < limit.to(tl.uint32)[None, :]
    x = tl.load(pointers, mask=mask, other=0)
    if mean is not None:
        x = normalize(x, mean[None, :], std[None, :], dtype == tl.float32)
        x = tl.where(mask, x, 0.0).to(dtype)
    return x


# sizes of the image matter to nothing but divisions: one binary for every batch and resolution
@triton.jit(do_not_specialize=["H", "W", "OH", "OW", "PH", "PW"])
def _conv_bn_relu_max_pool_fwd_kernel(
    x_ptr,  # [N, C, H, W], any strides; uint8 with mean and std
    weight_ptr,  # [O, C, KH, KW], any strides
    bn_weight_ptr,  # [O] or None
    bn_bias_ptr,  # [O] or None
    running_mean_ptr,  # [O] or None: bn_weight and bn_bias are scale and shift themselves
    running_var_ptr,  # [O] or None
    mean_ptr,  # [C] of uint8 x, or None
    std_ptr,
    y_ptr,  # [N, O, PH, PW], channels_last
    O,  # noqa: E741
    H,
    W,
    OH,  # of the convolution
    OW,
    PH,
    PW,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wo,
    stride_wc,
    stride_wh,
    stride_ww,
    stride_h,  # of the convolution
    pad_h,
    pad_w,
    eps,
    PRECISION: tl.constexpr,
    STRIDE_W: tl.constexpr,  # what lies a step further needs no address of its own
    KH: tl.constexpr,
    KW: tl.constexpr,
    CHANNELS: tl.constexpr,  # C
    ROWS: tl.constexpr,  # of y that a program makes
    BLOCK_M: tl.constexpr,  # columns of y, one more than it makes
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_n = tl.cdiv(O, BLOCK_N)
    num_m = tl.cdiv(PW, BLOCK_M - 1)
    strips = tl.cdiv(PH, ROWS)
    pid = tl.program_id(0)
    offs_n = pid % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < O
    # the first lane makes no column of y: it only hands its odd column of the map to its neighbour
    lane = tl.arange(0, BLOCK_M)
    column = pid // num_n % num_m * (BLOCK_M - 1) + lane - 1
    first = pid // (num_n * num_m) % strips * ROWS
    image = (pid // (num_n * num_m * strips)).to(tl.int64)
    stored = (lane > 0) & (column < PW)

    left = 2 * column * STRIDE_W - pad_w
    lane_offs = left * stride_xw
    w_columns = weight_ptr + tl.minimum(offs_n, O - 1).to(tl.int64) * stride_wo
    even_inside = (column >= 0) & (2 * column < OW)
    odd_inside = (column >= 0) & (2 * column + 1 < OW)
    neighbour = tl.broadcast_to(tl.maximum(lane - 1, 0)[:, None], (BLOCK_M, BLOCK_N))
    K: tl.constexpr = KH * KW * CHANNELS
    offs_k = tl.arange(0, BLOCK_K)
    # the weight stays where it is for all rows
    weights = ()
    for start in tl.static_range(0, K, BLOCK_K):
        offs = start + offs_k
        tap = offs // CHANNELS
        w_offs = _window_offsets(offs % CHANNELS, tap // KW, tap % KW, stride_wc, stride_wh, stride_ww)
        w = tl.load(w_columns[None, :] + w_offs[:, None], mask=(offs < K)[:, None], other=0.0)
        # Triton knows no starred expression
        weights = weights + (w,)  # type: ignore[assignment]  # noqa: RUF005

    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    for t in range(2 * ROWS + 1):
        row = 2 * first - 1 + t
        top = row * stride_h - pad_h
        x_lanes = x_ptr + image * stride_xn + tl.cast(top, tl.int64) * stride_xh + lane_offs
        acc_even = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_odd = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in tl.static_range(0, (K + BLOCK_K - 1) // BLOCK_K):
            offs = block * BLOCK_K + offs_k
            channels = offs % CHANNELS
            kh = offs // CHANNELS // KW
            kw = offs // CHANNELS % KW
            inside = offs < K
            mean = None
            std = None
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + channels, mask=inside, other=0.0)
                std = tl.load(std_ptr + channels, mask=inside, other=1.0)
            # one comparison an element, and none that the compiler would keep in registers for all rows
            row_inside = ((top + kh).to(tl.uint32) < H.to(tl.uint32)) & inside
            limit = tl.where(row_inside, W, 0)
            pointers = x_lanes[:, None] + (channels * stride_xc + kh * stride_xh + kw * stride_xw)[None, :]
            columns = left[:, None] + kw[None, :]
            w = weights[block]
            x = _taps(pointers, columns, limit, mean, std, w.dtype)
            acc_even = tl.dot(x, w, acc_even, input_precision=PRECISION)
            x = _taps(pointers + STRIDE_W * stride_xw, columns + STRIDE_W, limit, mean, std, w.dtype)
            acc_odd = tl.dot(x, w, acc_odd, input_precision=PRECISION)
        # read again for each row: all of a tile's columns would stay in registers
        scale, shift = _batch_norm(
            bn_weight_ptr, bn_bias_ptr, running_mean_ptr, running_var_ptr, offs_n, mask_n, eps, BLOCK_N
        )
        row_inside = (row >= 0) & (row < OH)
        values = acc_even * scale[None, :] + shift[None, :]
        row_best = tl.where((row_inside & even_inside)[:, None], values, float("-inf"))
        values = acc_odd * scale[None, :] + shift[None, :]
        values = tl.where((row_inside & odd_inside)[:, None], values, float("-inf"))
        row_best = _maximum(row_best, values)
        # rounding and the maximum commute
        before = tl.gather(values.to(y_ptr.dtype.element_ty), neighbour, 0).to(tl.float32)
        row_best = _maximum(row_best, before)
        best = _maximum(best, row_best)
        if t % 2 == 0:
            # an odd row: the window's last, and the next one's first
            pooled = first + t // 2 - 1
            if (t > 0) & (pooled < PH):
                y_row = y_ptr + ((image * PH + pooled) * PW) * O
                y_ptrs = y_row + (column * O)[:, None] + offs_n[None, :]
                y = relu(best).to(y_ptr.dtype.element_ty)
                tl.store(y_ptrs, y, mask=stored[:, None] & mask_n[None, :])
            best = row_best


def _tile(m: int, n: int, k: int, num_warps: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": num_warps, "num_stages": 1}


def candidate_configs(dtype: torch.dtype, arch: str, *, uint8: bool = False) -> list[dict[str, int]]:
    """Configurations that fit ``arch``: tall strips first, last a short one, for few images.

    ``uint8``: images of bytes, to be normalised.
    """
    if arch == "interpreter":
        return [_tile(64, 64, 256, 4) | {"ROWS": 4}, _tile(16, 32, 64, 4) | {"ROWS": 1}]
    if arch.startswith("gfx"):
        tiles = [_tile(32, 32, 16, 4) if dtype == torch.float32 else _tile(64, 64, 32, 4)]
    elif dtype == torch.float32:
        # every byte is converted, with its mask still at hand: fewer at once, or they spill
        tiles = [_tile(16, 64, 32, 8) if uint8 else _tile(16, 64, 16, 4)]
    else:
        # each step waits for its loads and at a barrier: three programs an SM, of few registers, hide it
        tiles = [_tile(16, 64, 32, 4)]
        if not uint8 and arch not in ("sm_80", "sm_120"):
            # fewer instructions, but two programs an SM; it spills on the others
            tiles.append(_tile(32, 64, 32, 4))
    return [*(tile | {"ROWS": 7} for tile in tiles), tiles[0] | {"ROWS": 2}]


def default_config(
    n: int, ph: int, pw: int, dtype: torch.dtype, arch: str, *, uint8: bool = False
) -> dict[str, int]:
    """For ``n`` images of ``ph`` x ``pw`` pooled pixels: tall strips where they still make two waves of
    programs on a large GPU (and in the interpreter, which takes time by the program)."""
    tall, *_, short = candidate_configs(dtype, arch, uint8=uint8)
    programs = n * ceil_div(ph, tall["ROWS"]) * ceil_div(pw, tall["BLOCK_M"] - 1)
    return tall if programs >= 256 or arch == "interpreter" else short


def launch_conv_bn_relu_max_pool_fwd(
    *,
    x: torch.Tensor,  # [N, C, H, W], any strides
    weight: torch.Tensor,  # [O, C, KH, KW], any strides
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    mean: torch.Tensor | None,  # [C] of uint8 x
    std: torch.Tensor | None,
    y: torch.Tensor,  # [N, O, PH, PW], channels_last
    map_size: tuple[int, int],  # of the convolution
    stride: tuple[int, int],
    padding: tuple[int, int],
    eps: float,
    config: dict[str, int],
) -> None:
    N, _, H, W = x.shape
    O, C, KH, KW = weight.shape  # noqa: E741
    PH, PW = y.shape[2:]
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bn_weight_ptr": bn_weight,
        "bn_bias_ptr": bn_bias,
        "running_mean_ptr": running_mean,
        "running_var_ptr": running_var,
        "mean_ptr": mean,
        "std_ptr": std,
        "y_ptr": y,
        "O": O,
        "H": H,
        "W": W,
        "OH": map_size[0],
        "OW": map_size[1],
        "PH": PH,
        "PW": PW,
        **{f"stride_x{d}": s for d, s in zip("nchw", x.stride(), strict=True)},
        **{f"stride_w{d}": s for d, s in zip("ochw", weight.stride(), strict=True)},
        "stride_h": stride[0],
        "pad_h": padding[0],
        "pad_w": padding[1],
        "eps": eps,
        "PRECISION": dot_precision(weight.dtype, convolution=True),
        "STRIDE_W": stride[1],
        "KH": KH,
        "KW": KW,
        "CHANNELS": C,
    }
    strips = ceil_div(PH, config["ROWS"]) * ceil_div(PW, config["BLOCK_M"] - 1)
    grid = (N * strips * ceil_div(O, config["BLOCK_N"]),)
    launch(_conv_bn_relu_max_pool_fwd_kernel, grid, config, **arguments)
