"""3x3 convolutions of stride 1 on a CPU by Winograd's minimal filtering, F(2x2, 3x3), in float32.

Each 2x2 tile of the result takes 16 products a pair of channels instead of 36, as 16 matrix products over
channels between two transforms that only add. In float32 its error is no larger than the direct sum's: each
result is made of sums of C terms, not of 9 C (a half to three quarters of oneDNN's RMS error was seen).

An Inf or NaN reaches every pixel of the tiles that read it, up to one pixel further than the window does,
where an Inf may become NaN; other samples never see it.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from fastvr.ops.cpu.magnitude import Gain

# what a filter is multiplied by from both sides; the other two transforms are written out below
_FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))

# of fewer terms the direct sum is the more exact one
_LEAST_CHANNELS = 16

# transformed numbers at once, of which several copies live: as many as stay in a shared cache, and as the
# allocator hands out again without asking the system for pages
_POINTS = 2**21


@dataclasses.dataclass(frozen=True)
class Winograd:
    """A transformed 3x3 weight, ``points`` [16, C, O], times ``scale``; ``shift`` is added later.

    ``gain`` says how large the results can be.
    """

    name: ClassVar[str] = "winograd"

    points: torch.Tensor
    gain: Gain
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None


def takes(weight: torch.Tensor, stride: Sequence[int], groups: int) -> bool:
    return (
        weight.dtype == torch.float32
        and tuple(weight.shape[2:]) == (3, 3)
        and tuple(stride) == (1, 1)
        and groups == 1
        and weight.shape[1] >= _LEAST_CHANNELS
    )


def pack(weight: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None) -> Winograd:
    """``scale`` [O] times ``weight`` [O, C, 3, 3], transformed in float64 and rounded once."""
    wide, sides = weight.detach().double(), weight.new_tensor(_FILTER, dtype=torch.float64)
    if scale is not None:
        wide = wide * scale.double()[:, None, None, None]
    points = torch.einsum("ak,oikl,bl->abio", sides, wide, sides).flatten(0, 1)
    return Winograd(points.to(weight.dtype).contiguous(), Gain.of(weight, scale, shift), scale, shift)


def conv_bn_relu(
    x: torch.Tensor, packed: Winograd, padding: Sequence[int], act: str, residual: torch.Tensor | None
) -> torch.Tensor:
    """``act(conv(x) * scale + shift + residual)`` of x [N, C, H, W] in any layout, channels_last."""
    n, c, height, width = x.shape
    oh, ow = height + 2 * padding[0] - 2, width + 2 * padding[1] - 2
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(n, oh, ow, packed.points.shape[2], dtype=dtype)
    points = 16 * -(-oh // 2) * -(-ow // 2) * max(c, y.shape[3])
    parts = max(-(-n * points // _POINTS), 1)
    added = [None] * parts if residual is None else residual.permute(0, 2, 3, 1).tensor_split(parts)
    for images, found, more in zip(x.tensor_split(parts), y.tensor_split(parts), added, strict=True):
        _convolve(images, packed, padding, found)
        if more is not None:
            found += more
        if act == "relu":
            found.relu_()
    return y.permute(0, 3, 1, 2)


def _convolve(x: torch.Tensor, packed: Winograd, padding: Sequence[int], y: torch.Tensor) -> None:
    """``y`` [N, OH, OW, O] from x."""
    n, c, height, width = x.shape
    _, oh, ow, o = y.shape
    h, w = -(-oh // 2), -(-ow // 2)
    # [N, 2 h + 2, 2 w + 2, C]: tiles of 4x4 pixels every second row and column
    image = x.new_zeros(n, 2 * h + 2, 2 * w + 2, c)
    image[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = x.permute(0, 2, 3, 1)
    rows = _apart(x.new_empty(4, n, h, 2 * w + 2, c), [image[:, k : k + 2 * h : 2] for k in range(4)])
    both = x.new_empty(4, 4, n, h, w, c)
    _apart(both.transpose(0, 1), [rows[:, :, :, k : k + 2 * w : 2] for k in range(4)])
    products = torch.bmm(both.view(16, n * h * w, c), packed.points).view(4, 4, n, h, w, o)
    if packed.shift is not None:
        # the one point that goes into each pixel of a tile once
        products[1, 1] += packed.shift
    halves = _together(x.new_empty(2, 4, n, h, w, o), products)
    for row in range(2):
        for column in range(2):
            # the last tile of an odd size has one row or column too many
            pixels = y[:, row::2, column::2]
            _one(pixels, [half[:, : pixels.shape[1], : pixels.shape[2]] for half in halves[row]], column)


def _apart(out: torch.Tensor, lines: Sequence[torch.Tensor]) -> torch.Tensor:
    """An image's transform along one dimension: out[k] from the k-th lines of each tile."""
    torch.sub(lines[0], lines[2], out=out[0])
    torch.add(lines[1], lines[2], out=out[1])
    torch.sub(lines[2], lines[1], out=out[2])
    torch.sub(lines[1], lines[3], out=out[3])
    return out


def _together(out: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The result's transform along one dimension, from four points to two."""
    for line in range(2):
        _one(out[line], list(points), line)
    return out


def _one(out: torch.Tensor, points: Sequence[torch.Tensor], line: int) -> None:
    if line == 0:
        torch.add(points[0], points[1], out=out).add_(points[2])
    else:
        torch.sub(points[1], points[2], out=out).sub_(points[3])
