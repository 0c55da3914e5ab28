"""batch_norm_act_max_pool: y = max_pool(relu(bn(x))), a stem's end in training; and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Gradient, Op, nbytes, reference_gradients
from fastvr.ops.batch_norm_act import (
    check_batch_norm_act,
    map_like,
    map_rows,
    measure,
    reduction_parts,
    row_config,
    table_key,
)
from fastvr.ops.conv_bn_relu import output_size
from fastvr.ops.pool import pool_window
from fastvr.ops.pool_backward import too_many_taps
from fastvr.reference.batch_norm_act_max_pool import batch_norm_act_max_pool as reference


def batch_norm_act_max_pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """BatchNorm by the batch's own statistics, ReLU and max pooling.

    What is pooled is neither written nor kept: which tap of its window each result is takes a byte.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16 (float64 runs in PyTorch); channels_last is fast, what
            lies otherwise is copied.
        weight, bias: [C], x's dtype or float32, both the same.
        kernel_size, stride, padding: of the pool; one number, or (vertical, horizontal). A stride of None is
            kernel_size; padding is at most half of kernel_size. The kernel takes up to 255 taps.
        eps: added to the variance, above 0.

    Returns:
        y: [N, C, OH, OW], channels_last, x's dtype.
        mean, var: [C], float32 (float64 for float64), biased, without gradient.

    Under autocast nothing is cast.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it. One pixel a channel in
            all has no variance: as PyTorch says it.
    """
    op = "batch_norm_act_max_pool"
    check_batch_norm_act(op, x, weight, bias, eps)
    names = ("kernel_size", "stride", "padding")
    window = pool_window(op, names, kernel_size, stride, padding)
    if min(_pooled(x, *window)[2:]) < 1:
        raise ValueError(
            f"{op}: x must be at least {window[0]} (the window) with its padding of {window[2]}; "
            f"got {x.shape[2]} x {x.shape[3]}"
        )
    y, mean, var, _ = BATCH_NORM_ACT_MAX_POOL(x, weight, bias, float(eps), *window)
    return y, mean, var


def fuses_max_pool(
    x: torch.Tensor,
    bn: torch.nn.BatchNorm2d,
    kernel_size: Any,
    stride: Any,
    padding: Any,
) -> bool:
    """Whether the kernels run for ``bn``, an affine one, in training on ``x``, and what is pooled of it."""
    if (
        x.dim() != 4
        or x.shape[0] == 0
        or x.dtype not in _check.KERNEL_DTYPES
        or bn.weight.dtype not in (x.dtype, torch.float32)
        or bn.weight.shape[0] != x.shape[1]
        or bn.eps <= 0
        or not (torch.is_grad_enabled() and (x.requires_grad or bn.weight.requires_grad))
        or (torch.compiler.is_compiling() and backend.current_backend() != "triton")
    ):
        return False
    window = pool_window("max_pool", ("kernel_size", "stride", "padding"), kernel_size, stride, padding)
    arguments = Arguments(x, bn.weight, bn.bias, float(bn.eps), *window)
    # any pool that is a model's, in every mode
    return too_many_taps(arguments.kernel_size) is None and BATCH_NORM_ACT_MAX_POOL.chosen(*arguments)


class Arguments(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]


_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _pooled(
    x: torch.Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int, int, int]:
    n, c = x.shape[:2]
    oh, ow = (output_size(*one) for one in zip(x.shape[2:], window, stride, padding, strict=True))
    return n, c, oh, ow


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    return sizes[0], sizes[1]


def _kernel(a: Arguments) -> _Results:
    from fastvr.kernels.batch_norm_act_max_pool import launch_batch_norm_act_max_pool_fwd

    x = a.x.contiguous(memory_format=torch.channels_last)
    shape = _pooled(x, *a[4:])
    layout, device = torch.channels_last, x.device
    y = backend.empty(shape, dtype=x.dtype, device=device, memory_format=layout)
    taps = backend.empty(shape, dtype=torch.uint8, device=device, memory_format=layout)
    mean, var = (backend.empty((shape[1],), dtype=torch.float32, device=device) for _ in range(2))
    measure(x, mean, var)
    launch_batch_norm_act_max_pool_fwd(
        x=x,
        mean=mean,
        var=var,
        weight=a.weight.contiguous(),
        bias=a.bias.contiguous(),
        y=y,
        taps=taps,
        kernel_size=_pair(a.kernel_size),
        stride=_pair(a.stride),
        padding=_pair(a.padding),
        eps=a.eps,
        config=row_config("batch_norm_act_max_pool", y),
    )
    return y, mean, var, taps


def _fake(a: Arguments) -> _Results:
    shape = _pooled(a.x, *a[4:])
    y, taps = (
        torch.empty(shape, dtype=dtype, device=a.x.device, memory_format=torch.channels_last)
        for dtype in (a.x.dtype, torch.uint8)
    )
    wide = torch.promote_types(a.x.dtype, torch.float32)
    mean, var = (a.x.new_empty(shape[1], dtype=wide) for _ in range(2))
    return y, mean, var, taps


def _unsupported(a: Arguments) -> str | None:
    if a.x.shape[0] == 0:
        return "an empty batch"
    return (
        too_many_taps(a.kernel_size)
        or _check.too_many_pixels(a.x.numel() // a.x.shape[1])
        or _check.kernel_dtypes(*a)
    )


class BackwardArguments(NamedTuple):
    grad: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    taps: torch.Tensor
    eps: float
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    needs_x: bool


_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _backward_kernel(a: BackwardArguments) -> _Gradients:
    from fastvr.kernels.batch_norm_act_max_pool import launch_batch_norm_act_max_pool_bwd

    layout, device = torch.channels_last, a.x.device
    x = a.x.contiguous(memory_format=layout)
    # what is not needed comes back empty
    dx = map_like(x, x.dtype) if a.needs_x else backend.empty((0,), dtype=x.dtype, device=device)
    dweight, dbias = (backend.empty(a.weight.shape, dtype=a.weight.dtype, device=device) for _ in range(2))
    config = row_config("batch_norm_act_max_pool_backward", x)
    launch_batch_norm_act_max_pool_bwd(
        grad=a.grad.contiguous(memory_format=layout),
        taps=a.taps.contiguous(memory_format=layout),
        x=x,
        mean=a.mean.contiguous(),
        var=a.var.contiguous(),
        weight=a.weight.contiguous(),
        parts=reduction_parts(map_rows(x), 2, config),
        sums=backend.empty((2, x.shape[1]), dtype=torch.float32, device=device),
        dx=dx if a.needs_x else None,
        dweight=dweight,
        dbias=dbias,
        kernel_size=_pair(a.kernel_size),
        stride=_pair(a.stride),
        padding=_pair(a.padding),
        eps=a.eps,
        config=config,
    )
    return dx, dweight, dbias


def _backward_reference(*args: Any) -> _Gradients:
    a = BackwardArguments(*args)

    def result(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return reference(x, weight, bias, a.eps, a.kernel_size, a.stride, a.padding)[0]

    dx, dweight, dbias = reference_gradients(result, (a.x, a.weight, a.bias), a.grad, (0, 1, 2))
    given = dx.contiguous(memory_format=torch.channels_last) if a.needs_x else dx.new_empty(0)
    return given, dweight.contiguous(), dbias.contiguous()


def _backward_fake(a: BackwardArguments) -> _Gradients:
    dx = torch.empty_like(a.x, memory_format=torch.channels_last) if a.needs_x else a.x.new_empty(0)
    return dx, a.weight.new_empty(a.weight.shape), a.bias.new_empty(a.bias.shape)


def _backward_choice(a: BackwardArguments) -> str:
    key = table_key("batch_norm_act_max_pool_backward", a.x.dtype, a.x.shape)
    return tuning.choice(key, a.x.device, "triton")


BATCH_NORM_ACT_MAX_POOL_BACKWARD = Op(
    "batch_norm_act_max_pool_backward",
    "Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, Tensor taps, float eps, "
    "int[] kernel_size, int[] stride, int[] padding, bool needs_x",
    arguments=BackwardArguments,
    kernel=_backward_kernel,
    reference=_backward_reference,
    fake=_backward_fake,
    unsupported=lambda a: _check.kernel_dtypes(a.grad, *a[1:6]),
    measured=_backward_choice,
    cost=lambda a: Cost(0, nbytes(a) + nbytes(_backward_fake(a))),
    returns="(Tensor, Tensor, Tensor)",
    differentiable=False,
)


def _backward(
    a: Arguments, results: tuple[Any, ...], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    found = BATCH_NORM_ACT_MAX_POOL_BACKWARD.where_supported(
        grad, a.x, a.weight, a.bias, *results[1:], *a[3:], "x" in needs
    )
    return dict(zip(("x", "weight", "bias"), found, strict=True))


BATCH_NORM_ACT_MAX_POOL = Op(
    "batch_norm_act_max_pool",
    "Tensor x, Tensor weight, Tensor bias, float eps, int[] kernel_size, int[] stride, int[] padding",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=_unsupported,
    # without a measurement PyTorch's own runs
    measured=lambda a: tuning.choice(
        table_key("batch_norm_act_max_pool", a.x.dtype, _pooled(a.x, *a[4:])), a.x.device, "reference"
    ),
    cost=lambda a: Cost(0, nbytes(a) + nbytes(_fake(a))),
    returns="(Tensor, Tensor, Tensor, Tensor)",
    gradient=Gradient(saves=lambda a, needs: ("x", "weight", "bias", 1, 2, 3), backward=_backward),
)
