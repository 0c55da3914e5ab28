"""Somebody's model beside its own untouched copy."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from randomise import randomise
from torch import nn

import fastvr
from fastvr import backend
from fastvr.accelerate import Report
from fastvr.testing import assert_parity, truth_model

Ran = collections.Counter[tuple[str, str]]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.fixture
def hold() -> Callable[..., tuple[Report, Ran]]:
    """``hold(model, *inputs, mode=, get=, **keywords)`` accelerates a model with random weights, and holds it
    to the parity rule against its copy; the report, and the ops that ran.

    ``get`` takes the tensor out of what the model returns.
    """

    def check(
        model: nn.Module,
        *inputs: Any,
        mode: str = "reference",
        get: Callable[[Any], torch.Tensor] = lambda y: y,
        **keywords: Any,
    ) -> tuple[Report, Ran]:
        eager = copy.deepcopy(randomise(model).eval())
        report = fastvr.accelerate(model)
        with torch.no_grad():
            with fastvr.use_backend("reference"):
                expected = get(eager(*inputs, **keywords))
                doubles = {name: _double(value) for name, value in keywords.items()}
                exact = get(truth_model(eager)(*map(_double, inputs), **doubles))
            with fastvr.use_backend(mode), backend.observe() as ran:
                actual = get(model(*inputs, **keywords))
        assert_parity(actual, expected, exact)
        assert expected.shape == actual.shape
        return report, ran

    return check


@pytest.fixture
def hold_gradients() -> Callable[..., Ran]:
    """``hold_gradients(model, x, mode=)``: the same for the gradients of all parameters, in training."""

    def gradients(model: nn.Module, x: torch.Tensor, seed: int = 5) -> dict[str, torch.Tensor]:
        y = model(x)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        y.backward(upstream.to(y.dtype))
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def check(model: nn.Module, x: torch.Tensor, mode: str = "reference") -> Ran:
        eager = copy.deepcopy(randomise(model).train())
        truth = truth_model(eager)
        fastvr.accelerate(model)
        with fastvr.use_backend("reference"):
            expected, exact = gradients(eager, x), gradients(truth, x.double())
        with fastvr.use_backend(mode), backend.observe() as ran:
            actual = gradients(model, x)
        assert set(actual) == set(expected) == {name for name, _ in model.named_parameters()}
        assert_parity(actual, expected, exact, kind="gradient", sample_dim=None)
        return ran

    return check


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(3))
