"""batch_norm_act: y = act(bn(x) + residual), BatchNorm in training, three launches; so is its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Gradient, Op, nbytes
from fastvr.ops.linear import result_dtype
from fastvr.reference import batch_norm_act as reference
from fastvr.reference.conv_bn_relu import ACTIVATIONS

_Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    act: str = "relu",
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
) -> _Statistics:
    """BatchNorm, by the batch's own statistics or given ones, with residual and activation.

    Computes ``act((x - mean) / sqrt(var + eps) * weight + bias + residual)`` with each channel's mean and
    biased variance over all pixels of all samples, in float32, of x as stored; the result is rounded once.
    Running statistics are the caller's affair.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16 (float64 runs in PyTorch); channels_last is fast, what
            lies otherwise is copied.
        weight: [C], x's dtype or float32.
        bias: [C], weight's dtype.
        eps: added to the variance, above 0.
        residual: [N, C, H, W], any floating dtype.
        act: "none" or "relu".
        running_mean, running_var: [C], float32 or x's dtype, both or neither: what to normalise by instead of
            the batch's. They get no gradient.

    Returns:
        y: [N, C, H, W], channels_last, in the dtype that PyTorch's promotion of x and residual gives.
        mean, var: [C], float32 (float64 for float64), without gradient; 0 for an empty batch. Those given,
            where they are.

    Under autocast nothing is cast.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it. One pixel a channel in
            all has no variance: as PyTorch says it.
    """
    op = "batch_norm_act"
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{op}: {missing} must be given with its companion, or both be None; got None")
    check_batch_norm_act(op, x, weight, bias, eps, measured=running_mean is None)
    _check.companion(op, "residual", residual, tuple(x.shape), x)
    _check.choice(op, "act", act, ACTIVATIONS)
    for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
        _check.companion(op, name, vector, (x.shape[1],), x)
        if vector is not None and vector.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{op}: {name} must be {x.dtype} or float32; got {vector.dtype}")
        if vector is not None and vector.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} must not require a gradient; it gets none")
    y, mean, var = BATCH_NORM_ACT(x, weight, bias, float(eps), residual, act, running_mean, running_var)
    if running_mean is None or running_var is None:
        return y, mean, var
    return y, running_mean, running_var


def check_batch_norm_act(
    op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *, measured: bool = True
) -> None:
    """What the ops of BatchNorm in training share; ``measured``: they take the batch's statistics."""
    _check.operand(op, "x", x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must be [N, C, H, W]; got {list(x.shape)}")
    if measured and x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    _check.companion(op, "weight", weight, (x.shape[1],), x)
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: weight must be {x.dtype} or float32; got {weight.dtype}")
    _check.companion(op, "bias", bias, (x.shape[1],), x, dtype=weight.dtype)
    if not eps > 0:
        raise ValueError(f"{op}: eps must be above 0; got {eps}")


def fuses_batch_norm_act(
    x: torch.Tensor, bn: torch.nn.BatchNorm2d, residual: torch.Tensor | None, act: str
) -> bool:
    """Whether the kernel runs for ``bn``, an affine one that is trained, on ``x``: where it does not,
    PyTorch's own module costs less than an op that hands its statistics back."""
    return (
        x.dim() == 4
        and x.dtype in _check.KERNEL_DTYPES
        and bn.weight.dtype in (x.dtype, torch.float32)
        and bn.weight.shape[0] == x.shape[1]
        and bn.eps > 0
        and (bn.running_mean is None or bn.running_mean.dtype in (x.dtype, torch.float32))
        and (residual is None or residual.shape == x.shape)
        and BATCH_NORM_ACT.chosen(x, bn.weight, bn.bias, float(bn.eps), residual, act, None, None)
    )


def map_rows(x: torch.Tensor) -> torch.Tensor:
    """The pixels of a map, [M, C]; a copy where they are not channels_last."""
    pixels = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return pixels.reshape(-1, x.shape[1])


def map_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return backend.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def table_key(op: str, dtype: torch.dtype, shape: Sequence[int]) -> str:
    n, c, h, w = shape
    return tuning.key(op, dtype, m=tuning.bucket(n * h * w), c=c)


def row_config(op: str, x: torch.Tensor) -> tuning.Config:
    from fastvr.kernels.batch_norm_stats import candidate_configs, default_config

    c, arch = x.shape[1], backend.architecture(x.device)
    return tuning.config(
        op,
        table_key(op, x.dtype, x.shape),
        x.device,
        default=lambda: default_config(c, x.dtype, arch),
        candidates=lambda: candidate_configs(c, x.dtype, arch),
    )


def reduction_parts(rows: torch.Tensor, sums: int, config: tuning.Config) -> torch.Tensor:
    """What the programs that reduce leave: ``sums`` values of each channel from each."""
    from fastvr.kernels.batch_norm_stats import rows_a_part

    m, c = rows.shape
    size = (-(-m // rows_a_part(m, c, config)), sums, c)
    return backend.empty(size, dtype=torch.float32, device=rows.device)


def measure(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> None:
    """Each channel's mean and biased variance, written to ``mean`` and ``var``."""
    from fastvr.kernels.batch_norm_stats import launch_batch_norm_stats

    rows, config = map_rows(x), row_config("batch_norm_act", x)
    launch_batch_norm_stats(x=rows, parts=reduction_parts(rows, 3, config), mean=mean, var=var, config=config)


def normalise(
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """``relu((x - mean) / sqrt(var + eps) * weight + bias)`` by the kernel, of statistics that are known."""
    from fastvr.kernels.batch_norm_act import launch_batch_norm_act_fwd

    y = map_like(x, x.dtype)
    launch_batch_norm_act_fwd(
        x=map_rows(x),
        mean=mean,
        var=var,
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        residual=None,
        y=map_rows(y),
        eps=eps,
        act="relu",
        config=row_config("batch_norm_act", x),
    )
    return y


def _unsupported(x: torch.Tensor, *others: object) -> str | None:
    return _check.too_many_pixels(x.numel() // x.shape[1]) or _check.kernel_dtypes(x, *others)


class Arguments(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    residual: torch.Tensor | None
    act: str
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None


def _kernel(a: Arguments) -> _Statistics:
    from fastvr.kernels.batch_norm_act import launch_batch_norm_act_fwd

    y = map_like(a.x, result_dtype(a.x, a.residual))
    # empty where they are given: an operator must not return its argument
    size = a.x.shape[1] if a.running_mean is None else 0
    mean, var = (backend.empty((size,), dtype=torch.float32, device=a.x.device) for _ in range(2))
    if a.x.numel() == 0:
        return y, mean.zero_(), var.zero_()
    rows, config = map_rows(a.x), row_config("batch_norm_act", a.x)
    if a.running_mean is None:
        measure(a.x, mean, var)
    launch_batch_norm_act_fwd(
        x=rows,
        mean=mean if a.running_mean is None else a.running_mean.contiguous(),
        var=var if a.running_var is None else a.running_var.contiguous(),
        weight=a.weight.contiguous(),
        bias=a.bias.contiguous(),
        residual=None if a.residual is None else map_rows(a.residual),
        y=map_rows(y),
        eps=a.eps,
        act=a.act,
        config=config,
    )
    return y, mean, var


def _fake(a: Arguments) -> _Statistics:
    dtype, device = result_dtype(a.x, a.residual), a.x.device
    y = torch.empty(a.x.shape, dtype=dtype, device=device, memory_format=torch.channels_last)
    wide = torch.promote_types(a.x.dtype, torch.float32)
    size = a.x.shape[1] if a.running_mean is None else 0
    mean, var = (a.x.new_empty(size, dtype=wide) for _ in range(2))
    return y, mean, var


class BackwardArguments(NamedTuple):
    grad: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    needs_x: bool
    needs_parameters: bool
    needs_residual: bool
    frozen: bool  # the statistics are not the batch's


_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _backward_kernel(a: BackwardArguments) -> _Gradients:
    from fastvr.kernels.batch_norm_act import launch_batch_norm_act_bwd

    # what is not needed comes back empty: an operator cannot return None
    dx, dweight, dbias, dresidual = (
        backend.empty((0,), dtype=dtype, device=a.x.device)
        for dtype in (a.x.dtype, a.weight.dtype, a.weight.dtype, a.grad.dtype)
    )
    if a.needs_x:
        dx = map_like(a.x, a.x.dtype)
    if a.needs_parameters:
        dweight, dbias = (
            backend.empty(a.weight.shape, dtype=a.weight.dtype, device=a.x.device) for _ in range(2)
        )
    if a.needs_residual:
        dresidual = map_like(a.x, a.grad.dtype)
    if a.x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    rows, config = map_rows(a.x), row_config("batch_norm_act_backward", a.x)
    parts = sums = None
    if a.needs_parameters or (a.needs_x and not a.frozen):
        parts = reduction_parts(rows, 2, config)
        sums = backend.empty((2, a.x.shape[1]), dtype=torch.float32, device=a.x.device)
    launch_batch_norm_act_bwd(
        grad=map_rows(a.grad),
        x=rows,
        y=None if a.y is None else map_rows(a.y),
        mean=a.mean.contiguous(),
        var=a.var.contiguous(),
        weight=a.weight.contiguous(),
        bias=_check.dense(a.bias),
        parts=parts,
        sums=sums,
        dx=map_rows(dx) if a.needs_x else None,
        dweight=dweight if a.needs_parameters else None,
        dbias=dbias if a.needs_parameters else None,
        dresidual=map_rows(dresidual) if a.needs_residual else None,
        frozen=a.frozen,
        eps=a.eps,
        config=config,
    )
    return dx, dweight, dbias, dresidual


def _backward_fake(a: BackwardArguments) -> _Gradients:
    def like_x(needed: bool, dtype: torch.dtype) -> torch.Tensor:
        if not needed:
            return a.x.new_empty(0, dtype=dtype)
        return torch.empty(a.x.shape, dtype=dtype, device=a.x.device, memory_format=torch.channels_last)

    dweight, dbias = (a.weight.new_empty(a.weight.shape if a.needs_parameters else 0) for _ in range(2))
    return like_x(a.needs_x, a.x.dtype), dweight, dbias, like_x(a.needs_residual, a.grad.dtype)


BATCH_NORM_ACT_BACKWARD = Op(
    "batch_norm_act_backward",
    "Tensor grad, Tensor x, Tensor? y, Tensor mean, Tensor var, Tensor weight, Tensor? bias, float eps, "
    "bool needs_x, bool needs_parameters, bool needs_residual, bool frozen",
    arguments=BackwardArguments,
    kernel=_backward_kernel,
    reference=reference.batch_norm_act_backward,
    fake=_backward_fake,
    unsupported=lambda a: _unsupported(a.x, *a),
    measured=lambda a: tuning.choice(
        table_key("batch_norm_act_backward", a.x.dtype, a.x.shape), a.x.device, "triton"
    ),
    cost=lambda a: Cost(0, nbytes(a) + nbytes(_backward_fake(a))),
    returns="(Tensor, Tensor, Tensor, Tensor)",
    differentiable=False,
)


def _backward(
    a: Arguments,
    results: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor],
    grad: torch.Tensor,
    needs: frozenset[str],
) -> dict[str, torch.Tensor]:
    y, mean, var = results
    frozen = a.running_mean is not None
    if a.running_mean is not None and a.running_var is not None:
        mean, var = a.running_mean, a.running_var
    parameters = bool(needs & {"weight", "bias"})
    # without an activation nothing stands between the residual and the result
    masked = "residual" in needs and a.act == "relu"
    bias = a.bias if a.act == "relu" and a.residual is None else None
    found = {"residual": grad}
    if "x" in needs or parameters or masked:
        dx, dweight, dbias, dresidual = BATCH_NORM_ACT_BACKWARD.where_supported(
            grad, a.x, y, mean, var, a.weight, bias, a.eps, "x" in needs, parameters, masked, frozen
        )
        found = {"x": dx, "weight": dweight, "bias": dbias, "residual": dresidual if masked else grad}
    if a.residual is not None:
        found["residual"] = found["residual"].to(a.residual.dtype)
    return found


def _saves(a: Arguments, needs: frozenset[str]) -> tuple[str | int, ...]:
    """The result only shows where the activation let through; without a residual x and the bias tell too."""
    statistics = (1, 2) if a.running_mean is None else ("running_mean", "running_var")
    if a.act == "none":
        return "x", "weight", *statistics
    return "x", "weight", *statistics, "bias" if a.residual is None else 0


BATCH_NORM_ACT = Op(
    "batch_norm_act",
    "Tensor x, Tensor weight, Tensor bias, float eps, Tensor? residual, str act, Tensor? running_mean, "
    "Tensor? running_var",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference.batch_norm_act,
    fake=_fake,
    unsupported=lambda a: _unsupported(*a),
    # without a measurement PyTorch's own runs
    measured=lambda a: tuning.choice(
        table_key("batch_norm_act", a.x.dtype, a.x.shape), a.x.device, "reference"
    ),
    cost=lambda a: Cost(0, nbytes(a) + nbytes(_fake(a))),
    returns="(Tensor, Tensor, Tensor)",
    gradient=Gradient(
        saves=_saves,
        backward=_backward,
    ),
)
