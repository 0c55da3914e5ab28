"""residual_block: a residual block of a ResNet in training.

Kept for the gradient are what the convolutions made, and of the result its signs, a bit each. What lies
between two convolutions is normalised again when backward reads it, and the product of a last or a shortcut's
1x1 convolution of few channels is made again: that costs about what reading it would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Gradient, Op, nbytes
from fastvr.ops._residual import (
    MOST,
    NUMBERS,
    TENSORS,
    Arguments,
    Results,
    Statistics,
    as_block,
    convolve_and_measure,
    flat,
    kept,
    made,
    products,
    shortcut_arguments,
    signs_of,
    signs_size,
    split,
)
from fastvr.ops.batch_norm_act import map_like, map_rows, row_config, table_key
from fastvr.ops.residual_block_backward import RESIDUAL_BLOCK_BACKWARD
from fastvr.reference.residual_block import Layer
from fastvr.reference.residual_block import residual_block as reference

__all__ = ["Layer", "Statistics", "residual_block"]


def residual_block(
    x: torch.Tensor, branch: Sequence[Layer], shortcut: Layer | None = None
) -> tuple[torch.Tensor, list[Statistics]]:
    """A residual block in training, BatchNorm by the batch's own statistics.

    Computes ``relu(branch(x) + shortcut(x))``: the branch's convolutions, each with BatchNorm and all but the
    last with ReLU behind it; the shortcut's with BatchNorm, or x itself. Running statistics are the caller's
    affair.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16 (float64 runs in PyTorch); channels_last is fast.
        branch: two or three layers. Weights in x's dtype, BatchNorm's vectors in x's or float32.
        shortcut: one layer whose result is as large as the branch's; None where x is.

    Returns:
        y: [N, O, OH, OW], channels_last, x's dtype.
        The statistics of every BatchNorm, the shortcut's last, without gradient.

    Under autocast x and the convolutions' weights are cast to its dtype.

    Raises:
        ValueError: an argument's shape, dtype or device; the message names it. One pixel a channel in all has
            no variance: as PyTorch says it.
    """
    op = "residual_block"
    _check.operand(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be [N, C, H, W]; got {list(x.shape)}")
    if not 2 <= len(branch) <= MOST:
        raise ValueError(f"{op}: branch must be 2 or {MOST} layers; got {len(branch)}")
    if (dtype := _check.autocast_dtype(x.device)) is not None:
        x = _check.cast(x, dtype)
        branch = [layer._replace(weight=_check.cast(layer.weight, dtype)) for layer in branch]
        if shortcut is not None:
            shortcut = shortcut._replace(weight=_check.cast(shortcut.weight, dtype))
    shape: Sequence[int] = x.shape
    for i, layer in enumerate(branch):
        shape = _check_layer(op, f"branch[{i}]", layer, x, shape)
    end: Sequence[int] = x.shape
    if shortcut is not None:
        end = _check_layer(op, "shortcut", shortcut, x, x.shape)
    if tuple(end) != tuple(shape):
        name = "x" if shortcut is None else "shortcut's result"
        raise ValueError(f"{op}: {name} must be {list(shape)}, as the branch's result is; got {list(end)}")
    y, statistics, *_ = RESIDUAL_BLOCK(*flat(x, branch, shortcut))
    layers = [*branch, *([] if shortcut is None else [shortcut])]
    return y, split(statistics, layers)


def normalised_pixels(x: torch.Tensor, branch: Sequence[Layer], shortcut: Layer | None) -> list[int]:
    """Of how many pixels each of the statistics is taken."""
    shape, shapes = tuple(x.shape), []
    for layer in branch:
        shape = made(shape, layer)
        shapes.append(shape)
    if shortcut is not None:
        shapes.append(made(x.shape, shortcut))
    return [n * h * w for n, _, h, w in shapes]


def fuses_residual_block(x: torch.Tensor, branch: Sequence[Layer], shortcut: Layer | None) -> bool:
    """Whether the kernels run for a block of these layers on ``x``: where they do not, modules cost less than
    an op that hands its statistics back."""
    tensors = (x, *(tensor for layer in (*branch, *filter(None, [shortcut])) for tensor in layer[:3]))
    if x.dim() != 4 or x.shape[0] == 0 or x.dtype not in _check.KERNEL_DTYPES:
        return False
    shape = tuple(x.shape)
    for layer in branch:
        if shape[1] != layer.weight.shape[1]:
            return False
        shape = made(shape, layer)
    beside = tuple(x.shape)
    if shortcut is not None:
        if beside[1] != shortcut.weight.shape[1]:
            return False
        beside = made(beside, shortcut)
    if shape != beside or not any(tensor.requires_grad for tensor in tensors):
        return False
    if torch.compiler.is_compiling() and backend.current_backend() != "triton":
        # a compiler fuses PyTorch's own, and cannot look a measurement up
        return False
    return RESIDUAL_BLOCK.chosen(*flat(x, branch, shortcut))


def _check_layer(
    op: str, name: str, layer: Layer, x: torch.Tensor, shape: Sequence[int]
) -> tuple[int, int, int, int]:
    """The shape of what ``layer`` makes of ``shape``."""
    weight = layer.weight
    _check.operand(op, f"{name}.weight", weight)
    if weight.dim() != 4 or weight.shape[1] != shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{op}: {name}.weight must be [out_channels, {shape[1]}, kh, kw]; got {list(weight.shape)}"
        )
    _check.companion(op, f"{name}.weight", weight, tuple(weight.shape), x, dtype=x.dtype)
    for part in ("bn_weight", "bn_bias"):
        _check.companion(op, f"{name}.{part}", getattr(layer, part), (weight.shape[0],), x)
    if layer.bn_weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: {name}.bn_weight must be {x.dtype} or float32; got {layer.bn_weight.dtype}")
    if layer.bn_bias.dtype != layer.bn_weight.dtype:
        wanted = layer.bn_weight.dtype
        raise ValueError(f"{op}: {name}.bn_bias must be {wanted}, as bn_weight is; got {layer.bn_bias.dtype}")
    if not layer.eps > 0:
        raise ValueError(f"{op}: {name}.eps must be above 0; got {layer.eps}")
    if layer.stride < 1 or layer.padding < 0:
        raise ValueError(
            f"{op}: {name} must have a stride of at least 1 and no negative padding; "
            f"got {layer.stride} and {layer.padding}"
        )
    result = made(shape, layer)
    if min(result[2:]) < 1:
        raise ValueError(
            f"{op}: {name}.weight must be no window larger than the padded {shape[2]} x {shape[3]}; "
            f"got {list(weight.shape[2:])}"
        )
    if result[0] * result[2] * result[3] == 1:
        size = torch.Size(result)
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    return result


def _kernel(a: Arguments) -> Results:
    from fastvr.kernels.residual_block import launch_residual_block_fwd

    block = as_block(a)
    sizes = 2 * sum(len(layer.weight) for layer in block.layers)
    packed = backend.empty((sizes,), dtype=torch.float32, device=a.x.device)
    statistics = split(packed, block.layers)
    maps, z, before = [], a.x, None
    for layer, found in zip(block.branch, statistics, strict=False):
        z = convolve_and_measure(z, layer, found, before)
        maps.append(z)
        before = found, layer
    last, z = block.branch[-1], maps[-1]
    identity, parts = a.x, shortcut_arguments(None, None, None) | {"shortcut_bias": None}
    if block.shortcut is not None:
        identity = convolve_and_measure(a.x, block.shortcut, statistics[-1])
        maps.append(identity)
        parts = shortcut_arguments(identity, statistics[-1], block.shortcut)
        parts["shortcut_bias"] = block.shortcut.bn_bias.contiguous()
    y = map_like(z, z.dtype)
    size = signs_size(y.shape)
    signs = backend.empty(size or (0,), dtype=torch.uint8, device=a.x.device)
    found = statistics[len(block.branch) - 1]
    launch_residual_block_fwd(
        z=map_rows(z),
        mean=found.mean,
        var=found.var,
        weight=last.bn_weight.contiguous(),
        bias=last.bn_bias.contiguous(),
        eps=last.eps,
        shortcut=map_rows(identity),
        **parts,
        y=map_rows(y),
        signs=signs if size else None,
        config=row_config("residual_block", z),
    )
    return y, packed, *kept(block, maps), signs


def _reference(*args: Any) -> Results:
    block = as_block(Arguments(*args))
    y, statistics, maps = reference(args[0], *block)
    signs = signs_of(y.detach())
    return y, statistics, *kept(block, [m.detach() for m in maps]), signs


def _fake(a: Arguments) -> Results:
    block, shape = as_block(a), tuple(a.x.shape)

    def empty(size: Sequence[int]) -> torch.Tensor:
        dtype, device = a.x.dtype, a.x.device
        return torch.empty(tuple(size), dtype=dtype, device=device, memory_format=torch.channels_last)

    maps = []
    for layer in block.branch:
        shape = made(shape, layer)
        maps.append(empty(shape))
    if block.shortcut is not None:
        maps.append(empty(shape))
    wide = torch.promote_types(a.x.dtype, torch.float32)
    statistics = a.x.new_empty(2 * sum(len(layer.weight) for layer in block.layers), dtype=wide)
    signs = a.x.new_empty(signs_size(shape) or (0,), dtype=torch.uint8)
    return empty(shape), statistics, *kept(block, maps), signs


def _unsupported(a: Arguments) -> str | None:
    if a.x.shape[0] == 0:
        return "an empty batch"
    block, shape = as_block(a), tuple(a.x.shape)
    for layer in block.branch:
        shape = made(shape, layer)
        if reason := _check.too_many_pixels(shape[0] * shape[2] * shape[3]):
            return reason
    return _check.kernel_dtypes(*a)


def _measured(a: Arguments) -> str:
    # without a measurement PyTorch's own modules run
    block, shape = as_block(a), tuple(a.x.shape)
    for layer in block.branch:
        shape = made(shape, layer)
    return tuning.choice(table_key("residual_block", a.x.dtype, shape), a.x.device, "reference")


def _signs_of(a: Arguments) -> tuple[int, int] | None:
    """The size of the signs of the result."""
    shape = tuple(a.x.shape)
    for layer in as_block(a).branch:
        shape = made(shape, layer)
    return signs_size(shape)


def _backward(
    a: Arguments, results: Sequence[torch.Tensor | None], grad: torch.Tensor, needs: frozenset[str]
) -> Mapping[str, torch.Tensor]:
    names = [name for name in Arguments._fields if name in needs]
    wanted = [name in needs for name in Arguments._fields]
    found = RESIDUAL_BLOCK_BACKWARD.where_supported(grad, *results, *a, wanted)
    return dict(zip(names, found, strict=True))


RESIDUAL_BLOCK = Op(
    "residual_block",
    f"{TENSORS}, {NUMBERS}",
    arguments=Arguments,
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=lambda a: Cost(sum(products(a)), nbytes(a) + nbytes(_fake(a))),
    returns="(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    gradient=Gradient(
        # the result only shows where its ReLU let through, and so do its signs
        saves=lambda a, needs: [*Arguments._fields, *range(_signs_of(a) is not None, 7)],
        backward=_backward,
    ),
)
