"""How large the numbers of a forward pass can be, carried from each convolution to the next.

oneDNN's fused ReLU makes 0 of a NaN in older releases. No NaN arises from finite numbers whose products and
sums stay finite, so there it may be used. A convolution multiplies the largest magnitude by no more than the
largest sum of a filter's magnitudes: so what comes out is known without a look at it, and numbers are only
measured where that has grown too far, or nothing is known of them, as of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastvr.ops.cpu.prepared_pass import Pass, current

_NAME = "_fastvr_magnitude"

# products and sums up to here are finite in these types, with room for Winograd's form, whose numbers on the
# way are up to 300 times as large
_MOST = {torch.float32: 1e35, torch.bfloat16: 1e35}


class Gain(NamedTuple):
    """``|y| <= slope * |x| + offset`` for every y of a convolution."""

    slope: float
    offset: float

    @classmethod
    def of(
        cls, weight: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> Gain:
        """Of ``weight`` [O, C / groups, kh, kw] times ``scale`` [O], and ``shift`` [O]."""
        if not weight.numel():
            return cls(0.0, 0.0)
        slopes = weight.detach().double().abs().flatten(1).sum(1)
        if scale is not None:
            slopes = slopes * scale.double().abs()
        return cls(float(slopes.max()), 0.0 if shift is None else float(shift.double().abs().max()))


def bound(gain: Gain, x: torch.Tensor, residual: torch.Tensor | None) -> float | None:
    """What no number of the result exceeds, nor any on the way to it; None where that is not known to be
    finite."""
    most = _MOST.get(x.dtype)
    if most is None or (run := current()) is None:
        return None
    found = _bound(gain, _known(x, run), 0.0 if residual is None else _known(residual, run))
    if found is not None and found < most:
        return found
    found = _bound(gain, _measured(x, run), 0.0 if residual is None else _measured(residual, run))
    return found if found is not None and found < most else None


def carry(y: torch.Tensor, magnitude: float | None) -> torch.Tensor:
    """``y``, none of whose numbers exceeds ``magnitude``; None is unknown."""
    run = current()
    if run is not None:
        y.__dict__[_NAME] = None if magnitude is None else (run, magnitude)
    return y


def carry_on(x: torch.Tensor | Sequence[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    """``y``, all of whose numbers are numbers of ``x``, a tensor or several."""
    run = current()
    if run is None:
        return y
    largest: float | None = 0.0
    for part in (x,) if isinstance(x, torch.Tensor) else x:
        known = _known(part, run)
        largest = None if largest is None or known is None else max(largest, known)
    return carry(y, largest)


def is_finite(x: torch.Tensor) -> bool:
    """Whether it is known in this pass that no number of ``x`` is infinite or NaN."""
    run = current()
    return run is not None and _known(x, run) is not None


def without_marks(result: Any) -> Any:
    """``result``, a tensor or several, as it is handed out: nothing hangs on it that was carried."""
    for tensor in (result,) if isinstance(result, torch.Tensor) else result:
        tensor.__dict__.pop(_NAME, None)
    return result


def _bound(gain: Gain, x: float | None, residual: float | None) -> float | None:
    return None if x is None or residual is None else gain.slope * x + gain.offset + residual


def _known(x: torch.Tensor, run: Pass) -> float | None:
    found = x.__dict__.get(_NAME)
    return found[1] if found is not None and found[0] is run else None


def _measured(x: torch.Tensor, run: Pass) -> float:
    found = 0.0
    if x.numel():
        # in the order of memory, which takes a tenth of the time; NaN stays NaN, and is not below anything
        least, largest = torch.aminmax(x.permute(0, 2, 3, 1))
        found = max(-float(least), float(largest))
    if x is not run.image:
        # the caller's own is left as it is
        carry(x, found if math.isfinite(found) else None)
    return found
