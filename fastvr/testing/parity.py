"""The parity rule: an implementation may not be further from the truth than PyTorch itself.

Truth is the reference in float64, eager the reference in the tested dtype. For every tensor, and for every
sample of it:

- max error: ``|actual - truth| <= ratio * max|eager - truth| + floor``, element by element, with ratio 2,
  or 3 for gradients;
- RMS error: at most 1.5 times eager's, plus the floor's RMS.

The floor is one rounding of the output, half a unit of its dtype times ``|truth|``. It is never below the
smallest step that the dtype and float32 arithmetic with subnormals flushed can make.

Two estimates stand in where eager's own error says little:

- A sample of ten logits makes its own error a lottery, so the bound of a sample takes the larger of eager's
  error in it and eager's pooled relative error (largest over the samples) times the RMS of its truth. It is
  relative, hence a wrong row cannot hide behind an outlier row; samples whose truth all but vanishes are
  not pooled, since their relative error means nothing.
- Below 100 elements the ratio itself is widened to at least ``1 + 50 / n``: eager's error of a few elements
  is a few random numbers, so that equally good implementations differ by more than the ratio. From four
  elements on the term covers the 99.99 % quantile of the ratio of two such RMS errors (Fisher's F with n, n
  degrees of freedom); of one, two and three it covers 98.8, 99.85 and 99.97 %.

NaN and Inf are values: they must stand where the truth, rounded to the dtype, has them, with its sign. Where
eager overflows although the truth rounds to a finite value (or the reverse), either is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["forward", "gradient"]


@dataclass(frozen=True)
class Tolerance:
    """How many times eager's own error is allowed."""

    max_ratio: float
    rms_ratio: float


TOLERANCES: Mapping[Kind, Tolerance] = {
    "forward": Tolerance(max_ratio=2.0, rms_ratio=1.5),
    "gradient": Tolerance(max_ratio=3.0, rms_ratio=1.5),
}
GELU_TAIL = 6e-5  # absolute, for GELU's output where its argument is below -4
_FEW = 50.0
_STEP = 2.0**-126  # hardware may flush what is smaller to zero
_WORST = 5


@dataclass(frozen=True)
class ParityReport:
    """How one comparison, or the worst of several, came out.

    ``max_error``, ``rms_error`` and their bounds belong to the tensor as a whole; ``ratio`` is the largest
    share of any bound that was used up, samples included: above 1 the comparison fails.
    """

    name: str
    max_error: float
    max_bound: float
    rms_error: float
    rms_bound: float
    ratio: float
    tensors: int = 1
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure

    @property
    def verdict(self) -> str:
        """``"equal"``, ``"within bounds (43 % of the limit)"`` or ``"differs (3.1 x the limit)"``."""
        if self.failure:
            return f"differs ({self.ratio:.2g} x the limit)" if math.isfinite(self.ratio) else "differs"
        if self.ratio == 0:
            return "equal"
        return f"within bounds ({self.ratio:.0%} of the limit)".replace("%", " %")

    def merged(self, other: ParityReport) -> ParityReport:
        """The worse of the two, counting the tensors of both."""
        worst = max((self, other), key=lambda report: (bool(report.failure), report.ratio))
        failures = [report.failure for report in (self, other) if report.failure]
        return replace(worst, tensors=self.tensors + other.tensors, failure="\n\n".join(failures))


_EQUAL = ParityReport("", 0.0, 0.0, 0.0, 0.0, 0.0, tensors=0)


def measure_parity(
    actual: Any,
    eager: Any,
    truth: Any,
    *,
    kind: Kind = "forward",
    name: str = "",
    sample_dim: int | None = 0,
    absolute_floor: float | Tensor = 0.0,
) -> ParityReport:
    """:func:`assert_parity` that returns the failure in the report instead of raising it."""
    if kind not in TOLERANCES:
        raise ValueError(f"kind must be one of {', '.join(TOLERANCES)}; got {kind!r}")
    if sample_dim is not None and sample_dim < 0:
        raise ValueError(f"sample_dim must count from the front; got {sample_dim}")
    options: dict[str, Any] = {"kind": kind, "sample_dim": sample_dim, "absolute_floor": absolute_floor}
    if isinstance(eager, Tensor):
        return _measure_tensor(actual, eager, truth, name=name or "tensor", **options)
    if eager is None:
        if truth is not None:
            raise ValueError(f"{name or 'tensor'}: eager is None, but the truth is not")
        return _EQUAL if actual is None else _failed(name, f"is {_describe(actual)}, eager is None")
    if isinstance(eager, Mapping):
        keys, same = list(eager), isinstance(actual, Mapping) and set(actual) == set(eager)
    elif isinstance(eager, (list, tuple)):
        keys = list(range(len(eager)))
        same = isinstance(actual, (list, tuple)) and len(actual) == len(eager)
    else:
        raise ValueError(f"eager must hold tensors, lists, tuples, dicts or None; got {_describe(eager)}")
    if not same:
        return _failed(name, f"is {_describe(actual)}, eager is {_describe(eager)}")
    report = _EQUAL
    for key in keys:
        part = measure_parity(actual[key], eager[key], truth[key], name=f"{name}[{key!r}]", **options)
        report = report.merged(part)
    return report


