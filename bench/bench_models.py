"""ViT-B/16 and ResNet-50: timm and torchvision eager, fastvr, fastvr prepared and torch.compile.

On a CPU small ones of both kinds.
"""

from __future__ import annotations

import functools
from typing import Any

import cases
import models
import pytest
import torch
from harness import CUDA, DEVICE, Column, Expected, column, measure, no_compiler, timed

import fastvr

_DTYPE = torch.bfloat16 if CUDA else torch.float32
_BATCHES = (1, 64, 256) if CUDA else (2,)


@functools.lru_cache(maxsize=1)
def _pair(name: str) -> models.Pair:
    return models.build(name, _DTYPE, DEVICE, small=not CUDA)


@functools.lru_cache(maxsize=1)
def _expected(name: str, batch: int) -> tuple[torch.Tensor, Expected]:
    pair = _pair(name)
    x = pair.example(batch, _DTYPE, DEVICE)
    return x, Expected(*models.truth(pair, x), models.cost(pair, x) or (0, 0))


def _column(name: str, pair: models.Pair, x: torch.Tensor) -> Column:
    if name == "prepared":
        with fastvr.use_backend("triton" if CUDA else "auto"):
            prepared = fastvr.prepare(pair.ours, x)
        # it replays a graph of its own, which cannot be captured into another
        return Column(name, "triton" if CUDA else "auto", models.call(prepared, x), graph=False)
    return column(name, models.call(pair.ours if name == "fastvr" else pair.eager, x))


@timed
@pytest.mark.parametrize("name", ["eager", "fastvr", "prepared", "compile"])
@pytest.mark.parametrize("batch", _BATCHES)
@pytest.mark.parametrize("model", cases.MODELS)
def test_model(benchmark: Any, model: str, batch: int, name: str) -> None:
    if name == "compile" and (reason := no_compiler()):
        pytest.skip(reason)
    torch.compiler.reset()
    x, expected = _expected(model, batch)
    taken = _column(name, _pair(model), x)
    benchmark.extra_info["baseline"] = _pair(model).baseline
    measure(benchmark, taken, expected, name=f"{model} b{batch}", dtype=_DTYPE)
