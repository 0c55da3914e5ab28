"""linear_weight_backward: the gradients of a linear layer's parameters, one launch, or two where rows are
split among programs. The gradient of its input is a product like any other: :mod:`fastvr.ops.linear`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op, nbytes
from fastvr.reference.linear import scale_samples


class Arguments(NamedTuple):
    """x passes through LayerNorm where ``ln_weight`` is given, by ``moments``: mean and 1 / deviation of each
    row, [M, 2], in float32 (float64 for float64). With ``sample_scale``, [samples] in the same, M a multiple
    of samples, the rows of grad are meant times their sample's factor."""

    grad: torch.Tensor  # [M, N]
    x: torch.Tensor  # [M, K], grad's dtype; with ln_weight any
    ln_weight: torch.Tensor | None
    ln_bias: torch.Tensor | None
    moments: torch.Tensor | None
    needs_bias: bool
    out_dtype: torch.dtype | None  # None is grad's
    sample_scale: torch.Tensor | None = None


_Gradients = tuple[torch.Tensor, torch.Tensor]


def _sizes(a: Arguments) -> tuple[int, int, int]:
    return a.grad.shape[0], a.grad.shape[1], a.x.shape[1]


def _by_registers(a: Arguments) -> bool:
    """Whether x is changed on its way in."""
    return a.ln_weight is not None or a.sample_scale is not None


def _key(a: Arguments) -> str:
    m, n, k = _sizes(a)
    norm = int(_by_registers(a))
    return tuning.key("linear_weight_backward", a.grad.dtype, m=tuning.bucket(m), n=n, k=k, norm=norm)


def _kernel(a: Arguments) -> _Gradients:
    from fastvr.kernels.linear_backward import candidate_configs, default_config, launch_linear_weight_bwd

    (m, n, k), device = _sizes(a), a.grad.device
    dtype = a.out_dtype or a.grad.dtype
    dweight = backend.empty((n, k), dtype=dtype, device=device)
    # what is not needed comes back empty: an operator cannot return None
    dbias = backend.empty((n if a.needs_bias else 0,), dtype=dtype, device=device)
    if m == 0:
        return dweight.zero_(), dbias.zero_()
    if dweight.numel() == 0:
        return dweight, dbias
    arch = backend.architecture(device)
    norm = _by_registers(a)
    config = tuning.config(
        "linear_weight_backward",
        _key(a),
        device,
        default=lambda: default_config(a.grad.dtype, arch, norm=norm, m=m, n=n, k=k),
        candidates=lambda: candidate_configs(a.grad.dtype, arch, norm=norm, m=m, n=n, k=k),
    )
    workspace = sums = None
    if (split := config.get("SPLIT_M", 1)) > 1:
        workspace = backend.empty((split, n, k), dtype=torch.float32, device=device)
        if a.needs_bias:
            sums = backend.empty((split, n), dtype=torch.float32, device=device)
    launch_linear_weight_bwd(
        grad=a.grad,
        x=a.x,
        ln_weight=_check.dense(a.ln_weight),
        ln_bias=_check.dense(a.ln_bias),
        moments=_check.dense(a.moments),
        sample_scale=a.sample_scale,
        dweight=dweight,
        dbias=dbias if a.needs_bias else None,
        workspace=workspace,
        sums=sums,
        config=config,
    )
    return dweight, dbias


def _reference(
    grad: torch.Tensor,
    x: torch.Tensor,
    ln_weight: torch.Tensor | None,
    ln_bias: torch.Tensor | None,
    moments: torch.Tensor | None,
    needs_bias: bool,
    out_dtype: torch.dtype | None,
    sample_scale: torch.Tensor | None = None,
) -> _Gradients:
    grad = scale_samples(grad, sample_scale)
    if ln_weight is not None:
        assert moments is not None
        normed = (x - moments[:, :1]) * moments[:, 1:] * ln_weight
        x = (normed if ln_bias is None else normed + ln_bias).to(grad.dtype)
    dtype = out_dtype or grad.dtype
    dbias = grad.sum(0) if needs_bias else grad.new_empty(0)
    return (grad.t() @ x).to(dtype), dbias.to(dtype)


def _fake(a: Arguments) -> _Gradients:
    _, n, k = _sizes(a)
    dtype = a.out_dtype or a.grad.dtype
    return a.grad.new_empty((n, k), dtype=dtype), a.grad.new_empty(n if a.needs_bias else 0, dtype=dtype)


def _cost(a: Arguments) -> Cost:
    m, n, k = _sizes(a)
    return Cost(2 * m * n * k, nbytes(a) + nbytes(_fake(a)))


LINEAR_WEIGHT_BACKWARD = Op(
    "linear_weight_backward",
    "Tensor grad, Tensor x, Tensor? ln_weight, Tensor? ln_bias, Tensor? moments, bool needs_bias, "
    "ScalarType? out_dtype, Tensor? sample_scale=None",
    arguments=Arguments,
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    unsupported=lambda a: _check.kernel_dtypes(*a),
    # without a measurement the vendor's GEMM runs, but not where LayerNorm or factors would be a launch of
    # their own
    measured=lambda a: tuning.choice(_key(a), a.grad.device, "triton" if _by_registers(a) else "reference"),
    cost=_cost,
    returns="(Tensor, Tensor)",
    differentiable=False,
)


class Norm(NamedTuple):
    """The LayerNorm that a linear layer's input passed through."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    moments: torch.Tensor


class ParameterGradients(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor
    gamma: torch.Tensor


def parameter_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    needs_bias: bool,
    needs_gamma: bool = False,
    norm: Norm | None = None,
    sample_scale: torch.Tensor | None = None,
) -> ParameterGradients:
    """Of ``sample_scale * gamma * (norm(x) @ weight.T + bias)``, for rows ``grad`` [M, N] and ``x`` [M, K].

    With gamma, the products are kept in float32 until gamma is applied, and its own gradient comes from them:
    ``sum_m grad (x @ weight.T + bias) = rowsum(weight * (grad.T @ x)) + bias * colsum(grad)``.
    """
    wide = None if gamma is None else torch.promote_types(grad.dtype, torch.float32)
    sums = needs_bias or (needs_gamma and bias is not None)
    dweight, dbias = LINEAR_WEIGHT_BACKWARD.where_supported(
        grad, x, *(norm or (None,) * 3), sums, wide, sample_scale
    )
    if gamma is None:
        return ParameterGradients(dweight, dbias, dbias)
    dgamma = dbias
    if needs_gamma:
        dgamma = (dweight * weight).sum(1)
        if bias is not None:
            dgamma = dgamma + dbias * bias
    dweight = (dweight * gamma[:, None]).to(weight.dtype)
    return ParameterGradients(
        dweight, (dbias * gamma if sums else dbias).to(weight.dtype), dgamma.to(gamma.dtype)
    )


def with_gamma(weight: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
    """The weight whose product is ``gamma * (x @ weight.T)``."""
    return weight if gamma is None else (weight * gamma[:, None]).to(weight.dtype)


def bias_gradient(
    grad: torch.Tensor, gamma: torch.Tensor | None, sample_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Of ``sample_scale * gamma * (... + bias)``, for rows ``grad`` [M, N]."""
    dbias = scale_samples(grad, sample_scale).sum(0)
    return dbias if gamma is None else (dbias * gamma).to(grad.dtype)
