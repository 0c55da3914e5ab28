"""swiglu: SiLU of a row's first half times its second, one launch; swiglu_backward: its gradient, one."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Gradient, Op, nbytes, reference_gradients
from fastvr.ops.linear import unit_rows
from fastvr.reference.swiglu import swiglu as reference


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """The activation of a gated MLP, ``silu(a) * b`` for rows ``[a, b]`` (Shazeer, 2020).

    Args:
        x: [..., 2 * hidden], float32, float16 or bfloat16 (float64 runs in PyTorch).

    Returns:
        [..., hidden], x's dtype, rounded once.

    Raises:
        ValueError: x is no floating tensor whose last dimension is even.
    """
    _check.operand("swiglu", "x", x)
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"swiglu: x must be [..., 2 * hidden]; got {list(x.shape)}")
    return SWIGLU(x)


class Arguments(NamedTuple):
    x: torch.Tensor


class BackwardArguments(NamedTuple):
    grad: torch.Tensor
    x: torch.Tensor


def _table_key(op: str, x: torch.Tensor) -> str:
    n = x.shape[-1] // 2
    return tuning.key(op, x.dtype, m=tuning.bucket(x.numel() // max(2 * n, 1)), n=n)


def _config(op: str, x: torch.Tensor) -> dict[str, int]:
    from fastvr.kernels.swiglu import candidate_configs, default_config

    n, arch = x.shape[-1] // 2, backend.architecture(x.device)
    return tuning.config(
        op,
        _table_key(op, x),
        x.device,
        default=lambda: default_config(n, arch),
        candidates=lambda: candidate_configs(n, arch),
    )


def _kernel(a: Arguments) -> torch.Tensor:
    from fastvr.kernels.swiglu import launch_swiglu_fwd

    y = backend.empty(_halved(a.x), dtype=a.x.dtype, device=a.x.device)
    if y.numel() > 0:
        rows = unit_rows(a.x)
        assert rows is not None
        launch_swiglu_fwd(x=rows, y=y.view(rows.shape[0], -1), config=_config("swiglu", a.x))
    return y


def _backward_kernel(a: BackwardArguments) -> torch.Tensor:
    from fastvr.kernels.swiglu import launch_swiglu_bwd

    dx = backend.empty(a.x.shape, dtype=a.x.dtype, device=a.x.device)
    if dx.numel() > 0:
        rows, grads = unit_rows(a.x), unit_rows(a.grad)
        assert rows is not None
        assert grads is not None
        config = _config("swiglu_backward", a.x)
        launch_swiglu_bwd(grad=grads, x=rows, dx=dx.view(rows.shape), config=config)
    return dx


def _backward_reference(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return reference_gradients(reference, (x,), grad, [0])[0]


def _halved(x: torch.Tensor) -> tuple[int, ...]:
    return *x.shape[:-1], x.shape[-1] // 2


def _fake(a: Arguments) -> torch.Tensor:
    return a.x.new_empty(_halved(a.x))


def _backward_fake(a: BackwardArguments) -> torch.Tensor:
    return a.x.new_empty(a.x.shape)


def _backward(
    a: Arguments, results: tuple[None], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    return {"x": SWIGLU_BACKWARD.where_supported(grad, a.x)}


SWIGLU_BACKWARD = Op(
    "swiglu_backward",
    "Tensor grad, Tensor x",
    arguments=BackwardArguments,
    kernel=_backward_kernel,
    reference=_backward_reference,
    fake=_backward_fake,
    unsupported=lambda a: _check.kernel_dtypes(*a),
    # one launch that reads and writes least, where PyTorch makes several
    measured=lambda a: tuning.choice(_table_key("swiglu_backward", a.x), a.x.device, "triton"),
    cost=lambda a: Cost(0, nbytes(a) + nbytes([a.x])),
    differentiable=False,
)
SWIGLU = Op(
    "swiglu",
    "Tensor x",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=lambda a: _check.kernel_dtypes(*a),
    measured=lambda a: tuning.choice(_table_key("swiglu", a.x), a.x.device, "triton"),
    cost=lambda a: Cost(0, nbytes(a) * 3 // 2),
    gradient=Gradient(saves=lambda a, needs: ("x",), backward=_backward),
)