def assert_parity(
    actual: Any,
    eager: Any,
    truth: Any,
    *,
    kind: Kind = "forward",
    name: str = "",
    sample_dim: int | None = 0,
    absolute_floor: float | Tensor = 0.0,
) -> ParityReport:
    """Hold ``actual`` to the parity rule (see the module).

    Args:
        actual: what is tested: a tensor, or nested lists, tuples and dicts of tensors and None.
        eager: PyTorch's result in the same dtype; gives the shapes, dtypes and devices ``actual`` must have.
        truth: the same in float64. Integer and boolean tensors must equal eager's.
        kind: ``"forward"`` or ``"gradient"``.
        sample_dim: the dimension that counts samples, each held to the rule by itself; None, or a dimension
            that a tensor does not have: only the whole tensor.
        absolute_floor: least value of the elementwise floor; a tensor that broadcasts to the output where it
            holds for some elements only (``GELU_TAIL * (x < -4)``).

    Raises:
        AssertionError: with both errors, the bounds and the worst coordinates.
        ValueError: eager and truth do not belong together.
    """
    report = measure_parity(
        actual,
        eager,
        truth,
        kind=kind,
        name=name,
        sample_dim=sample_dim,
        absolute_floor=absolute_floor,
    )
    if report.failure:
        raise AssertionError(report.failure)
    return report


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {sorted(map(str, value))}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _failed(name: str, reason: str) -> ParityReport:
    inf = math.inf
    return ParityReport(name, inf, 0.0, inf, 0.0, inf, failure=f"{name or 'tensor'} {reason}")


def _measure_tensor(
    actual: Any,
    eager: Tensor,
    truth: Any,
    *,
    kind: Kind,
    name: str,
    sample_dim: int | None,
    absolute_floor: float | Tensor,
) -> ParityReport:
    if not isinstance(actual, Tensor):
        return _failed(name, f"is {_describe(actual)}, eager is {_describe(eager)}")
    if (actual.shape, actual.dtype, actual.device) != (eager.shape, eager.dtype, eager.device):
        return _failed(name, f"is {_describe(actual)}, eager is {_describe(eager)}")
    if not isinstance(truth, Tensor) or truth.shape != eager.shape:
        raise ValueError(f"{name}: truth is {_describe(truth)}, eager is {_describe(eager)}")
    if not eager.is_floating_point():
        if torch.equal(actual, eager):
            return replace(_EQUAL, name=name, tensors=1)
        wrong = int((actual != eager).sum())
        return _failed(name, f"({_describe(actual)}): {wrong} of {actual.numel()} elements differ from eager")
    if truth.dtype != torch.float64:
        raise ValueError(f"{name}: truth must be float64; got {truth.dtype}")
    if not eager.numel():
        return replace(_EQUAL, name=name, tensors=1)
    comparison = _Comparison.of(
        actual.detach(), eager.detach(), truth.detach().to(eager.device), absolute_floor
    )
    return comparison.judge(name, kind, sample_dim)


def _class(values: Tensor) -> Tensor:
    """0 where finite, 1 and -1 for the infinities, 2 for NaN."""
    kinds = torch.where(values.isinf(), values.sign(), torch.zeros_like(values))
    return kinds.masked_fill(values.isnan(), 2).to(torch.int8)


