"""norm_linear: act(LayerNorm(x) @ weight.T + bias) with the LayerNorm folded into the weight, one launch.

With W' = W diag(ln_weight), LayerNorm(x) @ W.T + b is rstd * (x @ W'.T - mean * colsum) + b', where colsum
holds the sums of the rows of W' and b' = b + W @ ln_bias. So the product takes x as it is, and the statistics
of its rows, which the launch before has left (`linear_stats`), are needed only behind it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op, nbytes
from fastvr.ops.linear import as_rows, gemm, table_key
from fastvr.reference.linear import ACTIVATIONS
from fastvr.reference.linear_stats import STATS_CHUNK
from fastvr.reference.norm_linear import norm_linear as reference


def fold_norm(
    ln_weight: torch.Tensor, ln_bias: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A LayerNorm's parameters and those of the linear layer behind it, as :func:`norm_linear` takes them.

    Args:
        ln_weight, ln_bias: [in_features].
        weight: [out_features, in_features], float16 or bfloat16.
        bias: [out_features].

    Returns:
        ``weight * ln_weight``, rounded once to weight's dtype; the sums of its rows *as rounded* (those of
        the exact product are wrong by far more than the rounding where a row's mean is many deviations);
        ``bias + weight @ ln_bias``, None where neither is given. The last two are float32.
    """
    if weight.is_meta:
        # for the sums PyTorch would import its compiler, which takes seconds
        vector = weight.new_empty(weight.shape[0], dtype=torch.float32)
        return torch.empty_like(weight), vector, None if ln_bias is None and bias is None else vector
    exact = weight.double()
    folded = (exact * ln_weight.double()).to(weight.dtype)
    total = None if ln_bias is None else exact @ ln_bias.double()
    if bias is not None:
        total = bias.double() if total is None else total + bias.double()
    return folded, folded.double().sum(1).float(), None if total is None else total.float()


def norm_linear(
    x: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    colsum: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    eps: float,
    act: str = "none",
) -> torch.Tensor:
    """A LayerNorm and the linear layer behind it in one launch. For inference: it has no gradient.

    Computes ``act(rstd * (x @ weight.T - mean * colsum) + bias)``, rounded once. Its error is that of
    LayerNorm and linear layer one after the other where a row varies; one whose elements are all but equal,
    so that ``eps`` is most of its variance, keeps fewer digits.

    Args:
        x: [..., in_features], float16 or bfloat16; float32, where folding costs digits, runs in PyTorch.
        stats: [rows, ceil(in_features / 64), 2], float32: x's, as
            :func:`fastvr.ops.linear_stats.linear_stats` returns them.
        weight, colsum, bias: [out_features, in_features] in x's dtype, [out_features] and [out_features] in
            float32, as :func:`fold_norm` gives them; bias may be in x's dtype too.
        eps: LayerNorm's, added to the variance.
        act: "none", "relu", "gelu" (exact, by erf), "gelu_tanh" or "quick_gelu".

    Returns:
        [..., out_features] in x's dtype.

    Weights are prepared in one dtype: autocast changes nothing.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
        NotImplementedError: a tensor requires a gradient.
    """
    op = "norm_linear"
    for name, tensor in (("x", x), ("stats", stats), ("weight", weight), ("colsum", colsum)):
        _check.operand(op, name, tensor)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [out_features, in_features]; got {list(weight.shape)}")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"{op}: x must be [..., {k}] for a weight of {[n, k]}; got {list(x.shape)}")
    # float64 throughout is how the reference computes the truth
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = math.prod(x.shape[:-1])
    _check.companion(
        op, "stats", stats, (rows, -(-k // STATS_CHUNK), 2), x, dtype=wide, meaning=" (x's rows)"
    )
    _check.companion(op, "weight", weight, (n, k), x, dtype=x.dtype)
    _check.companion(op, "colsum", colsum, (n,), x, dtype=wide)
    _check.companion(op, "bias", bias, (n,), x)
    if bias is not None and bias.dtype not in (x.dtype, wide):
        raise ValueError(f"{op}: bias must be {wide} or {x.dtype}; got {bias.dtype}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0; got {eps}")
    _check.choice(op, "act", act, ACTIVATIONS)
    return NORM_LINEAR(x, stats, weight, colsum, bias, float(eps), act)


class Arguments(NamedTuple):
    x: torch.Tensor
    stats: torch.Tensor
    weight: torch.Tensor
    colsum: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    act: str


def _rows_of(stats: torch.Tensor) -> torch.Tensor:
    """The kernel steps over whole rows; those of a batch's first tokens lie apart."""
    return stats if stats[:1].is_contiguous() else stats.contiguous()


def _kernel(a: Arguments) -> torch.Tensor:
    n = a.weight.shape[0]
    y = backend.empty((*a.x.shape[:-1], n), dtype=a.x.dtype, device=a.x.device)
    if y.numel() == 0:
        return y
    gemm(
        "norm_linear",
        x=as_rows(a.x),
        weight=a.weight,
        bias=_check.dense(a.bias),
        row_stats=_rows_of(a.stats),
        colsum=_check.dense(a.colsum),
        y=y.view(-1, n),
        act=a.act,
        eps=a.eps,
    )
    return y


def _fake(a: Arguments) -> torch.Tensor:
    return a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0]))


def _unsupported(a: Arguments) -> str | None:
    if a.weight.shape[1] == 0:
        return "in_features is 0"
    if a.x.dtype == torch.float32:
        return "float32: a LayerNorm folded into the weight costs it digits"
    return _check.kernel_dtypes(*a)


def _measured(a: Arguments) -> str:
    n, k = a.weight.shape
    key = table_key(math.prod(a.x.shape[:-1]), n, k, a.x.dtype, kind="norm_linear")
    # who asks for it has decided to fold: PyTorch would take several launches
    return tuning.choice(key, a.x.device, "triton")


def _cost(a: Arguments) -> Cost:
    n, k = a.weight.shape
    m = math.prod(a.x.shape[:-1])
    return Cost(2 * m * n * k, nbytes(a) + m * n * a.x.element_size())


NORM_LINEAR = Op(
    "norm_linear",
    "Tensor x, Tensor stats, Tensor weight, Tensor colsum, Tensor? bias, float eps, str act",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
    differentiable=False,
)
