"""layer_norm: LayerNorm over the last dimension, one launch; layer_norm_backward: its gradient, two."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Gradient, Op, nbytes, reference_gradients
from fastvr.ops.linear import unit_rows
from fastvr.reference.layer_norm import layer_norm as reference


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """LayerNorm over the last dimension, with statistics in float32.

    Args:
        x: [..., features], float32, float16 or bfloat16 (float64 runs in PyTorch).
        weight: [features], x's dtype or float32.
        bias: [features], weight's dtype.
        eps: added to the variance.
        out_dtype: the result's dtype; default x's, and float32 under autocast on a GPU, as
            PyTorch has it.

    Returns:
        [..., features].

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
    """
    check_norm("layer_norm", x, weight, bias, eps)
    # autocast leaves LayerNorm alone on a CPU
    if out_dtype is None and x.is_cuda and _check.autocast_dtype(x.device) and x.dtype != torch.float64:
        out_dtype = torch.float32
    return LAYER_NORM(x, weight, bias, float(eps), out_dtype)


def check_norm(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    names: tuple[str, str] = ("weight", "bias"),
) -> None:
    """x, and LayerNorm's parameters for it."""
    _check.operand(op, "x", x)
    _check.operand(op, names[0], weight)
    if x.dim() < 1 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{op}: {names[0]} must be [features] for an x of [..., features]; "
            f"got {list(weight.shape)} and {list(x.shape)}"
        )
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{op}: {names[0]} must be {x.dtype} or float32; got {weight.dtype}")
    _check.companion(op, names[0], weight, (x.shape[-1],), x)
    _check.companion(op, names[1], bias, (x.shape[-1],), x, dtype=weight.dtype)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0; got {eps}")


