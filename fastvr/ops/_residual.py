"""What residual_block and its gradient share: their arguments as layers, the steps between convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops.batch_norm_act import measure, normalise
from fastvr.ops.conv_bn_relu import CONV_BN_RELU, empty_result, gathered, output_size, table_key
from fastvr.ops.conv_bn_relu import Arguments as Convolution
from fastvr.reference.residual_block import Layer

# Input channels up to which the product of a 1x1 convolution is made again
_AGAIN = 64
MOST = 3  # convolutions of a branch
_MANY = 128  # pixels from which no configuration splits K


class Statistics(NamedTuple):
    """Mean and biased variance of each channel, [C], float32 (float64 for float64)."""

    mean: torch.Tensor
    var: torch.Tensor


def made(shape: Sequence[int], layer: Layer) -> tuple[int, int, int, int]:
    o, _, kh, kw = layer.weight.shape
    height, width = (
        output_size(n, k, layer.stride, layer.padding) for n, k in zip(shape[2:], (kh, kw), strict=True)
    )
    return shape[0], o, height, width


class Arguments(NamedTuple):
    x: torch.Tensor
    weight1: torch.Tensor
    bn_weight1: torch.Tensor
    bn_bias1: torch.Tensor
    weight2: torch.Tensor
    bn_weight2: torch.Tensor
    bn_bias2: torch.Tensor
    weight3: torch.Tensor | None
    bn_weight3: torch.Tensor | None
    bn_bias3: torch.Tensor | None
    # of the shortcut
    weight4: torch.Tensor | None
    bn_weight4: torch.Tensor | None
    bn_bias4: torch.Tensor | None
    eps: Sequence[float]  # four each
    stride: Sequence[int]
    padding: Sequence[int]


TENSORS = (
    "Tensor x, Tensor weight1, Tensor bn_weight1, Tensor bn_bias1, Tensor weight2, Tensor bn_weight2, "
    "Tensor bn_bias2, Tensor? weight3, Tensor? bn_weight3, Tensor? bn_bias3, Tensor? weight4, "
    "Tensor? bn_weight4, Tensor? bn_bias4"
)
NUMBERS = "float[] eps, int[] stride, int[] padding"


def flat(x: torch.Tensor, branch: Sequence[Layer], shortcut: Layer | None) -> Arguments:
    nothing: Any = Layer(None, None, None)  # type: ignore[arg-type]
    layers = [*branch, *[nothing] * (MOST - len(branch)), shortcut or nothing]
    tensors = [tensor for layer in layers for tensor in layer[:3]]
    numbers = [[layer[i] for layer in layers] for i in (3, 4, 5)]
    arguments: list[Any] = [x, *tensors, *numbers]
    return Arguments(*arguments)


class Block(NamedTuple):
    """The arguments again as layers, each with its place among the four."""

    branch: list[Layer]
    shortcut: Layer | None

    @property
    def layers(self) -> list[Layer]:
        return [*self.branch, *([] if self.shortcut is None else [self.shortcut])]


def as_block(a: Arguments) -> Block:
    layers: list[Layer | None] = []
    for i in range(MOST + 1):
        given: list[Any] = [*a[1 + 3 * i : 4 + 3 * i], a.eps[i], a.stride[i], a.padding[i]]
        layers.append(None if given[0] is None else Layer(*given))
    return Block([layer for layer in layers[:MOST] if layer is not None], layers[MOST])


def split(statistics: torch.Tensor, layers: Sequence[Layer]) -> list[Statistics]:
    sizes = [len(layer.weight) for layer in layers for _ in range(2)]
    vectors = iter(statistics.split(sizes))
    return [Statistics(*pair) for pair in zip(vectors, vectors, strict=True)]


def again(layer: Layer | None) -> bool:
    """Whether the product is made again in backward rather than kept."""
    return layer is not None and tuple(layer.weight.shape[1:]) in [(c, 1, 1) for c in range(1, _AGAIN + 1)]


Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# y; the statistics; what the convolutions made and was kept, in the four places; the signs of y
Results = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]


def kept(block: Block, maps: Sequence[torch.Tensor]) -> Maps:
    """``maps``, the layers', in their four places; what is absent or made again is empty there."""
    depth = len(block.branch)
    nothing = maps[0].new_empty(0)
    last = nothing if again(block.branch[-1]) else maps[depth - 1]
    shortcut = nothing if block.shortcut is None or again(block.shortcut) else maps[-1]
    places = [*maps[: depth - 1], last, *[nothing] * (MOST - depth), shortcut]
    # an operator must not return one tensor twice
    return tuple(m.new_empty(0) if m is nothing else m for m in places)  # type: ignore[return-value]


