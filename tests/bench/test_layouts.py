"""Every tensor that an op takes, weights and vectors too, in memory of another layout."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import cases
import inputs
import pytest
import torch
from torch import Tensor

from fastvr import backend
from fastvr.testing import check_op

pytest.importorskip("triton")


def _other_layouts(t: Tensor) -> Iterator[Tensor]:
    """The same values where each dimension begins inside a larger one (the channels of RGBA, part of a packed
    weight), and in the reverse order of dimensions with elements in between; NaN is what a stride skips."""
    fill = float("nan") if t.is_floating_point() else 255
    for d in range(t.dim()):
        around = torch.full([n + 3 * (i == d) for i, n in enumerate(t.shape)], fill, dtype=t.dtype)
        yield around.narrow(d, 2, t.shape[d]).copy_(t)
    around = torch.full((*reversed(t.shape), 2), fill, dtype=t.dtype)
    yield around[..., 0].permute(*reversed(range(t.dim()))).copy_(t)


def _call(mode: str, function: Any, **arguments: Any) -> Any:
    with backend.use_backend(mode):
        return function(**arguments)


def _changed(arguments: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The arguments with one tensor in another layout, members of tuples too."""
    for name, value in arguments.items():
        if isinstance(value, tuple):
            kind = getattr(type(value), "_make", type(value))
            for i, member in enumerate(value):
                if isinstance(member, Tensor):
                    for other in _other_layouts(member):
                        yield f"{name}[{i}]", arguments | {name: kind([*value[:i], other, *value[i + 1 :]])}
        elif isinstance(value, Tensor) and value.dtype != torch.int64:
            for other in _other_layouts(value):
                yield name, arguments | {name: other}


@pytest.mark.parametrize("op", cases.OPS)
def test_every_argument_in_any_layout(op: str) -> None:
    case = cases.SMALL[op][0]
    if case.get("tokens"):
        case = dataclasses.replace(case, sizes=tuple((dict(case.sizes) | {"tokens": 9}).items()))
    function = inputs.public(op)
    kernel, reference = (functools.partial(_call, mode, function) for mode in ("triton", "reference"))
    arguments, floor = inputs.make(case, torch.bfloat16, "cpu"), inputs.absolute_floor(case)
    for name, changed in _changed(arguments):
        with torch.no_grad():
            check_op(
                kernel, reference, changed, backward=False, sample_dim=None, absolute_floor=floor, name=name
            )
