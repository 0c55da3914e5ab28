"""conv_bn_relu: y = act(bn(conv(x)) + residual), one launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Gradient, Op, nbytes, reference_gradients
from fastvr.ops.conv_bn_relu_backward import CONV_BN_RELU_BACKWARD, WANTED
from fastvr.ops.cpu import magnitude, mkldnn, winograd
from fastvr.ops.linear import result_dtype
from fastvr.reference.conv_bn_relu import ACTIVATIONS
from fastvr.reference.conv_bn_relu import conv_bn_relu as reference
from fastvr.reference.image import normalize

_VECTORS = ("bn_weight", "bn_bias", "running_mean", "running_var")


class BatchNorm(NamedTuple):
    """BatchNorm of running statistics, by its vectors, [O] or None each, and what is added to the variance.

    Without ``running_mean`` and ``running_var``, ``weight`` and ``bias`` are scale and shift themselves.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    running_mean: torch.Tensor | None = None
    running_var: torch.Tensor | None = None
    eps: float = 1e-5


def conv_bn_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    act: str = "relu",
    residual: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> torch.Tensor:
    """A 2-d convolution with BatchNorm (of running statistics), residual and activation in one launch.

    Computes ``act(bn(conv(x)) + residual)``. BatchNorm is applied to the float32 accumulator from its
    vectors as they are, so nothing is prepared and nothing goes stale; the result is rounded once.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16 (float64 runs in PyTorch); channels_last is fast, any
            strides work without a copy. Or uint8: then ``(x / 255 - mean) / std``, rounded to weight's dtype,
            is what is convolved; padding is zero after it.
        weight: [O, C / groups, kh, kw], x's dtype; channels_last is fast, any strides work.
        bn_weight, bn_bias: [O] or None; float32 or weight's dtype.
        running_mean, running_var: [O], both or neither; float32 or weight's dtype. With neither, the
            result is ``act(conv(x) * bn_weight + bn_bias + residual)``: a prepared scale and shift.
        eps: added to running_var.
        stride, padding: one number, or (vertical, horizontal).
        groups: as in ``torch.nn.Conv2d``.
        act: "none" or "relu".
        residual: [N, O, OH, OW], any floating dtype and strides.
        mean, std: [C], any floating dtype; for uint8 images, and only for them.

    Returns:
        [N, O, OH, OW], channels_last, in the dtype that PyTorch's promotion of weight and residual gives.

    Under autocast x and weight are cast to its dtype; the BatchNorm vectors and residual stay as they are.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
    """
    op = "conv_bn_relu"
    _check.operand(op, "weight", weight)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"{op}: weight must be [out_channels, C / groups, kh, kw]; got {list(weight.shape)}")
    out_channels, group_channels, kh, kw = weight.shape
    stride = pair(op, "stride", stride, 1)
    padding = pair(op, "padding", padding, 0)
    if not isinstance(groups, int) or groups < 1 or out_channels % groups:
        raise ValueError(
            f"{op}: groups must be a divisor of weight's {out_channels} output channels; got {groups}"
        )
    _check.image(op, x, mean, std, group_channels * groups)
    if (dtype := _check.autocast_dtype(x.device)) is not None:
        weight = _check.cast(weight, dtype)
        x = x if x.dtype == torch.uint8 else _check.cast(x, dtype)
    if x.dim() != 4 or x.shape[1] != group_channels * groups:
        raise ValueError(
            f"{op}: x must be [N, {group_channels * groups}, H, W] for a weight of {list(weight.shape)} "
            f"in {groups} groups; got {list(x.shape)}"
        )
    n, _, h, w = x.shape
    oh, ow = output_size(h, kh, stride[0], padding[0]), output_size(w, kw, stride[1], padding[1])
    if oh < 1 or ow < 1:
        raise ValueError(
            f"{op}: x must be at least {kh} x {kw} (the window) with its padding of {padding}; got {h} x {w}"
        )
    given = None if x.dtype == torch.uint8 else x.dtype
    _check.companion(op, "weight", weight, tuple(weight.shape), x, dtype=given)
    vectors = BatchNorm(bn_weight, bn_bias, running_mean, running_var)
    check_batch_norm(op, vectors, weight, _VECTORS)
    _check.companion(op, "residual", residual, (n, out_channels, oh, ow), x)
    _check.choice(op, "act", act, ACTIVATIONS)
    return CONV_BN_RELU(
        x,
        weight,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        float(eps),
        stride,
        padding,
        groups,
        act,
        residual,
        mean,
        std,
    )