def _table_key(x: torch.Tensor) -> str:
    n = x.shape[-1]
    return tuning.key("layer_norm", x.dtype, m=tuning.bucket(x.numel() // max(n, 1)), n=n)


class Arguments(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    out_dtype: torch.dtype | None


def _kernel(a: Arguments) -> torch.Tensor:
    from fastvr.kernels.layer_norm import candidate_configs, default_config, launch_layer_norm_fwd

    y = backend.empty(a.x.shape, dtype=a.out_dtype or a.x.dtype, device=a.x.device)
    if y.numel() == 0:
        return y
    rows = unit_rows(a.x)
    assert rows is not None
    arch, n = backend.architecture(a.x.device), rows.shape[1]
    config = tuning.config(
        "layer_norm",
        _table_key(a.x),
        a.x.device,
        default=lambda: default_config(n, arch),
        candidates=lambda: candidate_configs(n, arch),
    )
    launch_layer_norm_fwd(
        x=rows,
        weight=a.weight.contiguous(),
        bias=_check.dense(a.bias),
        y=y.view(rows.shape),
        eps=a.eps,
        config=config,
    )
    return y


def _fake(a: Arguments) -> torch.Tensor:
    return a.x.new_empty(a.x.shape, dtype=a.out_dtype or a.x.dtype)


def _unsupported(a: Arguments) -> str | None:
    return _check.kernel_dtypes(*a)


def _measured(a: Arguments) -> str:
    return tuning.choice(_table_key(a.x), a.x.device, "triton")


def _cost(a: Arguments) -> Cost:
    moved = nbytes(a)
    return Cost(0, moved + a.x.numel() * (a.out_dtype or a.x.dtype).itemsize)


class BackwardArguments(NamedTuple):
    grad: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    residual: torch.Tensor | None
    eps: float
    needs_x: bool
    needs_parameters: bool


def _sizes_of_gradients(a: BackwardArguments) -> tuple[torch.Size, tuple[int]]:
    """What is not needed comes back empty: an operator cannot return None."""
    n = a.weight.shape[0]
    return a.x.shape if a.needs_x else torch.Size([0]), (n if a.needs_parameters else 0,)


_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _backward_key(x: torch.Tensor) -> str:
    n = x.shape[-1]
    return tuning.key("layer_norm_backward", x.dtype, m=tuning.bucket(x.numel() // max(n, 1)), n=n)


def _backward_kernel(a: BackwardArguments) -> _Gradients:
    from fastvr.kernels.layer_norm import (
        bwd_programs,
        candidate_bwd_configs,
        default_bwd_config,
        launch_layer_norm_bwd,
    )

    like_x, like_weight = _sizes_of_gradients(a)
    dx = backend.empty(like_x, dtype=a.x.dtype, device=a.x.device)
    dweight, dbias = (backend.empty(like_weight, dtype=a.weight.dtype, device=a.x.device) for _ in range(2))
    if a.x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    rows, grads = unit_rows(a.x), unit_rows(a.grad)
    assert rows is not None
    assert grads is not None
    arch, (m, n) = backend.architecture(a.x.device), rows.shape
    config = tuning.config(
        "layer_norm_backward",
        _backward_key(a.x),
        a.x.device,
        default=lambda: default_bwd_config(n, arch),
        candidates=lambda: candidate_bwd_configs(n, arch),
    )
    parts = None
    if a.needs_parameters:
        parts = backend.empty((bwd_programs(m, config), 2, n), dtype=torch.float32, device=a.x.device)
    launch_layer_norm_bwd(
        grad=grads,
        x=rows,
        weight=a.weight.contiguous(),
        residual=unit_rows(a.residual) if a.needs_x else None,
        dx=dx.view(rows.shape) if a.needs_x else None,
        parts=parts,
        dweight=dweight if a.needs_parameters else None,
        dbias=dbias if a.needs_parameters else None,
        eps=a.eps,
        config=config,
    )
    return dx, dweight, dbias


def _backward_reference(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    needs_x: bool,
    needs_parameters: bool,
) -> _Gradients:
    wanted = [0] * needs_x + [1, 2] * needs_parameters
    args = (x, weight, torch.zeros_like(weight), eps, grad.dtype)
    found = dict(zip(wanted, reference_gradients(reference, args, grad, wanted), strict=True))
    dweight, dbias = (found.get(i, weight.new_empty(0)) for i in (1, 2))
    dx = found.get(0, x.new_empty(0))
    if needs_x and residual is not None:
        dx = (dx + residual).to(x.dtype)
    return dx, dweight, dbias


def _backward_fake(a: BackwardArguments) -> _Gradients:
    like_x, like_weight = _sizes_of_gradients(a)
    return a.x.new_empty(like_x), a.weight.new_empty(like_weight), a.weight.new_empty(like_weight)


def _backward_unsupported(a: BackwardArguments) -> str | None:
    from fastvr.kernels.layer_norm import MAX_ROW

    if a.weight.shape[0] > MAX_ROW:
        return f"{a.weight.shape[0]} features; the kernel takes at most {MAX_ROW}"
    return _check.kernel_dtypes(*a)


def _backward_cost(a: BackwardArguments) -> Cost:
    return Cost(0, nbytes(a) + nbytes(_backward_fake(a)))


LAYER_NORM_BACKWARD = Op(
    "layer_norm_backward",
    "Tensor grad, Tensor x, Tensor weight, Tensor? residual, float eps, bool needs_x, bool needs_parameters",
    arguments=BackwardArguments,
    kernel=_backward_kernel,
    reference=_backward_reference,
    fake=_backward_fake,
    unsupported=_backward_unsupported,
    measured=lambda a: tuning.choice(_backward_key(a.x), a.x.device, "triton"),
    cost=_backward_cost,
    returns="(Tensor, Tensor, Tensor)",
    differentiable=False,
)


def norm_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    needs: frozenset[str],
    residual: torch.Tensor | None,
    grad_residual: torch.Tensor,
) -> dict[str, torch.Tensor | None]:
    """Gradients of x, ln_weight, ln_bias and residual in ``residual + branch(norm(x))``, by that of what the
    norm gave, ``grad`` [M, N]. Where the residual is x itself, one launch adds both."""
    shared = residual is x and "x" in needs
    dx, dweight, dbias = LAYER_NORM_BACKWARD.where_supported(
        grad.view(x.shape),
        x,
        weight,
        grad_residual if shared else None,
        eps,
        "x" in needs,
        bool(needs & {"ln_weight", "ln_bias"}),
    )
    dresidual = None if shared or residual is None else grad_residual.to(residual.dtype)
    return {"x": dx, "ln_weight": dweight, "ln_bias": dbias, "residual": dresidual}


def _backward(
    a: Arguments, results: tuple[None], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    parameters = bool(needs & {"weight", "bias"})
    args = (grad, a.x, a.weight, None, a.eps, "x" in needs, parameters)
    dx, dweight, dbias = LAYER_NORM_BACKWARD.where_supported(*args)
    return {"x": dx, "weight": dweight, "bias": dbias}


LAYER_NORM = Op(
    "layer_norm",
    "Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType? out_dtype",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
    gradient=Gradient(saves=lambda a, needs: ("x", "weight"), backward=_backward),
)
