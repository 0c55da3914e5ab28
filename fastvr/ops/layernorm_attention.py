"""layernorm_attention: residual + sample_scale * gamma * dropout(proj(attention(qkv(LayerNorm(x))))). In
training one op, which keeps x, qkv and what attention gives, and nothing in between; else the four ops it is
made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check, linear
from fastvr.ops._heads import refused
from fastvr.ops._op import Cost, Gradient, Op, nbytes
from fastvr.ops.attention import ATTENTION_TRAINING, attend
from fastvr.ops.attention_backward import ATTENTION_BACKWARD
from fastvr.ops.dropout import draw_seeds, dropped
from fastvr.ops.layer_norm import LAYER_NORM, check_norm, norm_gradients
from fastvr.ops.linear import LINEAR, as_rows, gemm, input_gradient, result_dtype
from fastvr.ops.linear_backward import Norm, bias_gradient, parameter_gradients
from fastvr.reference.layernorm_attention import layernorm_attention_training as reference_training


def layernorm_attention(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    sample_scale: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    proj_dropout_p: float = 0.0,
) -> torch.Tensor:
    """The first half of a pre-norm transformer block: LayerNorm, self-attention, LayerScale, stochastic depth
    and residual addition.

    Args:
        x: [B, N, features], float32, float16 or bfloat16 (float64 runs in PyTorch).
        ln_weight, ln_bias: [features], x's dtype or float32.
        qkv_weight, qkv_bias: [3 * num_heads * head_dim, features] and [3 * num_heads * head_dim], all of q,
            then k, then v, each head-major, as timm packs them; x's dtype.
        proj_weight, proj_bias: [out_features, num_heads * head_dim] and [out_features]; qkv_weight's dtype.
        num_heads: number of heads.
        scale: of the scores, head_dim ** -0.5 unless given.
        eps: LayerNorm's, added to the variance.
        gamma: [out_features], any floating dtype: LayerScale.
        residual: [B, N, out_features], any floating dtype; usually x itself.
        sample_scale: [x.shape[0]], float32 (float64 for float64 x), without a gradient: a factor for each
            sample's branch, 0 for one that is dropped (stochastic depth). 0 times Inf is NaN.
        dropout_p: of the attention weights, as :func:`fastvr.ops.attention.attention` takes it.
        proj_dropout_p: of what proj gives, as :func:`fastvr.ops.linear.linear` takes its dropout_p.

    Returns:
        [B, N, out_features] in the dtype that PyTorch's promotion of proj's result, gamma and residual gives.

    Under autocast the four projection parameters are cast to its dtype; x, the LayerNorm's parameters, gamma
    and residual stay as they are.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
    """
    return run(
        checked(
            x,
            ln_weight,
            ln_bias,
            qkv_weight,
            qkv_bias,
            proj_weight,
            proj_bias,
            num_heads,
            scale=scale,
            eps=eps,
            gamma=gamma,
            residual=residual,
            sample_scale=sample_scale,
            dropout_p=dropout_p,
            proj_dropout_p=proj_dropout_p,
        )
    )


def trains(x: torch.Tensor, **given: Any) -> bool:
    """Whether :func:`layernorm_attention` would run as one op, for a gradient; where it would not, dropout's
    random numbers are PyTorch's."""
    return LAYERNORM_ATTENTION_TRAINING.trains(*checked(x, **given))


