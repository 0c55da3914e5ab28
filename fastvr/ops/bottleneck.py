"""bottleneck: a residual bottleneck but for its first convolution, in one launch; bottleneck_chain: and the
next block's first convolution with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from fastvr.ops.dual_conv_bn_relu import dual_conv_bn_relu
from fastvr.ops.linear import result_dtype
from fastvr.reference import bottleneck as reference

PLANES = (16, 32, 64, 128)
# of the next block's first convolution, by planes: its accumulator lies beside the block's own
FOLLOWING = {16: (16, 32), 32: (32, 64), 64: (64, 128), 128: (128,)}
_BLOCK = 64  # y's channels are written in whole blocks


class Shortcut(NamedTuple):
    """A residual that is ``bn(conv1x1(x))``: x [N, C, H, W], weight [O, C, 1, 1], bn of [O]."""

    x: torch.Tensor
    weight: torch.Tensor
    bn: BatchNorm
    stride: int | Sequence[int] = 1


def bottleneck(
    x: torch.Tensor,
    weight2: torch.Tensor,
    bn2: BatchNorm,
    weight3: torch.Tensor,
    bn3: BatchNorm,
    *,
    stride: int | Sequence[int] = 1,
    residual: torch.Tensor | None = None,
    shortcut: Shortcut | None = None,
) -> torch.Tensor:
    """A 3x3 convolution with BatchNorm and ReLU, a 1x1 with BatchNorm, the residual and ReLU, in one launch.

    Computes ``relu(bn3(conv3(relu(bn2(conv2(x))))) + residual)``, what follows the first convolution of a
    residual bottleneck (He et al., 2016). What lies between the two is rounded to x's dtype, and is neither
    written nor read back. BatchNorm (of running statistics) is applied to float32 accumulators.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16 (float64 runs in PyTorch).
        weight2: [C, C, 3, 3], x's dtype; the padding is 1.
        bn2: of [C]; float32 or x's dtype.
        weight3: [O, C, 1, 1], x's dtype.
        bn3: of [O]; float32 or x's dtype.
        stride: of the 3x3; one number, or (vertical, horizontal).
        residual: [N, O, OH, OW], any floating dtype.
        shortcut: what gives the residual instead.

    The kernel takes 16, 32, 64 or 128 channels C, O in multiples of 64, and channels_last memory; where
    it does not run its parts do, ``conv_bn_relu`` and ``dual_conv_bn_relu``, each as it chooses.

    Returns:
        [N, O, OH, OW], channels_last, in the dtype that PyTorch's promotion of x and residual gives.

    Under autocast x, the shortcut's x and the weights are cast to its dtype; the BatchNorm vectors and the
    residual stay as they are.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
    """
    return BOTTLENECK(*_checked("bottleneck", x, weight2, bn2, weight3, bn3, stride, residual, shortcut))


def bottleneck_chain(
    x: torch.Tensor,
    weight2: torch.Tensor,
    bn2: BatchNorm,
    weight3: torch.Tensor,
    bn3: BatchNorm,
    weight1: torch.Tensor,
    bn1: BatchNorm,
    *,
    stride: int | Sequence[int] = 1,
    residual: torch.Tensor | None = None,
    shortcut: Shortcut | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y = bottleneck(...)`` and ``z = relu(bn1(conv1(y)))``, the next block's first convolution, in one
    launch.

    y is rounded, written, and multiplied as it was written, without being read back. For inference: there is
    no gradient.

    Args:
        weight1: [C1, O, 1, 1], x's dtype.
        bn1: of [C1]; float32 or x's dtype.
        x, weight2, bn2, weight3, bn3, stride, residual, shortcut: as for :func:`bottleneck`.

    The kernel takes what :func:`bottleneck`'s does, with C1 = C or (up to C = 64) 2 C, and a residual of
    x's dtype; its parts are ``bottleneck`` and ``conv_bn_relu``.

    Returns:
        y as :func:`bottleneck` gives it; z, [N, C1, OH, OW], channels_last, y's dtype.

    Autocast as for :func:`bottleneck`.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
        NotImplementedError: a gradient is wanted.
    """
    op = "bottleneck_chain"
    block = _checked(op, x, weight2, bn2, weight3, bn3, stride, residual, shortcut)
    x, out_channels = block[0], weight3.shape[0]
    _check.operand(op, "weight1", weight1)
    if (dtype := _check.autocast_dtype(x.device)) is not None:
        weight1 = _check.cast(weight1, dtype)
    if weight1.dim() != 4 or weight1.shape[0] == 0 or weight1.shape[1:] != (out_channels, 1, 1):
        raise ValueError(f"{op}: weight1 must be [C1, {out_channels}, 1, 1]; got {list(weight1.shape)}")
    _check.companion(op, "weight1", weight1, tuple(weight1.shape), x, dtype=x.dtype)
    check_batch_norm(op, bn1, weight1, _names("bn1"))
    return BOTTLENECK_CHAIN(*block, weight1, *_flat(bn1))