@dataclass(frozen=True)
class _Comparison:
    """Errors of one tensor, all float64 and of its shape; 0 where not both sides are finite."""

    actual: Tensor
    eager: Tensor
    truth: Tensor
    misplaced: Tensor  # bool: NaN, Inf or a finite value where neither truth nor eager has that
    error: Tensor
    eager_error: Tensor
    floor: Tensor
    scale: Tensor  # the truth, 0 where it is not finite

    @staticmethod
    def of(actual: Tensor, eager: Tensor, truth: Tensor, absolute_floor: float | Tensor) -> _Comparison:
        is_actual, is_eager = _class(actual), _class(eager)
        misplaced = (is_actual != _class(truth.to(eager.dtype))) & (is_actual != is_eager)
        finite = truth.isfinite()
        scale = torch.where(finite, truth, 0.0)
        error = torch.where(finite & (is_actual == 0), (actual.double() - scale).abs(), 0.0)
        eager_error = torch.where(finite & (is_eager == 0), (eager.double() - scale).abs(), 0.0)
        info = torch.finfo(eager.dtype)
        least = max(info.smallest_normal * info.eps, _STEP)
        extra = torch.as_tensor(absolute_floor, dtype=torch.float64, device=eager.device)
        floor = (scale.abs() * (info.eps / 2)).clamp_min(least).maximum(extra)
        return _Comparison(actual, eager, truth, misplaced, error, eager_error, floor, scale)

    def judge(self, name: str, kind: Kind, sample_dim: int | None) -> ParityReport:
        tolerance = TOLERANCES[kind]
        whole = _Bounds.of(self, tolerance, None)
        ratios = [whole.max_ratio, whole.rms_ratio]
        if sample_dim is not None and sample_dim < self.truth.ndim and self.truth.shape[sample_dim] > 1:
            samples = _Bounds.of(self, tolerance, sample_dim)
            ratios += [samples.max_ratio, samples.rms_ratio]
        ratio = math.inf if bool(self.misplaced.any()) else max(float(part.max()) for part in ratios)
        report = ParityReport(
            name=name,
            max_error=float(self.error.max()),
            max_bound=float(whole.max_bound.max()),
            rms_error=float(whole.rms_error),
            rms_bound=float(whole.rms_bound),
            ratio=ratio,
        )
        if ratio <= 1:
            return report
        # Per element: the strictest of the bounds that hold for it, to show where it went wrong.
        excess = torch.stack([part.expand_as(self.error) for part in ratios]).amax(0)
        # Only the elements' own ratio orders those inside a sample that fails as a whole.
        order = excess + whole.max_ratio / (1 + whole.max_ratio.max())
        order = torch.where(self.misplaced, math.inf, order)
        return replace(report, failure=self._explain(report, kind, whole, ratios, order))

    def _explain(
        self, report: ParityReport, kind: Kind, whole: _Bounds, ratios: Sequence[Tensor], order: Tensor
    ) -> str:
        broken = [
            f"{what} ({float(part.max()):.3g} x its bound)"
            for what, part in zip(("max", "RMS", "max of a sample", "RMS of a sample"), ratios, strict=False)
            if float(part.max()) > 1
        ]
        if misplaced := int(self.misplaced.sum()):
            broken.insert(0, f"NaN or Inf in other places than the truth ({misplaced} elements)")
        lines = [
            f"{report.name} ({kind}, {self.eager.dtype}, shape {tuple(self.eager.shape)}) breaks parity: "
            + ", ".join(broken),
            f"  max error {report.max_error:.3e}, eager's {float(self.eager_error.max()):.3e}, "
            f"bound {report.max_bound:.3e}",
            f"  RMS error {report.rms_error:.3e}, eager's {float(_rms(self.eager_error)):.3e}, "
            f"bound {report.rms_bound:.3e}",
        ]
        count = min(_WORST, order.numel())
        for flat in order.flatten().topk(count).indices.tolist():
            index = tuple(int(i) for i in np.unravel_index(flat, order.shape))
            values = (float(part[index]) for part in (self.actual, self.eager, self.truth))
            lines.append("  at {}: actual {!r}, eager {!r}, truth {!r}".format(list(index), *values))
        return "\n".join(lines)


def _rms(values: Tensor, dims: list[int] | None = None) -> Tensor:
    return values.square().mean(dim=dims, keepdim=dims is not None).sqrt()


def _share(error: Tensor, bound: Tensor) -> Tensor:
    """error / bound, where 0 of 0 is 0."""
    return torch.where(error > 0, error / bound, 0.0)


@dataclass(frozen=True)
class _Bounds:
    """The rule for the whole tensor, or for every sample; all broadcast against the tensor."""

    max_bound: Tensor
    max_ratio: Tensor
    rms_error: Tensor
    rms_bound: Tensor
    rms_ratio: Tensor

    @staticmethod
    def of(part: _Comparison, tolerance: Tolerance, sample_dim: int | None) -> _Bounds:
        dims = [dim for dim in range(part.truth.ndim) if dim != sample_dim]
        # With no dimension to reduce, PyTorch would reduce all of them.
        largest = part.eager_error.amax(dims, keepdim=True) if dims else part.eager_error
        rms = _rms(part.eager_error, dims) if dims else part.eager_error
        size = _rms(part.scale, dims) if dims else part.scale.abs()
        rms_error = _rms(part.error, dims) if dims else part.error
        rms_floor = _rms(part.floor, dims) if dims else part.floor
        count = part.truth.numel() // largest.numel()
        scatter = 1 + _FEW / count
        pooled = (size > 0) & (size >= size.median() / 16)
        largest = largest.maximum(_share(torch.where(pooled, largest, 0.0), size).max() * size)
        rms = rms.maximum(_share(torch.where(pooled, rms, 0.0), size).max() * size)
        max_bound = max(tolerance.max_ratio, scatter) * largest + part.floor
        rms_bound = max(tolerance.rms_ratio, scatter) * rms + rms_floor
        return _Bounds(
            max_bound=max_bound,
            max_ratio=_share(part.error, max_bound),
            rms_error=rms_error,
            rms_bound=rms_bound,
            rms_ratio=_share(rms_error, rms_bound),
        )
