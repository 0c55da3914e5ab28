"""Without a GPU every kernel runs in Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import fastvr  # noqa: E402, F401  (after the choice above)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    from fastvr.testing import interpreter

    interpreter.install()
    # the interpreter is one thread of Python; more threads in PyTorch only fight over its cores
    torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
