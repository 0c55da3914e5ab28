"""linear: y = residual + sample_scale * gamma * dropout(act(x @ weight.T + bias)), one launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Gradient, Op, nbytes, reference_gradients
from fastvr.ops.cpu import mkldnn
from fastvr.ops.dropout import draw_seed, dropped
from fastvr.ops.linear_backward import bias_gradient, parameter_gradients, with_gamma
from fastvr.reference.linear import ACTIVATIONS, activate, scale_samples
from fastvr.reference.linear import linear as reference

if TYPE_CHECKING:
    from fastvr.kernels.linear_configs import Kind


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    act: str = "none",
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    sample_scale: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with its activation, dropout, LayerScale, stochastic depth and residual addition in one
    launch.

    Computes ``residual + sample_scale * gamma * dropout(act(x @ weight.T + bias))``; products are accumulated
    in float32 and the result is rounded once.

    Args:
        x: [..., in_features], float32, float16 or bfloat16 (float64 runs in PyTorch).
        weight: [out_features, in_features], x's dtype.
        bias: [out_features], x's dtype.
        act: "none", "relu", "gelu" (exact, by erf), "gelu_tanh" or "quick_gelu" (``x * sigmoid(1.702 * x)``).
        gamma: [out_features], any floating dtype: LayerScale (Touvron et al., 2021).
        residual: [..., out_features], any floating dtype.
        sample_scale: [x.shape[0]], float32 (float64 with it), without a gradient: a factor for each sample,
            0 for one whose branch is dropped (stochastic depth, Huang et al., 2016). 0 times Inf is NaN.
        dropout_p: the probability with which each value behind the activation is dropped, 0 to 1; the others
            are divided by 1 - dropout_p. A dropped Inf is NaN, as PyTorch's is. Without ``seed`` the random
            numbers are those of PyTorch's dropout where its product runs; the kernel's are of the same
            distribution, Philox 4x32-10 at each value's row and column, by a seed that PyTorch's generator
            draws on the device. So ``torch.manual_seed`` decides, and a CUDA graph draws anew at each replay.
        seed: [2] int64 on x's device, with dropout_p: what to draw by, on every backend the same.

    Returns:
        [..., out_features] in the dtype that PyTorch's promotion of x, gamma and residual gives.

    Under autocast x, weight and bias are cast to its dtype; gamma and residual stay as they are.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
    """
    return run(checked(x, weight, bias, act, gamma, residual, sample_scale, dropout_p, seed))


