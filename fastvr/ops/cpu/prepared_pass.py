"""A prepared model's own forward pass on a CPU: what it takes for granted, and what was chosen for it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Collection, Hashable, Iterator
from typing import NamedTuple

import torch


class Pass(NamedTuple):
    image: torch.Tensor
    chosen: Collection[Hashable]


_pass: contextvars.ContextVar[Pass | None] = contextvars.ContextVar("fastvr_pass", default=None)


@contextlib.contextmanager
def running(image: torch.Tensor, chosen: Collection[Hashable]) -> Iterator[None]:
    """A forward pass over ``image``, with the calls ``chosen`` in the vendor's form.

    Who enters it says that this is inference on a CPU, in the mode "auto", without autocast, by modules that
    nobody observes, and that nobody else writes into the numbers on the way. What was packed for a module is
    then taken without asking again.
    """
    token = _pass.set(Pass(image, chosen))
    try:
        yield
    finally:
        _pass.reset(token)


def current() -> Pass | None:
    # PyTorch 2.11's compiler does not trace context variables, and what it traces is no such pass
    return None if torch.compiler.is_compiling() else _pass.get()
