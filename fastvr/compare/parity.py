"""The verdict on a model's numbers, against PyTorch's own in the same dtype and the truth in float64."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvr import backend
from fastvr.testing import ParityReport, measure_parity, truth_model


def verdict(model: Callable[[Tensor], Tensor], eager: nn.Module, x: Tensor, *, mode: str) -> dict[str, Any]:
    """Hold ``model(x)`` under the backend ``mode`` to the parity rule.

    Args:
        model: what is judged.
        eager: the same function in PyTorch with the same weights; its float64 copy is the truth.
        x: [N, C, H, W]; every sample is held to the rule by itself.

    Returns:
        ``passed``, the text of the ``verdict``, the errors with their bounds, and ``ops``: what ran. A model
        that raises has failed, with the error as ``failure``.
    """
    with torch.no_grad():
        expected = eager(x)
        truth = truth_model(eager)(x.double())
        with backend.observe() as ran, backend.use_backend(mode):
            try:
                actual = model(x)
            except Exception as error:  # a verdict, not a crash: the rest of the comparison still stands
                return failed(f"{type(error).__name__}: {error}")
        report = measure_parity(actual, expected, truth, name="logits")
    return {
        **_summary(report),
        "images": len(x),
        "dtype": str(x.dtype).removeprefix("torch."),
        "ops": ops(ran),
    }


def failed(why: str) -> dict[str, Any]:
    return {"passed": False, "verdict": "FAILED", "failure": why}


def ops(ran: collections.Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """What ran, as ``{"triton": {"linear": 13, ...}, "pytorch": {...}}``."""
    by_backend: dict[str, dict[str, int]] = {}
    for (name, implementation), times in sorted(ran.items()):
        by_backend.setdefault("triton" if implementation == "triton" else "pytorch", {})[name] = times
    return by_backend


def _summary(report: ParityReport) -> dict[str, Any]:
    # JSON has no infinity
    numbers = {
        name: value if math.isfinite(value) else None
        for name in ("ratio", "max_error", "max_bound", "rms_error", "rms_bound")
        for value in (getattr(report, name),)
    }
    summary: dict[str, Any] = {"passed": report.passed, "verdict": report.verdict, **numbers}
    return summary if report.passed else {**summary, "failure": report.failure}
