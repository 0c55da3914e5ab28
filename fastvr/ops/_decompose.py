"""Exported programs without fastvr's operators, for runtimes that do not have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastvr.ops._op import OPS


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """What every operator of fastvr's means in PyTorch's own, for ``ExportedProgram.run_decompositions``.

    ``program.run_decompositions(fastvr.decompositions())`` gives a program that runs where fastvr is not
    installed, such as one that was exported on a GPU. One exported under ``use_backend("reference")`` is such
    a program from the start.
    """
    return {op.overload: op.reference for op in OPS.values()}
