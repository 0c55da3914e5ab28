"""Activation checkpointing (Chen et al., 2016): what a block makes inside is made again for its gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def recomputed(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, block: nn.Module
) -> torch.Tensor:
    """``function(x)``, of which only x is kept for the backward pass; ``block`` holds its modules.

    Dropout draws the same numbers again. BatchNorm's running statistics move once, as without checkpointing.
    """
    norms = [module for module in block.modules() if isinstance(module, _NormBase)]
    if not norms:
        return checkpoint(function, x, use_reentrant=False)

    def contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        return contextlib.nullcontext(), _statistics_kept(norms)

    return checkpoint(function, x, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _statistics_kept(norms: list[_NormBase]) -> Iterator[None]:
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
