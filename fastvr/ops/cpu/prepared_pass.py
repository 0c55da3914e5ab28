"""A prepared model's own forward pass on a CPU: what it takes for granted, and what was chosen for it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Collection, Hashable, Iterator
from typing import NamedTuple

import torch


class Parts(NamedTuple):
    """A ResNet's stem and first ``stages`` stages, whose maps are the largest, take as many images of a batch
    at once as have ``pixels`` pixels, so that those maps stay in a cache."""

    stages: int
    pixels: int

    def images(self, x: torch.Tensor) -> int:
        return max(self.pixels // max(x.shape[2] * x.shape[3], 1), 1)


class Pass(NamedTuple):
    image: torch.Tensor
    chosen: Collection[Hashable]
    parts: Parts | None


_pass: contextvars.ContextVar[Pass | None] = contextvars.ContextVar("fastvr_pass", default=None)


@contextlib.contextmanager
def running(image: torch.Tensor, chosen: Collection[Hashable], parts: Parts | None = None) -> Iterator[None]:
    """A forward pass over ``image``, with the calls ``chosen`` in the vendor's form, in ``parts`` or whole.

    Who enters it says that this is inference on a CPU, in the mode "auto", without autocast, by modules that
    nobody observes, and that nobody else writes into the numbers on the way. What was packed for a module is
    then taken without asking again.
    """
    token = _pass.set(Pass(image, chosen, parts))
    try:
        yield
    finally:
        _pass.reset(token)


def current() -> Pass | None:
    # PyTorch 2.11's compiler does not trace context variables, and what it traces is no such pass
    return None if torch.compiler.is_compiling() else _pass.get()
