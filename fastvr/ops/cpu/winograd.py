"""3x3 convolutions of stride 1 on a CPU by Winograd's minimal filtering, in float32.

A tile of 2x2 pixels of the result takes 16 products a pair of channels instead of 36, one of 4x2 pixels 24
instead of 72. They are one convolution over that many groups of channels, which oneDNN does, between two
transforms, each a product with one small matrix.

In float32 the error of 2x2 is smaller than the direct sum's, since each result is made of sums of C terms,
not of 9 C (three quarters of oneDNN's RMS error were seen); that of 4x2 is a quarter larger, with the points
0, +-5/8, +-3/2 and infinity, which of their kind have the least. 4x4 would take fewer products still, and
twice the error.

An Inf or NaN reaches every pixel of the tiles that read it, up to three rows and one column further than the
window does, where an Inf may become NaN; other samples never see it.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016; points and errors: Barabasz,
Anderson, Soodhalter and Gregg, Error Analysis and Improving the Accuracy of Winograd Convolution, 2020.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from fastvr.ops.cpu.layouts import Layouts
from fastvr.ops.cpu.magnitude import Gain

if TYPE_CHECKING:
    from fastvr.ops.cpu.mkldnn import Packed

# rows and columns of the result that are computed together
TILES = ((2, 2), (4, 2))

# where the polynomials for so many pixels in a row are evaluated, beside infinity; short enough in binary
# that the transforms' numbers are exact in float32
_POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
}

# of fewer terms the direct sum is the more exact one, as it is on maps so small that many of its terms are
# padding
_LEAST_CHANNELS = {(2, 2): 16, (4, 2): 64}
_LEAST_EXTENT = {(2, 2): 1, (4, 2): 5}

# transformed numbers at once, of which several copies live: as many as stay in a shared cache, and as the
# allocator hands out again without asking the system for pages
_NUMBERS = 2**21


@dataclasses.dataclass(frozen=True)
class Winograd:
    """A transformed 3x3 weight, times ``scale``, that gives ``tile`` pixels at once; ``shift`` comes later.

    ``layouts``: [points * O, C, 1, 1] as oneDNN reads it. ``direct``: the weight for maps that are too small.
    ``gain`` says how large the results can be.
    """

    name: ClassVar[str] = "winograd"

    layouts: Layouts
    out_channels: int
    tile: tuple[int, int]
    direct: Packed
    gain: Gain
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def fits(self, size: Sequence[int], padding: Sequence[int]) -> bool:
        """Whether its error on an x of ``size`` is one that ``tile`` was taken for."""
        return min(_extent(size, padding)) >= _LEAST_EXTENT[self.tile]


class _Sides(NamedTuple):
    """What a filter, a tile of the image and the products of both are multiplied by."""

    filter: torch.Tensor  # [points, 3]
    image: torch.Tensor  # [points, points]
    result: torch.Tensor  # [pixels, points]


def takes(
    weight: torch.Tensor,
    tile: tuple[int, int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    size: Sequence[int],
) -> bool:
    return (
        weight.dtype == torch.float32
        and tuple(weight.shape[2:]) == (3, 3)
        and tuple(stride) == (1, 1)
        and groups == 1
        and max(padding) <= 1
        and weight.shape[1] >= _LEAST_CHANNELS[tile]
        and min(_extent(size, padding)) >= _LEAST_EXTENT[tile]
    )


def pack(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    tile: tuple[int, int],
    padding: Sequence[int],
    size: Sequence[int],
    direct: Packed,
) -> Winograd:
    """``scale`` [O] times ``weight`` [O, C, 3, 3], transformed in float64 and rounded once, laid out for an x
    of ``size`` [N, C, H, W]; any may come. ``direct`` is the same for the direct sum."""
    # without the attributes of a Parameter, which will lead here
    weight, points, (n, c) = weight.detach(), _points(tile), size[:2]

    def reorder(size: Sequence[int]) -> torch.Tensor:
        wide = weight.double()
        if scale is not None:
            wide = wide * scale.double()[:, None, None, None]
        rows, columns = (_sides(pixels).filter for pixels in tile)
        transformed = torch.einsum("ak,oikl,bl->aboi", rows, wide, columns).float().reshape(-1, c, 1, 1)
        layout: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            transformed, [0, 0], [1, 1], [1, 1], points, list(size)
        )
        return layout

    tiles = _tiles(_extent(size, padding), tile)
    images = -(-n // _parts(n, tiles, points, max(weight.shape[:2])))
    layouts = Layouts(reorder, (1, points * c, images * tiles[0] * tiles[1], 1))
    return Winograd(layouts, weight.shape[0], tile, direct, Gain.of(weight, scale, shift), scale, shift)


def conv_bn_relu(
    x: torch.Tensor, packed: Winograd, padding: Sequence[int], act: str, residual: torch.Tensor | None
) -> torch.Tensor:
    """``act(conv(x) * scale + shift + residual)`` of x [N, C, H, W] in any layout, channels_last."""
    n, c, *_ = x.shape
    extent = _extent(x.shape, padding)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(n, *extent, packed.out_channels, dtype=dtype)
    if y.numel():
        tiles = _tiles(extent, packed.tile)
        parts = _parts(n, tiles, _points(packed.tile), max(c, packed.out_channels))
        added = [None] * parts if residual is None else residual.permute(0, 2, 3, 1).tensor_split(parts)
        for images, found, more in zip(x.tensor_split(parts), y.tensor_split(parts), added, strict=True):
            pixels = _convolve(images, packed, padding, tiles)[:, : extent[0], : extent[1]]
            if more is not None:
                pixels = torch.add(pixels, more, out=found)
            if act == "relu":
                torch.clamp_min(pixels, 0, out=found)
            elif more is None:
                found.copy_(pixels)
    return y.permute(0, 3, 1, 2)


def _convolve(
    x: torch.Tensor, packed: Winograd, padding: Sequence[int], tiles: tuple[int, int]
) -> torch.Tensor:
    """[N, rows, columns, O] of whole tiles."""
    n, c, height, width = x.shape
    (h, w), (rows, columns), o = tiles, packed.tile, packed.out_channels
    to_points, to_pixels = _both_sides(packed.tile)
    # tiles overlap by two rows and two columns
    image = x.new_zeros(n, h * rows + 2, w * columns + 2, c)
    image[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = x.permute(0, 2, 3, 1)
    patches = image.unfold(1, rows + 2, rows).unfold(2, columns + 2, columns).permute(0, 1, 2, 4, 5, 3)
    count = n * h * w
    points = torch.bmm(to_points.expand(count, -1, -1), patches.reshape(count, -1, c))
    # a map of one column, whose channels are the points' of each tile
    channels = points.view(1, count, 1, -1).permute(0, 3, 1, 2)
    products = torch.ops.mkldnn._convolution_pointwise(
        channels,
        packed.layouts.of(channels.shape),
        None,
        [0, 0],
        [1, 1],
        [1, 1],
        len(to_points),
        "none",
        [],
        "",
    )
    products = products.permute(0, 2, 3, 1).view(count, -1, o)
    matrix = to_pixels.expand(count, -1, -1)
    if packed.shift is None:
        pixels = torch.bmm(matrix, products)
    else:
        pixels = torch.baddbmm(packed.shift.to(x.dtype).expand(count, rows * columns, o), matrix, products)
    return pixels.view(n, h, w, rows, columns, o).transpose(2, 3).reshape(n, h * rows, w * columns, o)


def _points(tile: tuple[int, int]) -> int:
    """How many products a tile takes for a pair of channels."""
    return (tile[0] + 2) * (tile[1] + 2)


def _extent(size: Sequence[int], padding: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the result of an x of ``size``."""
    return size[2] + 2 * padding[0] - 2, size[3] + 2 * padding[1] - 2


