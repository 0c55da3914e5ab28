"""conv_bn_relu_max_pool: the stem of a ResNet, y = max_pool(relu(bn(conv(x)))), in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op, nbytes
from fastvr.ops.conv_bn_relu import BatchNorm, check_batch_norm, conv_bn_relu, output_size, pair
from fastvr.ops.pool import max_pool, pool_window
from fastvr.reference.conv_bn_relu_max_pool import conv_bn_relu_max_pool as reference

_POOL = ([3, 3], [2, 2], [1, 1])  # what the kernel's strips are laid out for
_KEPT = 160  # elements of a window whose weight a program keeps: a 7x7 of three channels


def conv_bn_relu_max_pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn: BatchNorm,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    pool_size: int | Sequence[int],
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> torch.Tensor:
    """A 2-d convolution with BatchNorm (of running statistics) and ReLU, max pooled, in one launch.

    The map between convolution and pool is neither written nor read back. BatchNorm is applied to the float32
    accumulator; the maximum is rounded once. A NaN in a window is its maximum, as in PyTorch.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16 (float64 runs in PyTorch), any strides. Or uint8: then
            ``(x / 255 - mean) / std``, rounded to weight's dtype, is what is convolved; padding is zero after
            it.
        weight: [O, C, kh, kw], x's dtype, any strides.
        bn: of [O]; float32 or weight's dtype.
        stride, padding: of the convolution; one number, or (vertical, horizontal).
        pool_size, pool_stride, pool_padding: likewise of the pool; a stride of None is pool_size, padding is
            with -inf, at most half of pool_size.
        mean, std: [C], any floating dtype; for uint8 images, and only for them.

    The kernel takes a 3x3 pool of stride 2 with a padding of 1, and windows of up to 160 elements; where it
    does not run its parts do, ``conv_bn_relu`` and ``max_pool``, each as it chooses.

    Returns:
        [N, O, PH, PW], channels_last, weight's dtype.

    Under autocast x and weight are cast to its dtype; the BatchNorm vectors stay as they are.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
    """
    op = "conv_bn_relu_max_pool"
    _check.operand(op, "weight", weight)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"{op}: weight must be [out_channels, C, kh, kw]; got {list(weight.shape)}")
    channels, kh, kw = weight.shape[1:]
    step, border = pair(op, "stride", stride, 1), pair(op, "padding", padding, 0)
    _check.image(op, x, mean, std, channels)
    if (dtype := _check.autocast_dtype(x.device)) is not None:
        weight = _check.cast(weight, dtype)
        x = x if x.dtype == torch.uint8 else _check.cast(x, dtype)
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{op}: x must be [N, {channels}, H, W] for a weight of {list(weight.shape)}; got {list(x.shape)}"
        )
    h, w = x.shape[2:]
    oh, ow = output_size(h, kh, step[0], border[0]), output_size(w, kw, step[1], border[1])
    if oh < 1 or ow < 1:
        raise ValueError(
            f"{op}: x must be at least {kh} x {kw} (the window) with its padding of {border}; got {h} x {w}"
        )
    given = None if x.dtype == torch.uint8 else x.dtype
    _check.companion(op, "weight", weight, tuple(weight.shape), x, dtype=given)
    check_batch_norm(op, bn, weight, [f"bn.{name}" for name in BatchNorm._fields[:4]])
    pool = pool_window(op, ("pool_size", "pool_stride", "pool_padding"), pool_size, pool_stride, pool_padding)
    if any(output_size(size, *one) < 1 for size, *one in zip((oh, ow), *pool, strict=True)):
        raise ValueError(
            f"{op}: x must give a map of at least {pool[0]} (pool_size) with pool_padding {pool[2]}; "
            f"got {oh} x {ow} of {h} x {w}"
        )
    return CONV_BN_RELU_MAX_POOL(x, weight, *bn[:4], float(bn.eps), step, border, *pool, mean, std)


class Arguments(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bn_weight: torch.Tensor | None
    bn_bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    eps: float
    stride: Sequence[int]
    padding: Sequence[int]
    pool_size: Sequence[int]
    pool_stride: Sequence[int]
    pool_padding: Sequence[int]
    mean: torch.Tensor | None
    std: torch.Tensor | None


def _parts(*args: object) -> torch.Tensor:
    a = Arguments(*args)  # type: ignore[arg-type]
    y = conv_bn_relu(
        a.x,
        a.weight,
        a.bn_weight,
        a.bn_bias,
        a.running_mean,
        a.running_var,
        eps=a.eps,
        stride=a.stride,
        padding=a.padding,
        mean=a.mean,
        std=a.std,
    )
    return max_pool(y, a.pool_size, a.pool_stride, a.pool_padding)


def _map_size(a: Arguments) -> tuple[int, int]:
    (h, w), (kh, kw) = a.x.shape[2:], a.weight.shape[2:]
    return output_size(h, kh, a.stride[0], a.padding[0]), output_size(w, kw, a.stride[1], a.padding[1])


def _output_shape(a: Arguments) -> tuple[int, int, int, int]:
    pool = zip(_map_size(a), a.pool_size, a.pool_stride, a.pool_padding, strict=True)
    ph, pw = (output_size(*one) for one in pool)
    return a.x.shape[0], a.weight.shape[0], ph, pw


def table_key(a: Arguments) -> str:
    n, o, ph, pw = _output_shape(a)
    _, c, kh, kw = a.weight.shape
    sizes = {"m": tuning.bucket(n * ph * pw), "o": o, "c": c, "kh": kh, "kw": kw}
    # the fastest of an image's dimensions in memory decides how its loads fall
    flags = {"sh": a.stride[0], "sw": a.stride[1], "last": int(a.x.stride(1) == 1)}
    if a.x.dtype == torch.uint8:
        flags["u8"] = 1
    return tuning.key("conv_bn_relu_max_pool", a.weight.dtype, **sizes, **flags)


def _kernel(a: Arguments) -> torch.Tensor:
    from fastvr.kernels.conv_bn_relu_max_pool import (
        candidate_configs,
        default_config,
        launch_conv_bn_relu_max_pool_fwd,
    )

    n, _, ph, pw = shape = _output_shape(a)
    y = backend.empty(shape, dtype=a.weight.dtype, device=a.x.device, memory_format=torch.channels_last)
    if n == 0:
        return y
    arch, uint8 = backend.architecture(a.x.device), a.x.dtype == torch.uint8
    config = tuning.config(
        "conv_bn_relu_max_pool",
        table_key(a),
        a.x.device,
        default=lambda: default_config(n, ph, pw, a.weight.dtype, arch, uint8=uint8),
        candidates=lambda: candidate_configs(a.weight.dtype, arch, uint8=uint8),
    )
    launch_conv_bn_relu_max_pool_fwd(
        x=a.x,
        weight=a.weight,
        bn_weight=_check.dense(a.bn_weight),
        bn_bias=_check.dense(a.bn_bias),
        running_mean=_check.dense(a.running_mean),
        running_var=_check.dense(a.running_var),
        mean=_check.dense(a.mean),
        std=_check.dense(a.std),
        y=y,
        map_size=_map_size(a),
        stride=(a.stride[0], a.stride[1]),
        padding=(a.padding[0], a.padding[1]),
        eps=a.eps,
        config=config,
    )
    return y


def _fake(a: Arguments) -> torch.Tensor:
    return torch.empty(
        _output_shape(a), dtype=a.weight.dtype, device=a.x.device, memory_format=torch.channels_last
    )


def _unsupported(a: Arguments) -> str | None:
    pool = [list(sizes) for sizes in (a.pool_size, a.pool_stride, a.pool_padding)]
    if pool != list(_POOL):
        return f"a pool of size, stride and padding {pool}; the kernel takes {list(_POOL)}"
    if a.weight[0].numel() > _KEPT:
        return f"windows of {a.weight[0].numel()} elements; the kernel takes up to {_KEPT}"
    n, o, ph, pw = _output_shape(a)
    if n * o * ph * pw > 2**31 - 1:
        return "more than 2^31 - 1 elements of the result"
    # kernels step inside an image in 32 bits, up to the end of the last tile's last window
    _, sc, sh, sw = a.x.stride()
    _, c, kh, kw = a.weight.shape
    if c * sc + (a.x.shape[2] + kh) * sh + (a.x.shape[3] + kw + 256 * a.stride[1]) * sw >= 2**31:
        return "an image spans 2^31 elements of memory"
    return _check.kernel_dtypes(*a[1:])


def _measured(a: Arguments) -> str:
    # without a measurement its parts choose for themselves
    return tuning.choice(table_key(a), a.x.device, "reference")


def _cost(a: Arguments) -> Cost:
    n, o, ph, pw = _output_shape(a)
    oh, ow = _map_size(a)
    moved = nbytes(a) + n * o * ph * pw * a.weight.element_size()
    return Cost(2 * n * oh * ow * a.weight.numel(), moved)


CONV_BN_RELU_MAX_POOL = Op(
    "conv_bn_relu_max_pool",
    "Tensor x, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, Tensor? running_var, "
    "float eps, int[] stride, int[] padding, int[] pool_size, int[] pool_stride, int[] pool_padding, "
    "Tensor? mean, Tensor? std",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
    parts=_parts,
)