def signs_size(y_shape: Sequence[int]) -> tuple[int, int] | None:
    """The size of the signs of y; None where they would not fill bytes, and backward reads y itself."""
    n, c, h, w = y_shape
    return (n * h * w, c // 8) if c % 8 == 0 else None


def signs_of(y: torch.Tensor) -> torch.Tensor:
    """A bit for each value of y [N, C, H, W], whether it is above 0 or NaN, uint8 [N * H * W, C / 8]; empty
    where they would not fill bytes."""
    if (size := signs_size(y.shape)) is None:
        return y.new_empty(0, dtype=torch.uint8)
    bits = (y > 0) | y.isnan()
    eights = bits.permute(0, 2, 3, 1).reshape(*size, 8).to(torch.uint8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=y.device)).sum(-1, dtype=torch.uint8)


def _alone(x: torch.Tensor, layer: Layer) -> Convolution:
    """The arguments of the convolution's op."""
    stride, padding = [layer.stride] * 2, [layer.padding] * 2
    nothing: list[Any] = [None] * 4
    numbers: list[Any] = [1e-5, stride, padding, 1, "none", None, None, None]
    arguments = [x, layer.weight, *nothing, *numbers]
    return Convolution(*arguments)


def convolve(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return CONV_BN_RELU(*_alone(x, layer))


def convolve_and_measure(
    x: torch.Tensor, layer: Layer, statistics: Statistics, before: tuple[Statistics, Layer] | None = None
) -> torch.Tensor:
    """What ``layer`` convolves x to, or relu(bn(x)) by ``before``; ``statistics`` are written.

    Of a 1x1 convolution, which memory bounds, one kernel does it all. That of a larger window has more to
    compute than to read, and nothing to spare.
    """
    pointwise = tuple(layer.weight.shape[2:]) == (1, 1) and layer.padding == 0
    if pointwise and CONV_BN_RELU.chosen(*_alone(x, layer)):
        return _fused(_alone(x, layer), statistics, before)
    z = convolve(x if before is None else normalised(x, *before), layer)
    measure(z, *statistics)
    return z


def _fused(a: Convolution, statistics: Statistics, before: tuple[Statistics, Layer] | None) -> torch.Tensor:
    from fastvr.kernels.batch_norm_stats import merge_moments
    from fastvr.kernels.conv_bn_relu import candidate_configs, default_config, launch_conv_bn_relu_fwd

    z = empty_result(a)
    n, o, oh, ow = z.shape
    pixels, dtype, arch = n * oh * ow, z.dtype, backend.architecture(z.device)
    scalar = gathered(a.x, a.weight)
    # by pointers and unsplit: what is loaded passes through registers, and a tile has its sums whole
    config = tuning.config(
        "residual_block_conv",
        table_key(a.x, a.weight, a.stride, a.padding, 1, op="residual_block_conv"),
        z.device,
        default=lambda: default_config(max(pixels, _MANY), o, dtype, arch, gathered=scalar),
        candidates=lambda: candidate_configs(dtype, arch, gathered=scalar),
    )
    rows = config["BLOCK_M"]
    shares = backend.empty((-(-pixels // rows), 2, o), dtype=torch.float32, device=z.device)
    given = None
    if before is not None:
        moments, layer = before
        given = moments._asdict() | {
            "weight": layer.bn_weight.contiguous(),
            "bias": layer.bn_bias.contiguous(),
            "eps": layer.eps,
        }
    launch_conv_bn_relu_fwd(
        x=a.x,
        weight=a.weight,
        y=z,
        stride=(a.stride[0], a.stride[1]),
        padding=(0, 0),
        groups=1,
        config=config,
        before=given,
        shares=shares,
        **dict.fromkeys(("mean", "std", "bn_weight", "bn_bias", "running_mean", "running_var", "residual")),
        act="none",
        eps=0.0,
    )
    warps = {"num_warps": config["num_warps"], "num_stages": 1}
    merge_moments(parts=shares, **statistics._asdict(), M=pixels, ROWS=rows, config=warps)
    return z


def normalised(z: torch.Tensor, statistics: Statistics, layer: Layer) -> torch.Tensor:
    return normalise(z, *statistics, layer.bn_weight, layer.bn_bias, layer.eps)


def shortcut_arguments(
    z: torch.Tensor | None, statistics: Statistics | None, layer: Layer | None
) -> dict[str, Any]:
    if z is None or statistics is None or layer is None:
        return dict.fromkeys(("shortcut_mean", "shortcut_var", "shortcut_weight")) | {"shortcut_eps": 0.0}
    return {
        "shortcut_mean": statistics.mean,
        "shortcut_var": statistics.var,
        "shortcut_weight": layer.bn_weight.contiguous(),
        "shortcut_eps": layer.eps,
    }


def products(a: Arguments) -> list[int]:
    """FLOPs of the convolutions, layer by layer."""
    block, shape, found = as_block(a), tuple(a.x.shape), []
    for layer in block.layers:
        shape = made(a.x.shape if layer is block.shortcut else shape, layer)
        n, _, h, w = shape
        found.append(2 * n * h * w * layer.weight.numel())
    return found