def _names(bn: str) -> list[str]:
    return [f"{bn}.{name}" for name in BatchNorm._fields[:4]]


def _flat(bn: BatchNorm) -> tuple[torch.Tensor | float | None, ...]:
    return (*bn[:4], float(bn.eps))


class Arguments(NamedTuple):
    x: torch.Tensor
    weight2: torch.Tensor
    bn2_weight: torch.Tensor | None
    bn2_bias: torch.Tensor | None
    running_mean2: torch.Tensor | None
    running_var2: torch.Tensor | None
    eps2: float
    weight3: torch.Tensor
    bn3_weight: torch.Tensor | None
    bn3_bias: torch.Tensor | None
    running_mean3: torch.Tensor | None
    running_var3: torch.Tensor | None
    eps3: float
    stride: Sequence[int]
    residual: torch.Tensor | None
    shortcut: torch.Tensor | None
    shortcut_weight: torch.Tensor | None
    bn_shortcut_weight: torch.Tensor | None
    bn_shortcut_bias: torch.Tensor | None
    running_mean_shortcut: torch.Tensor | None
    running_var_shortcut: torch.Tensor | None
    eps_shortcut: float
    shortcut_stride: Sequence[int]
    # of the chain alone
    weight1: torch.Tensor | None = None
    bn1_weight: torch.Tensor | None = None
    bn1_bias: torch.Tensor | None = None
    running_mean1: torch.Tensor | None = None
    running_var1: torch.Tensor | None = None
    eps1: float = 1e-5

    def bn(self, which: str) -> BatchNorm:
        """The BatchNorm called "1", "2", "3" or "_shortcut"."""
        names = (f"bn{which}_weight", f"bn{which}_bias", f"running_mean{which}", f"running_var{which}")
        return BatchNorm(*(getattr(self, name) for name in (*names, f"eps{which}")))


_BLOCK_FIELDS = Arguments._fields.index("weight1")


