"""dropout: rows times 0 or 1 / (1 - p), by each cell's place, one launch: what a gradient passes through
where a product's epilogue dropped. And the seeds that a call's dropout is drawn by."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op, nbytes
from fastvr.reference.dropout import dropout as reference


def draw_seed(x: torch.Tensor) -> torch.Tensor:
    """What one call's cells are dropped by, on x's device: a tensor, so that a CUDA graph draws it anew."""
    return torch.randint(2**63 - 1, (2,), device=x.device)


def draw_seeds(x: torch.Tensor, *probabilities: float) -> list[torch.Tensor | None]:
    """As :func:`draw_seed`, one for each probability that is not 0, all of them in one launch."""
    count = sum(p > 0 for p in probabilities)
    if count == 0:
        return [None] * len(probabilities)
    drawn = iter(torch.randint(2**63 - 1, (count, 2), device=x.device).unbind(0))
    return [next(drawn) if p > 0 else None for p in probabilities]


def dropped(rows: torch.Tensor, p: float, seed: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Rows [M, N] in ``dtype``, dropped where there is a seed."""
    return rows.to(dtype) if seed is None else DROPOUT.where_supported(rows, p, seed, dtype)


class Arguments(NamedTuple):
    rows: torch.Tensor  # [M, N]
    p: float
    seed: torch.Tensor  # [2] int64
    out_dtype: torch.dtype | None = None  # None is that of the rows


def _table_key(a: Arguments) -> str:
    m, n = a.rows.shape
    return tuning.key("dropout", a.rows.dtype, m=tuning.bucket(m), n=n)


def _kernel(a: Arguments) -> torch.Tensor:
    from fastvr.kernels.dropout import candidate_configs, default_config, launch_dropout

    y = backend.empty(a.rows.shape, dtype=a.out_dtype or a.rows.dtype, device=a.rows.device)
    if y.numel() > 0:
        n, arch = y.shape[1], backend.architecture(y.device)
        config = tuning.config(
            "dropout",
            _table_key(a),
            y.device,
            default=lambda: default_config(n, arch),
            candidates=lambda: candidate_configs(n, arch),
        )
        launch_dropout(x=a.rows, y=y, p=a.p, seed=a.seed, config=config)
    return y


def _reference(
    rows: torch.Tensor, p: float, seed: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    return reference(rows, p, seed).to(out_dtype or rows.dtype)


def _fake(a: Arguments) -> torch.Tensor:
    return a.rows.new_empty(a.rows.shape, dtype=a.out_dtype or a.rows.dtype)


DROPOUT = Op(
    "dropout",
    "Tensor rows, float p, Tensor seed, ScalarType? out_dtype=None",
    arguments=Arguments,
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    unsupported=lambda a: _check.kernel_dtypes(a.rows),
    # only after a forward pass by kernels is this op called
    measured=lambda a: tuning.choice(_table_key(a), a.rows.device, "triton"),
    cost=lambda a: Cost(0, nbytes(a) + nbytes([_fake(a)])),
    differentiable=False,
)
