"""layernorm_mlp: residual + gamma * fc2(act(fc1(LayerNorm(x)))), two launches.

The first is fc1's product, which normalises x on its way in and activates on its way out; the second is fc2's
with LayerScale and residual.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check, _mkldnn
from fastvr.ops._op import Cost, Op, nbytes
from fastvr.ops.layer_norm import LAYER_NORM, check_norm
from fastvr.ops.linear import LINEAR, as_rows, gemm, result_dtype, unit_rows
from fastvr.reference.layernorm_mlp import layernorm_mlp as reference
from fastvr.reference.linear import ACTIVATIONS


def layernorm_mlp(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    *,
    eps: float = 1e-6,
    act: str = "gelu",
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm, MLP, LayerScale and residual addition of a pre-norm transformer block in two launches.

    Args:
        x: [..., features], float32, float16 or bfloat16 (float64 runs in PyTorch).
        ln_weight, ln_bias: [features], x's dtype or float32.
        fc1_weight, fc1_bias: [hidden, features] and [hidden]; x's dtype.
        fc2_weight, fc2_bias: [out_features, hidden] and [out_features]; fc1_weight's dtype.
        eps: LayerNorm's, added to the variance.
        act: "gelu" (exact, by erf), "gelu_tanh", "relu" or "none".
        gamma: [out_features], any floating dtype: LayerScale.
        residual: [..., out_features], any floating dtype; usually x itself.

    Returns:
        [..., out_features] in the dtype that PyTorch's promotion of fc2's result, gamma and residual gives.

    Under autocast the four MLP parameters are cast to its dtype; x, the LayerNorm's parameters, gamma and
    residual stay as they are.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
    """
    op = "layernorm_mlp"
    check_norm(op, x, ln_weight, ln_bias, eps, ("ln_weight", "ln_bias"))
    _check.operand(op, "fc1_weight", fc1_weight)
    _check.operand(op, "fc2_weight", fc2_weight)
    if (dtype := _check.autocast_dtype(x.device)) is not None:
        fc1_weight, fc2_weight = _check.cast(fc1_weight, dtype), _check.cast(fc2_weight, dtype)
        fc1_bias, fc2_bias = _check.cast_or_none(fc1_bias, dtype), _check.cast_or_none(fc2_bias, dtype)
    elif fc1_weight.dtype != x.dtype:
        raise ValueError(f"{op}: fc1_weight must be {x.dtype}, as x is; got {fc1_weight.dtype}")
    if fc1_weight.dim() != 2 or fc1_weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: fc1_weight must be [hidden, {x.shape[-1]}]; got {list(fc1_weight.shape)}")
    hidden = fc1_weight.shape[0]
    if fc2_weight.dim() != 2 or fc2_weight.shape[1] != hidden:
        raise ValueError(f"{op}: fc2_weight must be [out_features, {hidden}]; got {list(fc2_weight.shape)}")
    n = fc2_weight.shape[0]
    _check.companion(op, "fc1_weight", fc1_weight, (hidden, x.shape[-1]), x)
    _check.companion(op, "fc2_weight", fc2_weight, (n, hidden), x, dtype=fc1_weight.dtype)
    _check.companion(op, "fc1_bias", fc1_bias, (hidden,), x, dtype=fc1_weight.dtype)
    _check.companion(op, "fc2_bias", fc2_bias, (n,), x, dtype=fc1_weight.dtype)
    _check.companion(op, "gamma", gamma, (n,), x)
    _check.companion(op, "residual", residual, (*x.shape[:-1], n), x)
    _check.choice(op, "act", act, ACTIVATIONS)
    return LAYERNORM_MLP(
        x,
        ln_weight,
        ln_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        gamma,
        residual,
        float(eps),
        act,
    )


class Arguments(NamedTuple):
    x: torch.Tensor
    ln_weight: torch.Tensor
    ln_bias: torch.Tensor | None
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor | None
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor | None
    gamma: torch.Tensor | None
    residual: torch.Tensor | None
    eps: float
    act: str


def _kernel(a: Arguments) -> torch.Tensor:
    hidden_features = a.fc1_weight.shape[0]
    n = a.fc2_weight.shape[0]
    y = backend.empty(
        (*a.x.shape[:-1], n), dtype=result_dtype(a.fc1_weight, a.gamma, a.residual), device=a.x.device
    )
    if y.numel() == 0:
        return y
    rows = as_rows(a.x)
    hidden = backend.empty((rows.shape[0], hidden_features), dtype=a.fc1_weight.dtype, device=a.x.device)
    gemm(
        "layernorm_linear",
        x=rows,
        weight=a.fc1_weight,
        bias=_check.dense(a.fc1_bias),
        ln_weight=a.ln_weight.contiguous(),
        ln_bias=_check.dense(a.ln_bias),
        y=hidden,
        act=a.act,
        eps=a.eps,
    )
    gemm(
        "linear",
        x=hidden,
        weight=a.fc2_weight,
        bias=_check.dense(a.fc2_bias),
        gamma=_check.dense(a.gamma),
        residual=unit_rows(a.residual),
        y=y.view(-1, n),
        act="none",
    )
    return y


def _vendor(a: Arguments) -> torch.Tensor | None:
    weights = (a.fc1_weight, a.fc2_weight)
    if _mkldnn.packer() is None and all(_mkldnn.kept(weight) is None for weight in weights):
        return None
    normed = LAYER_NORM(a.x, a.ln_weight, a.ln_bias, a.eps, a.fc1_weight.dtype)
    hidden = LINEAR(normed, a.fc1_weight, a.fc1_bias, None, None, a.act)
    return LINEAR(hidden, a.fc2_weight, a.fc2_bias, a.gamma, a.residual, "none")


def _fake(a: Arguments) -> torch.Tensor:
    dtype = result_dtype(a.fc1_weight, a.gamma, a.residual)
    return a.x.new_empty((*a.x.shape[:-1], a.fc2_weight.shape[0]), dtype=dtype)


def _unsupported(a: Arguments) -> str | None:
    if a.x.shape[-1] == 0:
        return "x has no features"
    return _check.kernel_dtypes(*a)


def _measured(a: Arguments) -> str:
    hidden, features = a.fc1_weight.shape
    m = a.x.numel() // max(features, 1)
    # without a measurement the vendor's GEMM runs
    return tuning.choice(
        tuning.key("layernorm_mlp", a.fc1_weight.dtype, m=tuning.bucket(m), n=hidden, k=features),
        a.x.device,
        "reference",
    )


def _cost(a: Arguments) -> Cost:
    hidden, features = a.fc1_weight.shape
    n = a.fc2_weight.shape[0]
    m = a.x.numel() // max(features, 1)
    moved = nbytes(a)
    moved += 2 * m * hidden * a.fc1_weight.element_size()
    return Cost(
        2 * m * hidden * (features + n),
        moved + m * n * result_dtype(a.fc1_weight, a.gamma, a.residual).itemsize,
    )


LAYERNORM_MLP = Op(
    "layernorm_mlp",
    "Tensor x, Tensor ln_weight, Tensor? ln_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
    "Tensor? fc2_bias, Tensor? gamma, Tensor? residual, float eps, str act",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
    vendor=_vendor,
)
