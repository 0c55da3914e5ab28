"""Kinds and ranges of models' arguments, said by name: PyTorch's own errors would name a tensor's size."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def check_integers(owner: str, **least: tuple[Any, int]) -> None:
    """Raise a ValueError where one of the values is no integer, or below the least one beside it."""
    for name, (value, minimum) in least.items():
        if not isinstance(value, Integral) or int(value) < minimum:
            raise ValueError(f"{owner}: {name} must be an integer of at least {minimum}; got {value!r}")


def check_numbers(owner: str, **values: Any) -> None:
    """Raise a ValueError where one of the values is no positive number."""
    for name, value in values.items():
        if not (isinstance(value, Real) and 0 < float(value) < math.inf):
            raise ValueError(f"{owner}: {name} must be a positive number; got {value!r}")


def check_rates(owner: str, **values: Any) -> None:
    """Raise a ValueError where one of the values is no probability."""
    for name, value in values.items():
        if not (isinstance(value, Real) and 0 <= float(value) <= 1):
            raise ValueError(f"{owner}: {name} must be a number from 0 to 1; got {value!r}")
