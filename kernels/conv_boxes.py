"""`conv_bn_relu.py`'s function where tensor descriptors can read its operands: boxes of pixels by TMA.

A block of x is a box of images, rows and columns of one tap's channels, at (n, h + kh - pad, w + kw - pad,
c): the copy engine's zero fill is the padding, and there are no masks and no pointers. A stride is part of
the view: row h of the image is (h // stride, h % stride), so that a tap reads every stride-th as a dense box.
Boxes divide the map (8 x 8 of 56 x 56, 2 x 2 of 14 x 14, single pixels of 7 x 7) and take as many images as
fill a tile, so that nothing is computed beside it but for a batch's end. A window of one pixel reads the
batch's pixels as one list.

The product is weight @ x.T, [channels, pixels]: of a left operand that was reshaped Triton 3.6 to 3.9 make
registers on sm_90, but leave the right one in shared memory, where the copy put it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvr.kernels.common import ceil_div, dot_precision, launch, swizzle, tma_descriptor
from fastvr.kernels.conv_bn_relu import _halves, _pixels, epilogue_arguments, finish_pixels, pixel_rows


@triton.jit(do_not_specialize=["N", "H", "W", "OH", "OW"])
def _conv_boxes_fwd_kernel(
    x,  # descriptor of [N, rows, STRIDE_H, columns, STRIDE_W * C], blocks [BOX_N, BOX_H, 1, BOX_W, BLOCK_K]
    weight,  # descriptor of [O, KH * KW * C], blocks [BLOCK_N, BLOCK_K]
    bn_weight_ptr,  # [O] or None
    bn_bias_ptr,  # [O] or None
    running_mean_ptr,  # [O] or None: bn_weight and bn_bias are scale and shift themselves
    running_var_ptr,  # [O] or None
    residual_ptr,  # [N, O, OH, OW], any strides, or None
    y_ptr,  # [N, O, OH, OW], channels_last
    N,  # N, H and W of the result: as it is, or all of its pixels as so many images of one
    H,
    W,
    C,
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
    PRECISION: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    CHANNELS: tl.constexpr,  # C, where K is split into tap and channel
    RESIDUAL_ROWS: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,  # BOX_N * BOX_H * BOX_W
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):
    boxes_h = H // BOX_H
    boxes_w = W // BOX_W
    num_m = tl.cdiv(N, BOX_N) * boxes_h * boxes_w
    pid_m, pid_n = swizzle(tl.program_id(0), num_m, tl.cdiv(O, BLOCK_N), GROUP_M)
    first_n = pid_m // (boxes_h * boxes_w) * BOX_N
    first_h = pid_m // boxes_w % boxes_h * BOX_H
    first_w = pid_m % boxes_w * BOX_W

    # whole strides that the padding begins before the image, so that no division sees a negative number
    BEFORE_H: tl.constexpr = (PAD_H + STRIDE_H - 1) // STRIDE_H
    BEFORE_W: tl.constexpr = (PAD_W + STRIDE_W - 1) // STRIDE_W
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, KH * KW * C, BLOCK_K):
        channel = start
        row = BEFORE_H * STRIDE_H - PAD_H
        column = BEFORE_W * STRIDE_W - PAD_W
        if KH * KW > 1:
            tap = start // CHANNELS
            channel = start % CHANNELS
            row += tap // KW
            column += tap % KW
        box = x.load(
            [
                first_n,
                first_h + row // STRIDE_H - BEFORE_H,
                row % STRIDE_H,
                first_w + column // STRIDE_W - BEFORE_W,
                column % STRIDE_W * C + channel,
            ]
        )
        w = weight.load([pid_n * BLOCK_N, start])
        acc = tl.dot(w, tl.reshape(box, (BLOCK_M, BLOCK_K)).T, acc, input_precision=PRECISION)

    offs = tl.arange(0, BLOCK_M)
    image = first_n + offs // (BOX_H * BOX_W)
    inside = image < N
    pixel = (first_h + offs // BOX_W % BOX_H) * W + first_w + offs % BOX_W
    # the op keeps their number below 2^31
    rows = tl.minimum(image, N - 1) * (H * W) + pixel
    residual_rows = residual_ptr
    if residual_ptr is not None:
        residual_rows = _pixels(
            residual_ptr, rows, OH, OW, stride_rn, stride_rh, stride_rw, ROWS=RESIDUAL_ROWS
        )
    y_rows = y_ptr + rows.to(tl.int64) * stride_ym
    left, right = _halves(acc.T, BLOCK_M, BLOCK_N)
    for half in tl.static_range(2):
        finish_pixels(
            left if half == 0 else right, y_rows, residual_rows, inside, 0,
            pid_n * BLOCK_N + half * (BLOCK_N // 2), O, bn_weight_ptr, bn_bias_ptr, running_mean_ptr,
            running_var_ptr, stride_rc, eps, ACT, BLOCK_N // 2,
        )  # fmt: skip


def takes_boxes(x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], groups: int) -> bool:
    """Whether descriptors can read a convolution's operands: 16 bits, NHWC memory whose pixels begin at
    multiples of 16 bytes, whole blocks of 64 channels and whole strides."""
    outer = [step for d, step in enumerate(x.stride()) if d != 1]
    return (
        groups == 1
        and x.dtype == weight.dtype
        and x.dtype.itemsize == 2
        and x.shape[1] % 64 == 0
        and x.shape[2] % stride[0] == 0
        and x.shape[3] % stride[1] == 0
        and x.stride(1) == 1
        # an expanded dimension has no stride of its own, and TMA knows no step of 0
        and all(step % 8 == 0 and step > 0 for step in outer)
        and x.data_ptr() % 16 == 0
        and weight.data_ptr() % 16 == 0
        and weight.permute(0, 2, 3, 1).is_contiguous()
    )


def _box(block_m: int, height: int, width: int) -> tuple[int, int, int]:
    """Images, rows and columns of a box of ``block_m`` pixels that divides a map of height x width."""
    # the largest powers of two that divide them
    rows, columns = height & -height, width & -width
    while rows * columns > block_m:
        if rows >= columns:
            rows //= 2
        else:
            columns //= 2
    return block_m // (rows * columns), rows, columns


def launch_conv_boxes_fwd(
    *,
    x: torch.Tensor,  # [N, C, H, W]; with weight as `takes_boxes` says
    weight: torch.Tensor,  # [O, C, KH, KW]
    y: torch.Tensor,  # [N, O, OH, OW], channels_last
    stride: tuple[int, int],
    padding: tuple[int, int],
    config: dict[str, int],
    **epilogue: Any,  # of `epilogue_arguments`
) -> None:
    N, O, H, W = y.shape  # noqa: E741
    C, KH, KW = weight.shape[1:]
    n, c, h, w = x.stride()
    shape = [N, x.shape[2] // stride[0], stride[0], x.shape[3] // stride[1], stride[1] * C]
    strides = [n, stride[0] * h, h, stride[1] * w, c]
    if KH == KW == 1 and stride == (1, 1) and padding == (0, 0) and pixel_rows(x):
        # one list of pixels
        N, H, W = N * H * W, 1, 1
        shape, strides = [N, 1, 1, 1, C], [w, w, w, w, c]
    box_n, box_h, box_w = _box(config["BLOCK_M"], H, W)
    matrix = weight.permute(0, 2, 3, 1).view(O, -1)
    arguments: dict[str, Any] = {
        "x": TensorDescriptor(x, shape, strides, [box_n, box_h, 1, box_w, config["BLOCK_K"]]),
        "weight": tma_descriptor(matrix, (config["BLOCK_N"], config["BLOCK_K"])),
        "N": N,
        "H": H,
        "W": W,
        "C": C,
        "O": O,
        "PRECISION": dot_precision(x.dtype, convolution=True),
        "KH": KH,
        "KW": KW,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "CHANNELS": 0 if KH == KW == 1 else C,
        "BOX_N": box_n,
        "BOX_H": box_h,
        "BOX_W": box_w,
    }
    boxes = ceil_div(N, box_n) * (H // box_h) * (W // box_w)
    grid = (boxes * ceil_div(O, config["BLOCK_N"]),)
    launch(_conv_boxes_fwd_kernel, grid, config, **arguments, **epilogue_arguments(y=y, **epilogue))