def checked(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    act: str = "none",
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    sample_scale: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> Arguments:
    """The arguments of :func:`linear`, found good, and as autocast has them."""
    sample_scale = _check.sample_scale("linear", sample_scale, x)
    x, weight, bias = check_linear("linear", x, weight, bias, act, gamma, residual)
    dropout_p = _check.probability("linear", "dropout_p", dropout_p)
    seed = _check.seed("linear", seed, x)
    return Arguments(x, weight, bias, gamma, residual, act, sample_scale, dropout_p, seed)


def run(a: Arguments, draw: Callable[[torch.Tensor], torch.Tensor | None] | None = None) -> torch.Tensor:
    """:func:`linear` of arguments that were found good. ``draw`` gives sample_scale, where modules would:
    behind dropout, whose random numbers come first where they are PyTorch's."""
    by_place = a.dropout_p == 0 or a.seed is not None or LINEAR.runs(*a)
    y = a.x if by_place else F.dropout(LINEAR(a.x, a.weight, a.bias, None, None, a.act), a.dropout_p)
    if draw is not None:
        a = a._replace(sample_scale=draw(y))
    if not by_place:
        y = scale_samples(y if a.gamma is None else y * a.gamma, a.sample_scale)
        return y if a.residual is None else a.residual + y
    if a.dropout_p == 0:
        return LINEAR(*a[:7])
    return LINEAR(*a[:8], draw_seed(a.x) if a.seed is None else a.seed)


def check_linear(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    act: str,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A linear layer's arguments; returns x, weight and bias as autocast has them."""
    _check.operand(op, "x", x)
    _check.operand(op, "weight", weight)
    if (dtype := _check.autocast_dtype(x.device)) is not None:
        x, weight, bias = _check.cast(x, dtype), _check.cast(weight, dtype), _check.cast_or_none(bias, dtype)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be [out_features, in_features]; got {list(weight.shape)}")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"{op}: x must be [..., {k}] for a weight of {[n, k]}; got {list(x.shape)}")
    _check.companion(op, "weight", weight, (n, k), x, dtype=x.dtype)
    _check.companion(op, "bias", bias, (n,), x, dtype=x.dtype)
    _check.companion(op, "gamma", gamma, (n,), x)
    _check.companion(op, "residual", residual, (*x.shape[:-1], n), x)
    _check.choice(op, "act", act, ACTIVATIONS)
    return x, weight, bias


def result_dtype(x: torch.Tensor, *others: torch.Tensor | None) -> torch.dtype:
    """The dtype that PyTorch's promotion gives to x combined with ``others``."""
    return functools.reduce(torch.promote_types, (t.dtype for t in others if t is not None), x.dtype)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, features]: a view where its strides allow (a batch's class tokens do), else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    # kernels step along the features in 32 bits
    return rows if rows.shape[-1] * rows.stride(-1) < 2**31 else rows.contiguous()


def unit_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """x as [rows, features] whose features are contiguous."""
    if x is None:
        return None
    rows = as_rows(x)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def table_key(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    kind: Kind = "linear",
    residual: bool = False,
    dropout: bool = False,
) -> str:
    """A residual is part of the key: it is as much to read as the result is to write. So is dropout, whose
    random numbers take an epilogue's time."""
    drop = {"drop": 1} if dropout else {}
    return tuning.key(kind, dtype, m=tuning.bucket(m), n=n, k=k, residual=int(residual), **drop)


def gemm(
    kind: Kind,
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    residual: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    **others: Any,
) -> None:
    """Write the product of x [m, k] and weight [n, k], with all that surrounds it, to y [m, n].

    ``kind`` is the name of what chooses the configuration; ``others`` are ``launch_linear_fwd``'s.
    """
    from fastvr.kernels.linear import candidate_configs, default_config, launch_linear_fwd

    (m, k), n = x.shape, weight.shape[0]
    if k * weight.stride(1) >= 2**31:
        weight = weight.contiguous()  # as for x: the kernel steps along the features in 32 bits
    dtype, device = weight.dtype, y.device
    arch, dropout = backend.architecture(device), seed is not None
    config = tuning.config(
        kind,
        table_key(m, n, k, dtype, kind=kind, residual=residual is not None, dropout=dropout),
        device,
        default=lambda: default_config(m, n, dtype, arch, kind=kind, dropout=dropout),
        candidates=lambda: candidate_configs(dtype, arch, kind=kind, m=m, dropout=dropout),
    )
    split = config.get("SPLIT_K", 1)
    workspace = backend.empty((split, m, n), dtype=torch.float32, device=device) if split > 1 else None
    launch_linear_fwd(
        x=x, weight=weight, residual=residual, seed=seed, y=y, workspace=workspace, config=config, **others
    )


class Arguments(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    gamma: torch.Tensor | None
    residual: torch.Tensor | None
    act: str
    sample_scale: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None  # with dropout_p, [2] int64


def _kernel(a: Arguments) -> torch.Tensor:
    n = a.weight.shape[0]
    y = backend.empty((*a.x.shape[:-1], n), dtype=result_dtype(a.x, a.gamma, a.residual), device=a.x.device)
    if y.numel() == 0:
        return y
    gemm(
        "linear",
        x=as_rows(a.x),
        weight=a.weight,
        bias=_check.dense(a.bias),
        gamma=_check.dense(a.gamma),
        sample_scale=a.sample_scale,
        residual=unit_rows(a.residual),
        y=y.view(-1, n),
        act=a.act,
        dropout_p=a.dropout_p,
        seed=a.seed,
    )
    return y


def _vendor(a: Arguments) -> torch.Tensor | None:
    packed = mkldnn.kept(a.weight)
    if a.sample_scale is not None or a.seed is not None or not isinstance(packed, mkldnn.Packed):
        return None
    backend.ran("linear", "mkldnn")
    return mkldnn.linear(a.x, packed, a.bias, a.gamma, a.residual, a.act)


def _fake(a: Arguments) -> torch.Tensor:
    return a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0]), dtype=result_dtype(a.x, a.gamma, a.residual))


