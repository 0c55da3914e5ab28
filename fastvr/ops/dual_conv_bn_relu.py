"""dual_conv_bn_relu: y = act(bn(conv(x)) + bn2(conv2(x2))), two 1x1 convolutions in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op, nbytes
from fastvr.ops.conv_bn_relu import (
    BatchNorm,
    check_batch_norm,
    conv_bn_relu,
    gathered,
    output_size,
    pair,
)
from fastvr.reference.conv_bn_relu import ACTIVATIONS
from fastvr.reference.dual_conv_bn_relu import dual_conv_bn_relu as reference


def dual_conv_bn_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn: BatchNorm,
    x2: torch.Tensor,
    weight2: torch.Tensor,
    bn2: BatchNorm,
    *,
    stride2: int | Sequence[int] = 1,
    act: str = "relu",
) -> torch.Tensor:
    """Two 1x1 convolutions, each with its BatchNorm (of running statistics), their sum and activation.

    Computes ``act(bn(conv(x)) + bn2(conv2(x2)))``: the end of a residual block whose shortcut is a
    convolution. Both products are accumulated, normalised and added in float32; the sum is rounded once.

    Args:
        x: [N, C, OH, OW], float32, float16 or bfloat16 (float64 runs in PyTorch); channels_last is fast, any
            strides work without a copy.
        weight: [O, C, 1, 1], x's dtype, any strides.
        bn: of [O]; float32 or x's dtype.
        x2: [N, C2, H, W], x's dtype, any strides, such that its convolution gives OH x OW.
        weight2: [O, C2, 1, 1], x's dtype, any strides.
        bn2: as bn.
        stride2: of x2's convolution; one number, or (vertical, horizontal).
        act: "none" or "relu".

    Returns:
        [N, O, OH, OW], channels_last, x's dtype.

    Under autocast x, x2 and the weights are cast to its dtype; the BatchNorm vectors stay as they are.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
    """
    op = "dual_conv_bn_relu"
    for name, tensor in (("x", x), ("weight", weight), ("x2", x2), ("weight2", weight2)):
        _check.operand(op, name, tensor)
    if (dtype := _check.autocast_dtype(x.device)) is not None:
        x, weight, x2, weight2 = (_check.cast(t, dtype) for t in (x, weight, x2, weight2))
    for name, image, filters in (("", x, weight), ("2", x2, weight2)):
        if filters.dim() != 4 or 0 in filters.shape or tuple(filters.shape[2:]) != (1, 1):
            raise ValueError(f"{op}: weight{name} must be [O, C, 1, 1]; got {list(filters.shape)}")
        if image.dim() != 4 or image.shape[1] != filters.shape[1] or 0 in image.shape[2:]:
            raise ValueError(
                f"{op}: x{name} must be [N, {filters.shape[1]}, H, W] for a weight{name} of "
                f"{list(filters.shape)}; got {list(image.shape)}"
            )
    out_channels = weight.shape[0]
    _check.companion(op, "weight", weight, tuple(weight.shape), x, dtype=x.dtype)
    _check.companion(op, "weight2", weight2, (out_channels, *weight2.shape[1:]), x, dtype=x.dtype)
    stride2 = pair(op, "stride2", stride2, 1)
    oh, ow = (output_size(size, 1, step, 0) for size, step in zip(x2.shape[2:], stride2, strict=True))
    if (x.shape[0], *x.shape[2:]) != (x2.shape[0], oh, ow):
        raise ValueError(
            f"{op}: x2 must give x's [{x.shape[0]}, {x.shape[2]}, {x.shape[3]}] pixels with a stride of "
            f"{stride2}; got {[x2.shape[0], oh, ow]}"
        )
    _check.companion(op, "x2", x2, tuple(x2.shape), x, dtype=x.dtype)
    for name, norm in (("bn", bn), ("bn2", bn2)):
        check_batch_norm(op, norm, weight, [f"{name}.{vector}" for vector in BatchNorm._fields[:4]])
    _check.choice(op, "act", act, ACTIVATIONS)
    return DUAL_CONV_BN_RELU(
        x, weight, *bn[:4], float(bn.eps), x2, weight2, *bn2[:4], float(bn2.eps), stride2, act
    )


class Arguments(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bn_weight: torch.Tensor | None
    bn_bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    eps: float
    x2: torch.Tensor
    weight2: torch.Tensor
    bn2_weight: torch.Tensor | None
    bn2_bias: torch.Tensor | None
    running_mean2: torch.Tensor | None
    running_var2: torch.Tensor | None
    eps2: float
    stride2: Sequence[int]
    act: str


def _parts(*args: object) -> torch.Tensor:
    a = Arguments(*args)  # type: ignore[arg-type]
    shortcut = conv_bn_relu(
        a.x2,
        a.weight2,
        a.bn2_weight,
        a.bn2_bias,
        a.running_mean2,
        a.running_var2,
        eps=a.eps2,
        stride=a.stride2,
        act="none",
    )
    return conv_bn_relu(
        a.x,
        a.weight,
        a.bn_weight,
        a.bn_bias,
        a.running_mean,
        a.running_var,
        eps=a.eps,
        act=a.act,
        residual=shortcut,
    )


def table_key(a: Arguments) -> str:
    n, c, oh, ow = a.x.shape
    sizes = {"m": tuning.bucket(n * oh * ow), "o": a.weight.shape[0], "c": c, "c2": a.x2.shape[1]}
    steps = {"sh": a.stride2[0], "sw": a.stride2[1]}
    return tuning.key("dual_conv_bn_relu", a.x.dtype, **sizes, **steps, gathered=int(_gathered(a)))


def _gathered(a: Arguments) -> bool:
    return gathered(a.x, a.weight) or gathered(a.x2, a.weight2)


def _result_shape(a: Arguments) -> tuple[int, int, int, int]:
    n, _, oh, ow = a.x.shape
    return n, a.weight.shape[0], oh, ow


def _kernel(a: Arguments) -> torch.Tensor:
    from fastvr.kernels.dual_conv_bn_relu import (
        candidate_configs,
        default_config,
        launch_dual_conv_bn_relu_fwd,
    )

    n, o, oh, ow = shape = _result_shape(a)
    y = backend.empty(shape, dtype=a.x.dtype, device=a.x.device, memory_format=torch.channels_last)
    if n == 0:
        return y
    arch, scalar = backend.architecture(a.x.device), _gathered(a)
    config = tuning.config(
        "dual_conv_bn_relu",
        table_key(a),
        a.x.device,
        default=lambda: default_config(n * oh * ow, o, a.x.dtype, arch, gathered=scalar),
        candidates=lambda: candidate_configs(a.x.dtype, arch, gathered=scalar),
    )
    launch_dual_conv_bn_relu_fwd(
        x=a.x,
        weight=a.weight,
        bn_weight=_check.dense(a.bn_weight),
        bn_bias=_check.dense(a.bn_bias),
        running_mean=_check.dense(a.running_mean),
        running_var=_check.dense(a.running_var),
        x2=a.x2,
        weight2=a.weight2,
        bn2_weight=_check.dense(a.bn2_weight),
        bn2_bias=_check.dense(a.bn2_bias),
        running_mean2=_check.dense(a.running_mean2),
        running_var2=_check.dense(a.running_var2),
        y=y,
        stride2=(a.stride2[0], a.stride2[1]),
        act=a.act,
        eps=a.eps,
        eps2=a.eps2,
        config=config,
    )
    return y


def _fake(a: Arguments) -> torch.Tensor:
    return torch.empty(
        _result_shape(a), dtype=a.x.dtype, device=a.x.device, memory_format=torch.channels_last
    )


def _unsupported(a: Arguments) -> str | None:
    n, _, oh, ow = a.x.shape
    return _check.too_many_pixels(n * oh * ow) or _check.kernel_dtypes(*a)


def _measured(a: Arguments) -> str:
    # without a measurement its parts choose for themselves
    return tuning.choice(table_key(a), a.x.device, "reference")


def _cost(a: Arguments) -> Cost:
    result = math.prod(_result_shape(a))
    n, c, oh, ow = a.x.shape
    # a stride leaves rows and columns of x2 unread
    read = n * a.x2.shape[1] * oh * ow
    moved = nbytes(a) + (read - a.x2.numel() + result) * a.x.element_size()
    return Cost(2 * result * (c + a.x2.shape[1]), moved)


DUAL_CONV_BN_RELU = Op(
    "dual_conv_bn_relu",
    "Tensor x, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, Tensor? running_var, "
    "float eps, Tensor x2, Tensor weight2, Tensor? bn2_weight, Tensor? bn2_bias, Tensor? running_mean2, "
    "Tensor? running_var2, float eps2, int[] stride2, str act",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
    parts=_parts,
)
