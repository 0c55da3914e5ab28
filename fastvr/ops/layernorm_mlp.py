"""layernorm_mlp: residual + sample_scale * gamma * dropout(fc2(dropout(act(fc1(LayerNorm(x)))))), two
launches.

The first is fc1's product, which normalises x on its way in and activates on its way out; the second is fc2's
with LayerScale, stochastic depth and residual.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check, linear
from fastvr.ops._op import Cost, Gradient, Op, nbytes
from fastvr.ops.cpu import mkldnn
from fastvr.ops.dropout import draw_seeds, dropped
from fastvr.ops.layer_norm import LAYER_NORM, check_norm, norm_gradients
from fastvr.ops.linear import LINEAR, as_rows, gemm, input_gradient, result_dtype, unit_rows
from fastvr.ops.linear_act_backward import LINEAR_ACT_BACKWARD
from fastvr.ops.linear_backward import Norm, bias_gradient, parameter_gradients, with_gamma
from fastvr.reference.layernorm_mlp import layernorm_mlp as reference
from fastvr.reference.layernorm_mlp import layernorm_mlp_training as reference_training
from fastvr.reference.linear import ACTIVATIONS, activate


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
    sample_scale: torch.Tensor | None = None,
    hidden_dropout_p: float = 0.0,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """The second half of a pre-norm transformer block in two launches: LayerNorm, MLP, LayerScale, stochastic
    depth and residual addition.

    Args:
        x: [..., features], float32, float16 or bfloat16 (float64 runs in PyTorch).
        ln_weight, ln_bias: [features], x's dtype or float32.
        fc1_weight, fc1_bias: [hidden, features] and [hidden]; x's dtype.
        fc2_weight, fc2_bias: [out_features, hidden] and [out_features]; fc1_weight's dtype.
        eps: LayerNorm's, added to the variance.
        act: "gelu" (exact, by erf), "gelu_tanh", "quick_gelu" (``x * sigmoid(1.702 * x)``), "relu" or "none".
        gamma: [out_features], any floating dtype: LayerScale.
        residual: [..., out_features], any floating dtype; usually x itself.
        sample_scale: [x.shape[0]], float32 (float64 for float64 x), without a gradient: a factor for each
            sample's branch, 0 for one that is dropped (stochastic depth). 0 times Inf is NaN.
        hidden_dropout_p, dropout_p: of what the activation and what fc2 give, as
            :func:`fastvr.ops.linear.linear` takes its dropout_p.

    Returns:
        [..., out_features] in the dtype that PyTorch's promotion of fc2's result, gamma and residual gives.

    Under autocast the four MLP parameters are cast to its dtype; x, the LayerNorm's parameters, gamma and
    residual stay as they are.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
    """
    return run(
        checked(
            x,
            ln_weight,
            ln_bias,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            eps=eps,
            act=act,
            gamma=gamma,
            residual=residual,
            sample_scale=sample_scale,
            hidden_dropout_p=hidden_dropout_p,
            dropout_p=dropout_p,
        )
    )


def trains(x: torch.Tensor, **given: Any) -> bool:
    """Whether :func:`layernorm_mlp` would run as one op, for a gradient; where it would not, each layer's
    dropout is as :func:`fastvr.ops.linear.linear` has it."""
    return LAYERNORM_MLP_TRAINING.trains(*checked(x, **given))


def checked(
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
    sample_scale: torch.Tensor | None = None,
    hidden_dropout_p: float = 0.0,
    dropout_p: float = 0.0,
) -> Arguments:
    """The arguments of :func:`layernorm_mlp`, found good, and as autocast has them."""
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
    return Arguments(
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
        _check.sample_scale(op, sample_scale, x),
        hidden_dropout_p=_check.probability(op, "hidden_dropout_p", hidden_dropout_p),
        dropout_p=_check.probability(op, "dropout_p", dropout_p),
    )


def run(a: Arguments) -> torch.Tensor:
    """:func:`layernorm_mlp` of arguments that were found good."""
    if a.hidden_dropout_p == 0 and a.dropout_p == 0:
        return LAYERNORM_MLP(*a[:_INFERENCE])
    if LAYERNORM_MLP_TRAINING.trains(*a):
        hidden_seed, seed = draw_seeds(a.x, a.hidden_dropout_p, a.dropout_p)
        return LAYERNORM_MLP_TRAINING(*a._replace(hidden_seed=hidden_seed, seed=seed))[0]
    normed = LAYER_NORM(a.x, a.ln_weight, a.ln_bias, a.eps, a.fc1_weight.dtype)
    fc1 = linear.Arguments(normed, a.fc1_weight, a.fc1_bias, None, None, a.act, None, a.hidden_dropout_p)
    fc2 = (a.fc2_weight, a.fc2_bias, a.gamma, a.residual, "none", a.sample_scale, a.dropout_p)
    return linear.run(linear.Arguments(linear.run(fc1), *fc2))


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
    sample_scale: torch.Tensor | None = None
    # what only the training form has; the seeds, with their probabilities, are [2] int64
    hidden_dropout_p: float = 0.0
    hidden_seed: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None


_INFERENCE = Arguments._fields.index("hidden_dropout_p")  # so many of them
_PARAMETERS = (
    "Tensor x, Tensor ln_weight, Tensor? ln_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
    "Tensor? fc2_bias, Tensor? gamma, Tensor? residual, float eps, str act, Tensor? sample_scale=None"
)


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
        sample_scale=a.sample_scale,
        residual=unit_rows(a.residual),
        y=y.view(-1, n),
        act="none",
    )
    return y


def _vendor(a: Arguments) -> torch.Tensor | None:
    weights = (a.fc1_weight, a.fc2_weight)
    if mkldnn.packer() is None and all(mkldnn.kept(weight) is None for weight in weights):
        return None
    normed = LAYER_NORM(a.x, a.ln_weight, a.ln_bias, a.eps, a.fc1_weight.dtype)
    hidden = LINEAR(normed, a.fc1_weight, a.fc1_bias, None, None, a.act)
    return LINEAR(hidden, a.fc2_weight, a.fc2_bias, a.gamma, a.residual, "none", a.sample_scale)


def _fake(a: Arguments, device: str | None = None) -> torch.Tensor:
    dtype = result_dtype(a.fc1_weight, a.gamma, a.residual)
    return a.x.new_empty((*a.x.shape[:-1], a.fc2_weight.shape[0]), dtype=dtype, device=device)


def unsupported(a: Arguments) -> str | None:
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


_Trained = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def kernel_training(a: Arguments) -> _Trained:
    """fc1 leaves what the activation is given, and fc2 activates it on its way in: what the activation gives
    need not be kept, nor written. With dropout in between fc1 leaves both, and what fc2 reads is freed
    behind it: on the way in each tile of fc2's columns would draw the random numbers anew, at some 17 integer
    instructions a value, which takes longer than its product."""
    y, hidden, moments = (
        backend.empty(t.shape, dtype=t.dtype, device=a.x.device) for t in fake_training(a, "meta")
    )
    if y.numel() == 0:
        return y, hidden, moments
    activated = None
    if a.hidden_seed is not None:
        activated = backend.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    gemm(
        "layernorm_linear",
        x=as_rows(a.x),
        weight=a.fc1_weight,
        bias=_check.dense(a.fc1_bias),
        ln_weight=a.ln_weight.contiguous(),
        ln_bias=_check.dense(a.ln_bias),
        y=hidden,
        moments=moments,
        act="none" if activated is None else a.act,
        activated=activated,
        dropout_p=a.hidden_dropout_p,
        seed=a.hidden_seed,
        eps=a.eps,
    )
    gemm(
        "act_linear" if activated is None else "linear",
        x=hidden if activated is None else activated,
        weight=a.fc2_weight,
        bias=_check.dense(a.fc2_bias),
        gamma=_check.dense(a.gamma),
        sample_scale=a.sample_scale,
        residual=unit_rows(a.residual),
        y=y.view(-1, y.shape[-1]),
        x_act=a.act if activated is None else "none",
        act="none",
        dropout_p=a.dropout_p,
        seed=a.seed,
    )
    return y, hidden, moments


def fake_training(a: Arguments, device: str | None = None) -> _Trained:
    m, hidden = a.x.numel() // max(a.x.shape[-1], 1), a.fc1_weight.shape[0]
    wide = torch.promote_types(a.x.dtype, torch.float32)
    moments = a.x.new_empty((m, 2), dtype=wide, device=device)
    return _fake(a, device), a.fc1_weight.new_empty((m, hidden), device=device), moments


def _measured_training(a: Arguments) -> str:
    hidden, features = a.fc1_weight.shape
    m = a.x.numel() // max(features, 1)
    drop = {"drop": 1} if a.dropout_p > 0 else {}
    drop |= {"hiddendrop": 1} if a.hidden_dropout_p > 0 else {}
    sizes = {"m": tuning.bucket(m), "n": hidden, "k": features}
    key = tuning.key("layernorm_mlp_training", a.fc1_weight.dtype, **sizes, **drop)
    return tuning.choice(key, a.x.device, "reference")


def cost_training(a: Arguments) -> Cost:
    cost, (_, hidden, moments) = _cost(a), fake_training(a)
    # with dropout in between fc2 reads another one than is kept
    twice = hidden if a.hidden_dropout_p > 0 else None
    return Cost(cost.flops, cost.bytes + nbytes([moments, twice]))


_NORM = frozenset({"x", "ln_weight", "ln_bias"})
_BEFORE_THE_ACTIVATION = _NORM | {"fc1_weight", "fc1_bias"}


def saves_of(a: Arguments, needs: frozenset[str]) -> set[str | int]:
    saves: set[str | int] = set() if needs <= {"residual"} else {"seed"}
    if needs & _BEFORE_THE_ACTIVATION:
        saves |= {"fc2_weight", "gamma", "sample_scale", "hidden_seed", 1}
    if needs & _NORM:
        saves |= {"x", "ln_weight", "fc1_weight"}
    if "fc1_weight" in needs:
        saves |= {"x", "ln_weight", "ln_bias", 2}
    if needs & {"fc2_weight", "fc2_bias"}:
        saves |= {"gamma", "sample_scale"}
    if needs & {"fc2_weight", "gamma"}:
        saves |= {"hidden_seed", 1}
    if "gamma" in needs:
        saves |= {"fc2_weight", "fc2_bias", "gamma", "sample_scale"}
    return saves


def backward(
    a: Arguments, results: tuple[Any, torch.Tensor, torch.Tensor], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor | None]:
    _, hidden, moments = results
    found: dict[str, torch.Tensor | None] = {}
    branch = as_rows(grad)
    if not needs <= {"residual"}:
        branch = dropped(branch, a.dropout_p, a.seed, a.fc1_weight.dtype)
    weighs = bool(needs & {"fc2_weight", "gamma"})
    activated = dhidden = None
    if needs & _BEFORE_THE_ACTIVATION:
        weight = with_gamma(a.fc2_weight, a.gamma)
        drop = (a.sample_scale, a.hidden_dropout_p, a.hidden_seed)
        args = (branch, weight, hidden, a.act, weighs, *drop)
        dhidden, activated = LINEAR_ACT_BACKWARD.where_supported(*args)
    elif weighs:
        activated = activate(hidden.clone(), a.act)
        activated = dropped(activated, a.hidden_dropout_p, a.hidden_seed, hidden.dtype)
    if activated is not None and weighs:
        of_fc2 = parameter_gradients(
            branch,
            activated,
            a.fc2_weight,
            a.fc2_bias,
            a.gamma,
            "fc2_bias" in needs,
            "gamma" in needs,
            sample_scale=a.sample_scale,
        )
        found |= {"fc2_weight": of_fc2.weight, "fc2_bias": of_fc2.bias, "gamma": of_fc2.gamma}
    elif "fc2_bias" in needs:
        found["fc2_bias"] = bias_gradient(branch, a.gamma, a.sample_scale)
    if dhidden is not None and "fc1_weight" in needs:
        norm = Norm(a.ln_weight, a.ln_bias, moments)
        of_fc1 = parameter_gradients(
            dhidden, as_rows(a.x), a.fc1_weight, None, None, "fc1_bias" in needs, norm=norm
        )
        found |= {"fc1_weight": of_fc1.weight, "fc1_bias": of_fc1.bias}
    elif dhidden is not None and "fc1_bias" in needs:
        found["fc1_bias"] = bias_gradient(dhidden, None)
    if dhidden is not None and needs & _NORM:
        found |= norm_gradients(
            input_gradient(dhidden, a.fc1_weight, None), a.x, a.ln_weight, a.eps, needs, a.residual, grad
        )
    elif a.residual is not None:
        found["residual"] = grad.to(a.residual.dtype)
    return found


LAYERNORM_MLP_TRAINING = Op(
    "layernorm_mlp_training",
    f"{_PARAMETERS}, float hidden_dropout_p=0.0, Tensor? hidden_seed=None, "
    "float dropout_p=0.0, Tensor? seed=None",
    arguments=Arguments,
    kernel=kernel_training,
    reference=reference_training,
    fake=fake_training,
    unsupported=unsupported,
    measured=_measured_training,
    cost=cost_training,
    returns="(Tensor, Tensor, Tensor)",
    gradient=Gradient(saves=saves_of, backward=backward),
)


# A traced program holds the operator itself, and somebody may differentiate it later
def _backward_of_traced(
    a: Arguments, results: tuple[None], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor | None]:
    return backward(a, LAYERNORM_MLP_TRAINING(*a), grad, needs)


LAYERNORM_MLP = Op(
    "layernorm_mlp",
    _PARAMETERS,
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=unsupported,
    measured=_measured,
    cost=_cost,
    vendor=_vendor,
    gradient=Gradient(saves=lambda a, needs: Arguments._fields, backward=_backward_of_traced),
    training=LAYERNORM_MLP_TRAINING,
)