def _checked(
    op: str,
    x: torch.Tensor,
    weight2: torch.Tensor,
    bn2: BatchNorm,
    weight3: torch.Tensor,
    bn3: BatchNorm,
    stride: int | Sequence[int],
    residual: torch.Tensor | None,
    shortcut: Shortcut | None,
) -> tuple[Any, ...]:
    """The block's part of the schema's arguments, found valid and cast as autocast wants them."""
    for name, tensor in (("x", x), ("weight2", weight2), ("weight3", weight3)):
        _check.operand(op, name, tensor)
    if shortcut is not None:
        if residual is not None:
            raise ValueError(f"{op}: shortcut must be None beside a residual; got both")
        _check.operand(op, "shortcut.x", shortcut[0])
        _check.operand(op, "shortcut.weight", shortcut[1])
    dtype = _check.autocast_dtype(x.device)
    if dtype is not None:
        x, weight2, weight3 = (_check.cast(t, dtype) for t in (x, weight2, weight3))
    planes = weight2.shape[0] if weight2.dim() else 0
    if tuple(weight2.shape) != (planes, planes, 3, 3) or planes == 0:
        raise ValueError(f"{op}: weight2 must be [C, C, 3, 3]; got {list(weight2.shape)}")
    if weight3.dim() != 4 or weight3.shape[0] == 0 or tuple(weight3.shape[1:]) != (planes, 1, 1):
        raise ValueError(f"{op}: weight3 must be [O, {planes}, 1, 1]; got {list(weight3.shape)}")
    if x.dim() != 4 or x.shape[1] != planes or 0 in x.shape[2:]:
        raise ValueError(
            f"{op}: x must be [N, {planes}, H, W] for a weight2 of {list(weight2.shape)}; got {list(x.shape)}"
        )
    step = pair(op, "stride", stride, 1)
    n, out_channels = x.shape[0], weight3.shape[0]
    oh, ow = (output_size(size, 3, s, 1) for size, s in zip(x.shape[2:], step, strict=True))
    _check.companion(op, "weight2", weight2, tuple(weight2.shape), x, dtype=x.dtype)
    _check.companion(op, "weight3", weight3, tuple(weight3.shape), x, dtype=x.dtype)
    check_batch_norm(op, bn2, weight2, _names("bn2"))
    check_batch_norm(op, bn3, weight3, _names("bn3"))
    _check.companion(op, "residual", residual, (n, out_channels, oh, ow), x)
    block = (x, weight2, *_flat(bn2), weight3, *_flat(bn3), step, residual)
    if shortcut is None:
        return (*block, None, None, *_flat(BatchNorm()), [1, 1])
    source, weight, bn, shortcut_stride = Shortcut(*shortcut)
    if dtype is not None:
        source, weight = _check.cast(source, dtype), _check.cast(weight, dtype)
    if weight.dim() != 4 or tuple(weight.shape) != (out_channels, weight.shape[1], 1, 1):
        raise ValueError(f"{op}: shortcut.weight must be [{out_channels}, C, 1, 1]; got {list(weight.shape)}")
    shortcut_step = pair(op, "shortcut.stride", shortcut_stride, 1)
    if (
        source.dim() != 4
        or source.shape[:2] != (n, weight.shape[1])
        or [output_size(d, 1, s, 0) for d, s in zip(source.shape[2:], shortcut_step, strict=True)] != [oh, ow]
    ):
        raise ValueError(
            f"{op}: shortcut.x must be [{n}, {weight.shape[1]}, H, W] and give {oh} x {ow} pixels with a "
            f"stride of {shortcut_step}; got {list(source.shape)}"
        )
    _check.companion(op, "shortcut.x", source, tuple(source.shape), x, dtype=x.dtype)
    _check.companion(op, "shortcut.weight", weight, tuple(weight.shape), x, dtype=x.dtype)
    check_batch_norm(op, bn, weight, _names("shortcut.bn"))
    return (*block, source, weight, *_flat(bn), shortcut_step)


def _block_parts(*args: object) -> torch.Tensor:
    a = Arguments(*args)  # type: ignore[arg-type]
    *vectors, eps = a.bn("2")
    y = conv_bn_relu(a.x, a.weight2, *vectors, eps=eps, stride=a.stride, padding=1)
    if a.shortcut is not None:
        assert a.shortcut_weight is not None
        return dual_conv_bn_relu(
            y,
            a.weight3,
            a.bn("3"),
            a.shortcut,
            a.shortcut_weight,
            a.bn("_shortcut"),
            stride2=a.shortcut_stride,
        )
    *vectors, eps = a.bn("3")
    return conv_bn_relu(y, a.weight3, *vectors, eps=eps, residual=a.residual)