def check_batch_norm(op: str, bn: BatchNorm, weight: torch.Tensor, names: Sequence[str]) -> None:
    """The four vectors of ``bn`` fit what ``weight`` makes; ``names`` is what the caller calls them."""
    for name, vector in zip(names, bn[:4], strict=True):
        _check.companion(op, name, vector, (weight.shape[0],), weight)
        if vector is not None and vector.dtype not in (torch.float32, weight.dtype):
            raise ValueError(
                f"{op}: {name} must be float32 or {weight.dtype}, as weight is; got {vector.dtype}"
            )
    if (bn.running_mean is None) != (bn.running_var is None):
        missing = names[2] if bn.running_mean is None else names[3]
        raise ValueError(f"{op}: {missing} must be given with its companion, or both be None; got None")


def pair(op: str, name: str, value: int | Sequence[int], least: int) -> list[int]:
    """``value`` as [vertical, horizontal], both at least ``least``."""
    both = list(value) if isinstance(value, Sequence) else [value, value]
    if len(both) != 2 or not all(isinstance(v, int) and v >= least for v in both):
        raise ValueError(f"{op}: {name} must be one or two integers of at least {least}; got {value!r}")
    return both


def output_size(size: int, window: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - window) // stride + 1


def _output_shape(
    x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int, int, int]:
    n, _, h, w = x.shape
    o, _, kh, kw = weight.shape
    return n, o, output_size(h, kh, stride[0], padding[0]), output_size(w, kw, stride[1], padding[1])


