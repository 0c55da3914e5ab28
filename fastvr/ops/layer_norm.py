"""layer_norm: LayerNorm over the last dimension, one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op, nbytes
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
)
