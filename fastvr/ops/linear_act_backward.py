"""linear_act_backward: a gradient back through a linear layer and the activation before it, one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op, nbytes, reference_gradients
from fastvr.ops.linear import gemm, table_key
from fastvr.reference.dropout import dropout
from fastvr.reference.linear import activate, scale_samples


class Arguments(NamedTuple):
    """``hidden`` is what the activation was given: the layer computed ``act(hidden) @ weight.T``, and with
    ``sample_scale``, float32 [samples], M a multiple of samples, its rows times their sample's factor; with
    ``seed``, [2] int64, ``dropout(act(hidden))``, which then is what is left of it."""

    grad: torch.Tensor  # [M, N]
    weight: torch.Tensor  # [N, K], grad's dtype
    hidden: torch.Tensor  # [M, K], grad's dtype
    act: str
    needs_activated: bool
    sample_scale: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None


_Results = tuple[torch.Tensor, torch.Tensor]  # hidden's gradient, and what the layer was given or nothing


def _kernel(a: Arguments) -> _Results:
    dhidden = backend.empty(a.hidden.shape, dtype=a.hidden.dtype, device=a.hidden.device)
    # what is not needed comes back empty: an operator cannot return None
    size = a.hidden.shape if a.needs_activated else (0,)
    activated = backend.empty(size, dtype=a.hidden.dtype, device=a.hidden.device)
    if dhidden.numel() > 0:
        gemm(
            "linear_act_backward",
            x=a.grad,
            weight=a.weight.t(),
            bias=None,
            y=dhidden,
            act=a.act,
            sample_scale=a.sample_scale,
            hidden=a.hidden.contiguous(),
            activated=activated if a.needs_activated else None,
            dropout_p=a.dropout_p,
            seed=a.seed,
        )
    return dhidden, activated


def _reference(
    grad: torch.Tensor,
    weight: torch.Tensor,
    hidden: torch.Tensor,
    act: str,
    needs_activated: bool,
    sample_scale: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> _Results:
    dactivated = scale_samples(grad, sample_scale) @ weight
    if seed is not None:
        dactivated = dropout(dactivated, dropout_p, seed)
    if act == "none":
        dhidden = dactivated
    else:
        (dhidden,) = reference_gradients(activate, (hidden, act), dactivated, [0])
    if not needs_activated:
        return dhidden, hidden.new_empty(0)
    activated = activate(hidden.clone(), act)
    return dhidden, activated if seed is None else dropout(activated, dropout_p, seed)


def _fake(a: Arguments) -> _Results:
    dhidden = a.hidden.new_empty(a.hidden.shape)
    return dhidden, a.hidden.new_empty(a.hidden.shape if a.needs_activated else 0)


def _unsupported(a: Arguments) -> str | None:
    if a.weight.shape[0] == 0:
        return "out_features is 0"
    return _check.kernel_dtypes(*a)


def _measured(a: Arguments) -> str:
    (m, n), k = a.grad.shape, a.weight.shape[1]
    key = table_key(m, k, n, a.grad.dtype, kind="linear_act_backward", dropout=a.dropout_p > 0)
    # only after a forward pass by kernels is this op called
    return tuning.choice(key, a.grad.device, "triton")


def _cost(a: Arguments) -> Cost:
    (m, n), k = a.grad.shape, a.weight.shape[1]
    return Cost(2 * m * n * k, nbytes(a) + nbytes(_fake(a)))


LINEAR_ACT_BACKWARD = Op(
    "linear_act_backward",
    "Tensor grad, Tensor weight, Tensor hidden, str act, bool needs_activated, Tensor? sample_scale=None, "
    "float dropout_p=0.0, Tensor? seed=None",
    arguments=Arguments,
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
    returns="(Tensor, Tensor)",
    differentiable=False,
)