def checked(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    sample_scale: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    proj_dropout_p: float = 0.0,
) -> Arguments:
    """The arguments of :func:`layernorm_attention`, found good, and as autocast has them."""
    op = "layernorm_attention"
    check_norm(op, x, ln_weight, ln_bias, eps, ("ln_weight", "ln_bias"))
    _check.operand(op, "qkv_weight", qkv_weight)
    _check.operand(op, "proj_weight", proj_weight)
    if x.dim() != 3:
        raise ValueError(f"{op}: x must be [B, N, features]; got {list(x.shape)}")
    if (dtype := _check.autocast_dtype(x.device)) is not None:
        qkv_weight, proj_weight = _check.cast(qkv_weight, dtype), _check.cast(proj_weight, dtype)
        qkv_bias, proj_bias = _check.cast_or_none(qkv_bias, dtype), _check.cast_or_none(proj_bias, dtype)
    elif qkv_weight.dtype != x.dtype:
        raise ValueError(f"{op}: qkv_weight must be {x.dtype}, as x is; got {qkv_weight.dtype}")
    _check.heads(op, num_heads)
    features = x.shape[-1]
    if qkv_weight.dim() != 2 or qkv_weight.shape[0] == 0 or qkv_weight.shape[0] % (3 * num_heads):
        raise ValueError(
            f"{op}: qkv_weight must be [3 * num_heads * head_dim, {features}] with num_heads={num_heads}; "
            f"got {list(qkv_weight.shape)}"
        )
    width = qkv_weight.shape[0] // 3
    if proj_weight.dim() != 2 or proj_weight.shape[1] != width:
        raise ValueError(f"{op}: proj_weight must be [out_features, {width}]; got {list(proj_weight.shape)}")
    n = proj_weight.shape[0]
    _check.companion(op, "qkv_weight", qkv_weight, (3 * width, features), x)
    _check.companion(op, "proj_weight", proj_weight, (n, width), x, dtype=qkv_weight.dtype)
    _check.companion(op, "qkv_bias", qkv_bias, (3 * width,), x, dtype=qkv_weight.dtype)
    _check.companion(op, "proj_bias", proj_bias, (n,), x, dtype=qkv_weight.dtype)
    _check.companion(op, "gamma", gamma, (n,), x)
    _check.companion(op, "residual", residual, (*x.shape[:-1], n), x)
    scale = _check.scale(op, scale, width // num_heads)
    return Arguments(
        x,
        ln_weight,
        ln_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        gamma,
        residual,
        num_heads,
        scale,
        float(eps),
        _check.sample_scale(op, sample_scale, x),
        _check.probability(op, "dropout_p", dropout_p),
        proj_dropout_p=_check.probability(op, "proj_dropout_p", proj_dropout_p),
    )


def run(a: Arguments) -> torch.Tensor:
    if LAYERNORM_ATTENTION_TRAINING.trains(*a):
        seed, proj_seed = draw_seeds(a.x, a.dropout_p, a.proj_dropout_p)
        return LAYERNORM_ATTENTION_TRAINING(*a._replace(seed=seed, proj_seed=proj_seed))[0]
    narrow = None if a.qkv_weight.dtype == a.x.dtype else a.qkv_weight.dtype
    normed = LAYER_NORM(a.x, a.ln_weight, a.ln_bias, a.eps, narrow)
    qkv = LINEAR(normed, a.qkv_weight, a.qkv_bias, None, None, "none")
    attended = attend(qkv, a.num_heads, a.scale, a.dropout_p)
    return linear.run(projection(a, attended))


def projection(a: Arguments, attended: torch.Tensor) -> linear.Arguments:
    """The arguments of the last product."""
    drop = (a.sample_scale, a.proj_dropout_p, a.proj_seed)
    return linear.Arguments(attended, a.proj_weight, a.proj_bias, a.gamma, a.residual, "none", *drop)


class Arguments(NamedTuple):
    x: torch.Tensor
    ln_weight: torch.Tensor
    ln_bias: torch.Tensor | None
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor | None
    gamma: torch.Tensor | None
    residual: torch.Tensor | None
    num_heads: int
    scale: float
    eps: float
    sample_scale: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None  # with dropout_p, [2] int64
    proj_dropout_p: float = 0.0
    proj_seed: torch.Tensor | None = None  # with proj_dropout_p, [2] int64


_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def kernel(a: Arguments) -> _Results:
    _, qkv, _, _, moments = fake(a, "meta")
    qkv = backend.empty(qkv.shape, dtype=qkv.dtype, device=a.x.device)
    moments = backend.empty(moments.shape, dtype=moments.dtype, device=a.x.device)
    if qkv.numel() > 0:
        gemm(
            "layernorm_linear",
            x=as_rows(a.x),
            weight=a.qkv_weight,
            bias=_check.dense(a.qkv_bias),
            ln_weight=a.ln_weight.contiguous(),
            ln_bias=_check.dense(a.ln_bias),
            y=as_rows(qkv),
            moments=moments,
            act="none",
            eps=a.eps,
        )
    attended, lse = ATTENTION_TRAINING.kernel(qkv, a.num_heads, a.scale, a.dropout_p, a.seed)
    y = LINEAR.kernel(*projection(a, attended))
    return y, qkv, attended, lse, moments


def fake(a: Arguments, device: str | None = None) -> _Results:
    batch, n, _ = a.x.shape
    width = a.qkv_weight.shape[0] // 3
    wide = torch.promote_types(a.qkv_weight.dtype, torch.float32)

    def empty(*size: int, dtype: torch.dtype = a.qkv_weight.dtype) -> torch.Tensor:
        return a.x.new_empty(size, dtype=dtype, device=device)

    return (
        empty(batch, n, a.proj_weight.shape[0], dtype=result_dtype(a.qkv_weight, a.gamma, a.residual)),
        empty(batch, n, 3 * width),
        empty(batch, n, width),
        empty(batch, a.num_heads, n, dtype=wide),
        empty(batch * n, 2, dtype=torch.promote_types(a.x.dtype, torch.float32)),
    )


def unsupported(a: Arguments) -> str | None:
    if 0 in a.qkv_weight.shape:
        return "x has no features"
    return refused(a.proj_weight.shape[1] // a.num_heads, a.scale) or _check.kernel_dtypes(*a)


def _measured(a: Arguments) -> str:
    batch, n, features = a.x.shape
    width = a.proj_weight.shape[1]
    sizes = {"n": n, "h": a.num_heads, "d": width // a.num_heads, "k": features}
    sizes |= {"drop": 1} if a.dropout_p > 0 else {}
    sizes |= {"projdrop": 1} if a.proj_dropout_p > 0 else {}
    key = tuning.key("layernorm_attention_training", a.qkv_weight.dtype, b=tuning.bucket(batch), **sizes)
    return tuning.choice(key, a.x.device, "reference")


def cost(a: Arguments) -> Cost:
    batch, n, features = a.x.shape
    (out, width), results = a.proj_weight.shape, fake(a, "meta")
    flops = 2 * batch * n * width * (3 * features + out) + 4 * batch * n * n * width
    # qkv and what attention gives are read again
    return Cost(flops, nbytes(a) + nbytes(results) + nbytes(results[1:3]))


_NORM = frozenset({"x", "ln_weight", "ln_bias"})
_BEFORE_ATTENTION = _NORM | {"qkv_weight", "qkv_bias"}


def saves_of(a: Arguments, needs: frozenset[str]) -> set[str | int]:
    saves: set[str | int] = set() if needs <= {"residual"} else {"proj_seed"}
    if needs & _BEFORE_ATTENTION:
        saves |= {"proj_weight", "gamma", "sample_scale", "seed", 1, 2, 3}
    if needs & _NORM:
        saves |= {"x", "ln_weight", "qkv_weight"}
    if "qkv_weight" in needs:
        saves |= {"x", "ln_weight", "ln_bias", 4}
    if needs & {"proj_weight", "proj_bias"}:
        saves |= {"gamma", "sample_scale"}
    if needs & {"proj_weight", "gamma"}:
        saves.add(2)
    if "gamma" in needs:
        saves |= {"proj_weight", "proj_bias", "gamma", "sample_scale"}
    return saves


def backward(
    a: Arguments, results: tuple[Any, ...], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor | None]:
    _, qkv, attended, lse, moments = results
    found: dict[str, torch.Tensor | None] = {}
    branch = grad
    if not needs <= {"residual"}:
        branch = dropped(as_rows(grad), a.proj_dropout_p, a.proj_seed, a.qkv_weight.dtype).view(grad.shape)
    if needs & {"proj_weight", "gamma"}:
        of_proj = parameter_gradients(
            as_rows(branch),
            as_rows(attended),
            a.proj_weight,
            a.proj_bias,
            a.gamma,
            "proj_bias" in needs,
            "gamma" in needs,
            sample_scale=a.sample_scale,
        )
        found |= {"proj_weight": of_proj.weight, "proj_bias": of_proj.bias, "gamma": of_proj.gamma}
    elif "proj_bias" in needs:
        found["proj_bias"] = bias_gradient(as_rows(branch), a.gamma, a.sample_scale)
    if needs & _BEFORE_ATTENTION:
        of_attended = input_gradient(branch, a.proj_weight, a.gamma, a.sample_scale)
        numbers = (a.num_heads, a.scale, a.dropout_p, a.seed)
        dqkv = ATTENTION_BACKWARD.where_supported(of_attended, qkv, attended, lse, *numbers)
        rows = as_rows(dqkv)
        if "qkv_weight" in needs:
            norm = Norm(a.ln_weight, a.ln_bias, moments)
            of_qkv = parameter_gradients(
                rows, as_rows(a.x), a.qkv_weight, None, None, "qkv_bias" in needs, norm=norm
            )
            found |= {"qkv_weight": of_qkv.weight, "qkv_bias": of_qkv.bias}
        elif "qkv_bias" in needs:
            found["qkv_bias"] = bias_gradient(rows, None)
    if needs & _NORM:
        normed = input_gradient(rows, a.qkv_weight, None)
        found |= norm_gradients(normed, a.x, a.ln_weight, a.eps, needs, a.residual, grad)
    elif a.residual is not None:
        found["residual"] = grad.to(a.residual.dtype)
    return found


LAYERNORM_ATTENTION_TRAINING = Op(
    "layernorm_attention_training",
    "Tensor x, Tensor ln_weight, Tensor? ln_bias, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, "
    "Tensor? proj_bias, Tensor? gamma, Tensor? residual, int num_heads, float scale, float eps, "
    "Tensor? sample_scale=None, float dropout_p=0.0, Tensor? seed=None, "
    "float proj_dropout_p=0.0, Tensor? proj_seed=None",
    arguments=Arguments,
    kernel=kernel,
    reference=reference_training,
    fake=fake,
    unsupported=unsupported,
    measured=_measured,
    cost=cost,
    returns="(Tensor, Tensor, Tensor, Tensor, Tensor)",
    gradient=Gradient(saves=saves_of, backward=backward),
)