def _unsupported(a: Arguments) -> str | None:
    if a.weight.shape[1] == 0:
        return "in_features is 0"
    return _check.kernel_dtypes(*a)


def _measured(a: Arguments) -> str:
    n, k = a.weight.shape
    m, residual = math.prod(a.x.shape[:-1]), a.residual is not None
    key = table_key(m, n, k, a.x.dtype, residual=residual, dropout=a.dropout_p > 0)
    # without a measurement the vendor's GEMM runs
    return tuning.choice(key, a.x.device, "reference")


def _cost(a: Arguments) -> Cost:
    n, k = a.weight.shape
    m = math.prod(a.x.shape[:-1])
    moved = nbytes(a)
    return Cost(2 * m * n * k, moved + m * n * result_dtype(a.x, a.gamma, a.residual).itemsize)


def _saves(a: Arguments, needs: frozenset[str]) -> set[str]:
    if a.act != "none":
        # what the activation was given is computed again
        return set() if needs <= {"residual"} else {"x", "weight", "bias", "gamma", "sample_scale", "seed"}
    saves = set() if needs <= {"residual"} else {"gamma", "sample_scale", "seed"}
    if needs & {"weight", "gamma"}:
        saves.add("x")
    if needs & {"x", "gamma"}:
        saves.add("weight")
    if "gamma" in needs:
        saves.add("bias")
    return saves


def _scaled_activation(
    hidden: torch.Tensor, act: str, gamma: torch.Tensor | None, sample_scale: torch.Tensor | None
) -> torch.Tensor:
    y = activate(hidden, act)
    return scale_samples(y if gamma is None else y * gamma, sample_scale)


def _backward(
    a: Arguments, results: tuple[None], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    found = {} if a.residual is None else {"residual": grad.to(a.residual.dtype)}
    if needs <= {"residual"}:
        return found
    gamma, sample_scale = a.gamma, a.sample_scale
    if a.seed is not None:
        dtype = a.x.dtype if a.act == "none" else grad.dtype
        grad = dropped(as_rows(grad), a.dropout_p, a.seed, dtype).view(grad.shape)
    if a.act != "none":
        hidden = LINEAR.where_supported(a.x, a.weight, a.bias, None, None, "none")
        wanted = [0] if "gamma" not in needs else [0, 2]
        args = (hidden, a.act, gamma, sample_scale)
        grad, *dgamma = reference_gradients(_scaled_activation, args, grad, wanted)
        found |= zip(("gamma",), dgamma, strict=False)
        gamma, sample_scale, needs = None, None, needs - {"gamma"}
    grad = grad.to(a.x.dtype)
    if "x" in needs:
        found["x"] = input_gradient(grad, a.weight, gamma, sample_scale)
    if needs & {"weight", "gamma"}:
        parameters = parameter_gradients(
            as_rows(grad),
            as_rows(a.x),
            a.weight,
            a.bias,
            gamma,
            "bias" in needs,
            "gamma" in needs,
            sample_scale=sample_scale,
        )
        found = parameters._asdict() | found
    elif "bias" in needs:
        found["bias"] = bias_gradient(as_rows(grad), gamma, sample_scale)
    return found


def input_gradient(
    grad: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor | None,
    sample_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Of ``sample_scale * gamma * (x @ weight.T)`` with respect to x; ``grad`` [..., out_features], in
    weight's dtype."""
    weight = with_gamma(weight, gamma).t()
    return LINEAR.where_supported(grad, weight, None, None, None, "none", sample_scale)


LINEAR = Op(
    "linear",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? residual, str act, "
    "Tensor? sample_scale=None, float dropout_p=0.0, Tensor? seed=None",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
    vendor=_vendor,
    gradient=Gradient(saves=_saves, backward=_backward),
)
