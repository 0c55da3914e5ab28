"""linear_stats: linear, and the statistics of its rows for the LayerNorm behind it, one launch."""

from __future__ import annotations

import math

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op, nbytes
from fastvr.ops.linear import Arguments, as_rows, check_linear, gemm, result_dtype, table_key, unit_rows
from fastvr.reference.linear_stats import STATS_CHUNK
from fastvr.reference.linear_stats import linear_stats as reference


def linear_stats(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    act: str = "none",
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`fastvr.ops.linear.linear`, and with it what :func:`fastvr.ops.norm_linear.norm_linear` needs to
    normalise the result. For inference: it has no gradient.

    Args:
        x, weight, bias, act, gamma, residual: ``linear``'s.

    Returns:
        ``linear``'s result, and ``stats`` [rows, ceil(out_features / 64), 2] in float32: of each 64 columns
        of a row, in the dtype it is stored in, the mean and the sum of squared deviations from it.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
        NotImplementedError: a tensor requires a gradient.
    """
    x, weight, bias = check_linear("linear_stats", x, weight, bias, act, gamma, residual)
    return LINEAR_STATS(x, weight, bias, gamma, residual, act)


def _stats_shape(a: Arguments) -> tuple[int, int, int]:
    return math.prod(a.x.shape[:-1]), -(-a.weight.shape[0] // STATS_CHUNK), 2


def _kernel(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    n = a.weight.shape[0]
    y = backend.empty((*a.x.shape[:-1], n), dtype=result_dtype(a.x, a.gamma, a.residual), device=a.x.device)
    stats = backend.empty(_stats_shape(a), dtype=torch.float32, device=a.x.device)
    if y.numel() == 0:
        return y, stats
    gemm(
        "linear_stats",
        x=as_rows(a.x),
        weight=a.weight,
        bias=_check.dense(a.bias),
        gamma=_check.dense(a.gamma),
        residual=unit_rows(a.residual),
        y=y.view(-1, n),
        stats=stats,
        act=a.act,
    )
    return y, stats


def _fake(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = result_dtype(a.x, a.gamma, a.residual)
    y = a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0]), dtype=dtype)
    return y, a.x.new_empty(_stats_shape(a), dtype=torch.promote_types(dtype, torch.float32))


def _unsupported(a: Arguments) -> str | None:
    if a.weight.shape[1] == 0:
        return "in_features is 0"
    return _check.kernel_dtypes(*a)


def _measured(a: Arguments) -> str:
    n, k = a.weight.shape
    residual = a.residual is not None
    key = table_key(math.prod(a.x.shape[:-1]), n, k, a.x.dtype, kind="linear_stats", residual=residual)
    # who asks for it has decided to fold: PyTorch would take several launches
    return tuning.choice(key, a.x.device, "triton")


def _cost(a: Arguments) -> Cost:
    n, k = a.weight.shape
    m = math.prod(a.x.shape[:-1])
    moved = nbytes(a) + m * n * result_dtype(a.x, a.gamma, a.residual).itemsize
    return Cost(2 * m * n * k, moved + 4 * math.prod(_stats_shape(a)))


LINEAR_STATS = Op(
    "linear_stats",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? residual, str act",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
    returns="(Tensor, Tensor)",
    differentiable=False,
)
