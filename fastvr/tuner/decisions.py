"""Results that are no numbers but say which numbers an op took, in numbers that the parity rule can judge.

Two values that differ by less than their rounding may be taken one for the other: then what was decided is
another than PyTorch's, and right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fastvr.ops._residual import signs_of
from fastvr.reference.batch_norm_act import batch_norm_act
from fastvr.reference.pool import window_places

Named = Mapping[str, Any]


def as_numbers(op: str, named: Named, results: Any) -> Any:
    """The results of ``op`` on the arguments ``named``, what was decided as the numbers it stands for."""
    return _MEANINGS[op](named, results) if op in _MEANINGS else results


def _taps(named: Named, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For each tap the value that stands there, as PyTorch computes it; 0 where the tap says so."""
    y, mean, var, taps = results
    made = batch_norm_act(named["x"], named["weight"], named["bias"], named["eps"])[0]
    none = taps == 255
    window = named["kernel_size"], named["stride"], named["padding"]
    places = window_places(taps.masked_fill(none, 0), made.shape[3], *window).clamp(min=0)
    taken = made.flatten(2).gather(2, places.flatten(2)).reshape(y.shape)
    return y, mean, var, taken.masked_fill(none, 0)


def _signs(named: Named, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The signs of the op's own result, as a number for each: 0 where they are."""
    *others, signs = results
    return *others, (signs_of(results[0]) != signs).to(results[0].dtype)


_MEANINGS: dict[str, Callable[[Named, tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
    "batch_norm_act_max_pool": _taps,
    "residual_block": _signs,
}