def _chain_parts(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    a = Arguments(*args)  # type: ignore[arg-type]
    assert a.weight1 is not None
    y = BOTTLENECK(*args[:_BLOCK_FIELDS])
    *vectors, eps = a.bn("1")
    return y, conv_bn_relu(y, a.weight1, *vectors, eps=eps)


def _output_shape(a: Arguments) -> tuple[int, int, int, int]:
    n, _, h, w = a.x.shape
    return n, a.weight3.shape[0], output_size(h, 3, a.stride[0], 1), output_size(w, 3, a.stride[1], 1)


def _following(a: Arguments) -> int:
    return 0 if a.weight1 is None else a.weight1.shape[0]


def table_key(a: Arguments) -> str:
    n, o, oh, ow = _output_shape(a)
    sizes = {"m": tuning.bucket(n * oh * ow), "c": a.x.shape[1], "o": o, "sh": a.stride[0], "sw": a.stride[1]}
    sizes["r"] = int(a.residual is not None)
    if a.shortcut is not None:
        sizes |= {"cs": a.shortcut.shape[1], "ssh": a.shortcut_stride[0], "ssw": a.shortcut_stride[1]}
    if a.weight1 is None:
        return tuning.key("bottleneck", a.x.dtype, **sizes)
    return tuning.key("bottleneck_chain", a.x.dtype, **sizes, next=_following(a))


def _empty(a: Arguments, channels: int, dtype: torch.dtype) -> torch.Tensor:
    n, _, oh, ow = _output_shape(a)
    return backend.empty(
        (n, channels, oh, ow), dtype=dtype, device=a.x.device, memory_format=torch.channels_last
    )


def _launched(a: Arguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    from fastvr.kernels.bottleneck import candidate_configs, default_config, launch_bottleneck_fwd

    n, o, oh, ow = _output_shape(a)
    y = _empty(a, o, result_dtype(a.x, a.residual))
    following = _following(a)
    z = _empty(a, following, a.x.dtype) if following else None
    if n == 0:
        return y, z
    arch, planes, dtype = backend.architecture(a.x.device), a.x.shape[1], a.x.dtype
    kind: dict[str, Any] = {"shortcut": a.shortcut is not None, "following": following}
    config = tuning.config(
        "bottleneck_chain" if following else "bottleneck",
        table_key(a),
        a.x.device,
        default=lambda: default_config(n * oh * ow, dtype, arch, planes, **kind),
        candidates=lambda: candidate_configs(dtype, arch, planes, **kind),
    )
    launch_bottleneck_fwd(
        x=a.x,
        weight2=a.weight2,
        bn2=_dense(a.bn("2")),
        weight3=a.weight3,
        bn3=_dense(a.bn("3")),
        stride=(a.stride[0], a.stride[1]),
        residual=a.residual,
        shortcut=a.shortcut,
        shortcut_weight=a.shortcut_weight,
        shortcut_bn=_dense(a.bn("_shortcut")),
        shortcut_stride=(a.shortcut_stride[0], a.shortcut_stride[1]),
        weight1=a.weight1,
        bn1=_dense(a.bn("1")),
        y=y,
        z=z,
        config=config,
    )
    return y, z


def _dense(bn: BatchNorm) -> BatchNorm:
    weight, bias, mean, var = (_check.dense(vector) for vector in bn[:4])
    return BatchNorm(weight, bias, mean, var, bn.eps)


def _chain_kernel(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    y, z = _launched(a)
    assert z is not None
    return y, z


def _fake(a: Arguments) -> torch.Tensor:
    return torch.empty(
        _output_shape(a),
        dtype=result_dtype(a.x, a.residual),
        device=a.x.device,
        memory_format=torch.channels_last,
    )


def _chain_fake(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    n, _, oh, ow = _output_shape(a)
    y = _fake(a)
    z = torch.empty(
        (n, _following(a), oh, ow), dtype=y.dtype, device=a.x.device, memory_format=torch.channels_last
    )
    return y, z


def _unsupported(a: Arguments) -> str | None:
    n, out_channels, oh, ow = _output_shape(a)
    planes = a.x.shape[1]
    if planes not in PLANES:
        return f"{planes} channels; the kernel takes {', '.join(map(str, PLANES))}"
    if out_channels % _BLOCK:
        return f"{out_channels} output channels are not a multiple of {_BLOCK}"
    if a.shortcut is not None and a.shortcut.shape[1] % min(planes, 64):
        return f"{a.shortcut.shape[1]} channels of the shortcut are not a multiple of {min(planes, 64)}"
    for name in ("x", "weight2", "weight3", "residual", "shortcut", "shortcut_weight", "weight1"):
        tensor = getattr(a, name)
        # beside a window of one pixel, which crosses nothing, only memory decides
        if tensor is not None and gathered(tensor, a.weight3[:, :, :1, :1]):
            return f"{name}'s channels do not lie in blocks of 16 bytes: channels_last is needed"
    return _check.too_many_pixels(n * oh * ow) or _check.kernel_dtypes(*a)


def _chain_unsupported(a: Arguments) -> str | None:
    following, planes = _following(a), a.x.shape[1]
    if following not in FOLLOWING.get(planes, ()):
        return f"{following} channels after {planes} channels"
    if result_dtype(a.x, a.residual) != a.x.dtype:
        return f"a residual of {a.residual.dtype if a.residual is not None else None} beside {a.x.dtype}"
    return _unsupported(a)


def _measured(a: Arguments) -> str:
    # without a measurement its parts choose for themselves
    return tuning.choice(table_key(a), a.x.device, "reference")


def _cost(a: Arguments) -> Cost:
    n, o, oh, ow = shape = _output_shape(a)
    pixels, planes = n * oh * ow, a.x.shape[1]
    macs = pixels * (planes * (9 * planes + o) + _following(a) * o)
    moved = nbytes(a) + math.prod(shape) * result_dtype(a.x, a.residual).itemsize
    moved += pixels * _following(a) * a.x.element_size()
    if a.shortcut is not None:
        macs += pixels * a.shortcut.shape[1] * o
        # a stride leaves rows and columns of it unread
        moved += (pixels * a.shortcut.shape[1] - a.shortcut.numel()) * a.x.element_size()
    return Cost(2 * macs, moved)


_SCHEMA = (
    "Tensor x, Tensor weight2, Tensor? bn2_weight, Tensor? bn2_bias, Tensor? running_mean2, "
    "Tensor? running_var2, float eps2, Tensor weight3, Tensor? bn3_weight, Tensor? bn3_bias, "
    "Tensor? running_mean3, Tensor? running_var3, float eps3, int[] stride, Tensor? residual, "
    "Tensor? shortcut, Tensor? shortcut_weight, Tensor? bn_shortcut_weight, Tensor? bn_shortcut_bias, "
    "Tensor? running_mean_shortcut, Tensor? running_var_shortcut, float eps_shortcut, int[] shortcut_stride"
)

BOTTLENECK = Op(
    "bottleneck",
    _SCHEMA,
    arguments=Arguments,
    kernel=lambda a: _launched(a)[0],
    reference=reference.bottleneck,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
    parts=_block_parts,
)

BOTTLENECK_CHAIN = Op(
    "bottleneck_chain",
    f"{_SCHEMA}, Tensor weight1, Tensor? bn1_weight, Tensor? bn1_bias, Tensor? running_mean1, "
    "Tensor? running_var1, float eps1",
    arguments=Arguments,
    kernel=_chain_kernel,
    reference=reference.bottleneck_chain,
    fake=_chain_fake,
    unsupported=_chain_unsupported,
    measured=_measured,
    cost=_cost,
    parts=_chain_parts,
    returns="(Tensor, Tensor)",
    differentiable=False,
)