def gathered(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel loads element by element: blocks of K that cross taps (the stem, few channels a
    group), bytes to be normalised, or memory whose innermost dimension is not the channels, 16 bytes at a
    time."""
    _, c, kh, kw = weight.shape
    crossing = kh * kw > 1 and c % 64 != 0
    return x.dtype == torch.uint8 or crossing or not (_wide(x) and _wide(weight))


def _wide(t: torch.Tensor) -> bool:
    outer = [stride for d, stride in enumerate(t.stride()) if d != 1 and t.shape[d] > 1]
    return t.stride(1) == 1 and all(stride * t.element_size() % 16 == 0 for stride in outer)


def table_key(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    *,
    op: str = "conv_bn_relu",
) -> str:
    n, o, oh, ow = _output_shape(x, weight, stride, padding)
    _, c, kh, kw = weight.shape
    sizes = {
        "m": tuning.bucket(n * oh * ow),
        "o": o,
        "c": c,
        "kh": kh,
        "kw": kw,
        "sh": stride[0],
        "sw": stride[1],
    }
    if x.dtype == torch.uint8:
        sizes["u8"] = 1
    return tuning.key(op, weight.dtype, **sizes, g=groups, gathered=int(gathered(x, weight)))


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
    groups: int
    act: str
    residual: torch.Tensor | None
    mean: torch.Tensor | None
    std: torch.Tensor | None


def empty_result(a: Arguments) -> torch.Tensor:
    return backend.empty(
        _output_shape(a.x, a.weight, a.stride, a.padding),
        dtype=result_dtype(a.weight, a.residual),
        device=a.x.device,
        memory_format=torch.channels_last,
    )


def _kernel(a: Arguments) -> torch.Tensor:
    from fastvr.kernels.conv_bn_relu import candidate_configs, default_config, launch_conv_bn_relu_fwd
    from fastvr.kernels.conv_boxes import launch_conv_boxes_fwd, takes_boxes

    y = empty_result(a)
    n, o, oh, ow = y.shape
    if n == 0:
        return y
    pixels, terms, dtype = n * oh * ow, math.prod(a.weight.shape[1:]), a.weight.dtype
    stride, padding = (a.stride[0], a.stride[1]), (a.padding[0], a.padding[1])
    arch, scalar = backend.architecture(a.x.device), gathered(a.x, a.weight)
    # asked only where a configuration wants to know
    boxes = functools.partial(takes_boxes, a.x, a.weight, stride, a.groups)
    config = tuning.config(
        "conv_bn_relu",
        table_key(a.x, a.weight, a.stride, a.padding, a.groups),
        a.x.device,
        default=lambda: default_config(
            pixels, o // a.groups, dtype, arch, gathered=scalar, boxes=boxes(), k=terms
        ),
        candidates=lambda: candidate_configs(dtype, arch, gathered=scalar, boxes=boxes(), m=pixels),
    )
    epilogue: dict[str, Any] = {
        "bn_weight": _check.dense(a.bn_weight),
        "bn_bias": _check.dense(a.bn_bias),
        "running_mean": _check.dense(a.running_mean),
        "running_var": _check.dense(a.running_var),
        "residual": a.residual,
        "act": a.act,
        "eps": a.eps,
    }
    if config.get("TMA") and boxes():
        launch_conv_boxes_fwd(
            x=a.x, weight=a.weight, y=y, stride=stride, padding=padding, config=config, **epilogue
        )
        return y
    split = config.get("SPLIT_K", 1)
    size = (split, pixels, o)
    launch_conv_bn_relu_fwd(
        x=a.x,
        weight=a.weight,
        mean=_check.dense(a.mean),
        std=_check.dense(a.std),
        y=y,
        workspace=backend.empty(size, dtype=torch.float32, device=a.x.device) if split > 1 else None,
        stride=stride,
        padding=padding,
        groups=a.groups,
        # the same tile by pointers where a measured configuration meets operands that descriptors cannot read
        config={name: value for name, value in config.items() if name != "TMA"},
        **epilogue,
    )
    return y


def _vendor(a: Arguments) -> torch.Tensor | None:
    packed = mkldnn.kept(a.weight)
    if packed is None or packed.scale is not a.bn_weight or packed.shift is not a.bn_bias:
        return None
    if a.running_mean is not None:
        return None
    x = normalize(a.x, a.mean, a.std, a.weight.dtype)
    return run_packed(x, packed, a.stride, a.padding, a.groups, a.act, a.residual)


def run_packed(
    x: torch.Tensor,
    packed: mkldnn.AnyPacked,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    act: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """What ``packed`` gives on a CPU; the other arguments as the op's, x in the weight's dtype."""
    if isinstance(packed, winograd.Winograd) and not packed.fits(x.shape, padding):
        packed = packed.direct
    backend.ran("conv_bn_relu", packed.name)
    most = None if packed.gain is None else magnitude.bound(packed.gain, x, residual)
    if isinstance(packed, winograd.Winograd):
        y = winograd.conv_bn_relu(x, packed, padding, act, residual)
    else:
        y = mkldnn.conv_bn_relu(x, packed, stride, padding, groups, act, residual, finite=most is not None)
    return magnitude.carry(y, most)


def _fake(a: Arguments) -> torch.Tensor:
    shape = _output_shape(a.x, a.weight, a.stride, a.padding)
    return torch.empty(
        shape, dtype=result_dtype(a.weight, a.residual), device=a.x.device, memory_format=torch.channels_last
    )


def _unsupported(a: Arguments) -> str | None:
    n, _, oh, ow = _output_shape(a.x, a.weight, a.stride, a.padding)
    return _check.too_many_pixels(n * oh * ow) or _check.kernel_dtypes(*a[1:])


def _measured(a: Arguments) -> str:
    # without a measurement the vendor's convolution runs
    return tuning.choice(table_key(a.x, a.weight, a.stride, a.padding, a.groups), a.x.device, "reference")


def _cost(a: Arguments) -> Cost:
    shape = _output_shape(a.x, a.weight, a.stride, a.padding)
    result = math.prod(shape)
    n, c, h, w = a.x.shape
    # a stride wider than the window leaves rows and columns of x unread
    read = n * c * min(h, shape[2] * a.weight.shape[2]) * min(w, shape[3] * a.weight.shape[3])
    moved = read * a.x.element_size() + nbytes(a[1:])
    return Cost(
        2 * result * math.prod(a.weight.shape[1:]),
        moved + result * result_dtype(a.weight, a.residual).itemsize,
    )


def _saves(a: Arguments, needs: frozenset[str]) -> list[str | int]:
    if needs - set(WANTED):
        return list(Arguments._fields)
    # the result only shows where the activation let through
    found: list[str | int] = ["weight", "bn_bias", *([0] if a.act == "relu" else [])]
    if needs & {"x", "weight"}:
        found += ["bn_weight", "running_var"]
    return [*found, *(["x", "mean", "std"] if "weight" in needs else [])]


def _backward(
    a: Arguments, results: tuple[torch.Tensor | None], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    """By the vendor's convolutions, but for BatchNorm's weight and statistics: only these read the product,
    which is made again for them."""
    if needs - set(WANTED):
        names = [name for name in Arguments._fields if name in needs]
        places = [Arguments._fields.index(name) for name in names]
        return dict(zip(names, reference_gradients(reference, a, grad, places), strict=True))
    # without an activation nothing stands between the residual and the result
    wanted = needs if a.act == "relu" else needs - {"residual"}
    found = {"residual": grad}
    if wanted:
        convolved, product = bool(wanted & {"x", "weight"}), "weight" in wanted
        gradients = CONV_BN_RELU_BACKWARD.where_supported(
            grad,
            results[0],
            a.x if product else None,
            a.x.shape,
            a.weight,
            a.bn_weight if convolved else None,
            a.bn_bias,
            a.running_var if convolved else None,
            *(a.eps, a.stride, a.padding, a.groups),
            *((a.mean, a.std) if product else (None, None)),
            [name in wanted for name in WANTED],
        )
        found |= zip([name for name in WANTED if name in wanted], gradients, strict=True)
    if a.residual is not None:
        found["residual"] = found["residual"].to(a.residual.dtype)
    return found


CONV_BN_RELU = Op(
    "conv_bn_relu",
    "Tensor x, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, Tensor? running_var, "
    "float eps, int[] stride, int[] padding, int groups, str act, Tensor? residual, Tensor? mean, "
    "Tensor? std",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
    vendor=_vendor,
    gradient=Gradient(
        saves=_saves,
        backward=_backward,
    ),
)