def _tiles(extent: Sequence[int], tile: tuple[int, int]) -> tuple[int, int]:
    return -(-extent[0] // tile[0]), -(-extent[1] // tile[1])


def _parts(images: int, tiles: tuple[int, int], points: int, channels: int) -> int:
    """In how many parts a batch is computed; of one image at least."""
    return max(min(-(-images * tiles[0] * tiles[1] * points * channels // _NUMBERS), images), 1)


@functools.cache
def _both_sides(tile: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The transforms of a tile of the image and of the products, rows and columns in one matrix each."""
    rows, columns = (_sides(pixels) for pixels in tile)
    return torch.kron(rows.image, columns.image).float(), torch.kron(rows.result, columns.result).float()


@functools.cache
def _sides(pixels: int) -> _Sides:
    """The transforms along one dimension, by Toom and Cook: polynomials of degree ``pixels - 1`` and 2 are
    multiplied by their values at as many points as the product has coefficients, and the whole transposed."""
    points = _POINTS[pixels]
    others = [[b for b in points if b != a] for a in points]
    image = [[*_coefficients(roots), Fraction(0)] for roots in others]
    filters = [
        [a**k / math.prod(a - b for b in roots) for k in range(3)]
        for a, roots in zip(points, others, strict=True)
    ]
    result = [[*(a**k for a in points), 0] for k in range(pixels)]
    # infinity: the highest coefficients alone
    image.append(_coefficients(points))
    filters.append([Fraction(0), Fraction(0), Fraction(1)])
    result[-1][-1] = 1
    sides = ([[float(value) for value in row] for row in side] for side in (filters, image, result))
    return _Sides(*(torch.tensor(side, dtype=torch.float64) for side in sides))


def _coefficients(roots: Sequence[Fraction]) -> list[Fraction]:
    """Of the polynomial with these roots, from the constant one."""
    found, zero = [Fraction(1)], Fraction(0)
    for root in roots:
        found = [low - root * high for low, high in zip([zero, *found], [*found, zero], strict=True)]
    return found
