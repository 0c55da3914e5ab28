"""The sweep: every configuration of every layer beside the vendor's own call, none without a green gate.

Writes <GPU>.json, the table that ``fastvr.tuning`` reads, and tune.json with every candidate's time.
"""

from __future__ import annotations

import functools
from typing import Any

import cases
import inputs
import launches
import record
import timing
import torch
from session import Session, describe
from torch import Tensor

from fastvr import backend, tuning
from fastvr.testing import assert_parity

_CHECKED = 4  # samples at either end of a batch that are held to the truth
_SAMPLED = ("x", "qkv", "q", "kv", "residual")


def plan(dtypes: tuple[str, ...], *, small: bool) -> list[tuple[cases.Case, str]]:
    """Most wanted first: bfloat16, the layers of ViT-B and ResNet-50, large batches."""
    batches = (2,) if small else (256, 1, 64)
    ordered = [
        (case, dtype, batch)
        for dtype in dtypes
        for op in cases.ops(dtype)
        for case in cases.cases(op, real=not small)
        for batch in batches
    ]
    # ViT-S and ViT-L after everything else of their dtype
    ordered.sort(key=lambda item: (dtypes.index(item[1]), item[0].label.startswith(("ViT-S", "ViT-L"))))
    return [(case.at_batch(batch), dtype) for case, dtype, batch in ordered]


def table_name(device: torch.device) -> str:
    """The file's name, as ``fastvr.tuning.table_path`` has it for this GPU."""
    return tuning.table_path(record.gpu_name(device)).name


class _Gate:
    """Holds a call's result to the parity rule, on the batch's first and last samples."""

    def __init__(self, case: cases.Case, arguments: dict[str, Any], name: str) -> None:
        self._name, self._floor = name, inputs.absolute_floor(case)
        function, batch = inputs.public(case.op), case["batch"]
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        ends = sorted({*range(min(_CHECKED, batch)), *range(max(batch - _CHECKED, 0), batch)})
        self._ends = torch.tensor(ends, device=device)
        few = {key: self._few(value) if key in _SAMPLED else value for key, value in arguments.items()}
        with backend.use_backend("reference"):
            self._eager = function(**arguments)[self._ends]
            self._truth = function(**inputs.double(few))

    def _few(self, value: Any) -> Any:
        return value[self._ends] if isinstance(value, Tensor) else value

    def check(self, actual: Tensor) -> None:
        few = actual[self._ends]
        assert_parity(few, self._eager, self._truth, name=self._name, absolute_floor=self._floor)


class Tuner:
    """The table as it grows."""

    def __init__(self, session: Session, *, rep_ms: float) -> None:
        self._session, self._rep_ms = session, rep_ms
        earlier = session.load(table_name(session.device))
        same = earlier.get("sources") == record.source_digest()
        self.entries: dict[str, dict[str, Any]] = dict(earlier.get("entries", {})) if same else {}
        self.measured: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []

    @functools.cached_property
    def peaks(self) -> dict[str, record.Peaks]:
        return {
            name: record.measure_peaks(self._session.device, getattr(torch, name))
            for name in self._session.dtypes
        }

    def save(self, *, complete: bool) -> None:
        device = self._session.device
        table = {key: self.entries[key] for key in sorted(self.entries)}
        self._session.save(table_name(device), {"entries": table})
        peaks = {name: vars(peak) for name, peak in self.peaks.items()} if self.measured else {}
        content = {"complete": complete, "peaks": peaks, "measured": self.measured, "failures": self.failures}
        self._session.save("tune.json", content)

    def tune(self, case: cases.Case, dtype: str) -> None:
        """Measure every candidate of one call, and enter the winner."""
        session, kind = self._session, getattr(torch, dtype)
        consulted = launches.consult(case, dtype, session.arch)
        choice = consulted.choices[0]
        if choice in self.entries:
            return
        arguments = inputs.make(case, kind, session.device)
        function = inputs.public(case.op)
        gate = _Gate(case, arguments, f"{case} {dtype}")
        cost = inputs.cost(case.op, arguments)

        def measure(mode: str, forced: launches.Forced, *, gated: bool) -> float | None:
            with backend.use_backend(mode), launches.forcing(forced):
                try:
                    if gated:
                        gate.check(function(**arguments))
                    times = timing.device_times(
                        lambda: function(**arguments), session.device, rep_ms=self._rep_ms, min_count=5
                    )
                except Exception as error:
                    label = str(launches.Job(case, dtype, session.arch, forced))
                    self.failures.append({"job": label, "error": describe(error)})
                    session.say(f"tune FAILED {label}: {describe(error)}")
                    return None
            self.measured.append(
                {"case": str(case), "dtype": dtype, "key": choice, "mode": mode, **times.as_dict()}
                | {"forced": {knob: dict(config) for knob, config in forced}}
                | {"roofline": round(self.peaks[dtype].floor_ms(*cost) / times.p50, 4)}
                | record.achieved(*cost, times.p50)
            )
            return times.p50

        reference = measure("reference", (), gated=False)
        chosen: launches.Forced = ()
        best: float | None = None
        for knob in consulted.knobs:
            known = self.entries.get(knob.key)
            if known is not None and known.get("config"):
                chosen += ((knob.name, launches.freeze(known["config"])),)
                continue
            if knob.key != choice and knob.name in cases.OPS:
                continue  # another op's own entry: its times are not this call's
            timed = []
            for config in knob.candidates:
                forced = (*chosen, (knob.name, launches.freeze(config)))
                ms = measure("triton", forced, gated=True)
                if ms is not None:
                    timed.append((ms, config))
            if not timed:
                return self._enter(choice, "reference", None, reference, None, reference)
            timed.sort(key=lambda pair: pair[0])
            best = timed[0][0]
            second = timed[1][0] if len(timed) > 1 else None
            chosen += ((knob.name, launches.freeze(timed[0][1])),)
            self._enter(knob.key, "triton", timed[0][1], best, second, reference)
        if best is None:  # every configuration was known already
            best = measure("triton", chosen, gated=True)
        if best is None or (reference is not None and reference <= best):
            own = self.entries.get(choice, {}).get("config")
            self._enter(choice, "reference", own, reference, best, reference)
        elif choice not in self.entries:
            self._enter(choice, "triton", None, best, reference, reference)

    def _enter(
        self,
        key: str,
        implementation: str,
        config: dict[str, int] | None,
        ms: float | None,
        runner_up: float | None,
        reference: float | None,
    ) -> None:
        if ms is None:
            return  # nothing could be measured, and the op's own default stands
        self.entries[key] = {
            "impl": implementation,
            "config": config,
            "ms": ms,
            "runner_up_ms": runner_up,
            "reference_ms": reference,
        }


def run(session: Session) -> int:
    """Writes the table and tune.json; returns the number of candidates that failed."""
    tuner = Tuner(session, rep_ms=1 if session.small else 20)
    todo = plan(session.dtypes[:1] if session.small else session.dtypes, small=session.small)
    current = ("", "")
    for index, (case, dtype) in enumerate(todo):
        if session.left() <= 0:
            tuner.save(complete=False)
            session.say(f"tune: the budget is used up after {index} of {len(todo)} shapes")
            return len(tuner.failures)
        if (case.op, dtype) != current:
            current = (case.op, dtype)
            tuner.save(complete=False)
            session.say(f"tune {case.op} {dtype} ({index} of {len(todo)} shapes)")
        try:
            tuner.tune(case, dtype)
        except Exception as error:
            tuner.failures.append({"job": f"{case} {dtype}", "error": describe(error)})
            session.say(f"tune FAILED {case} {dtype}: {describe(error)}")
    tuner.save(complete=True)
    session.say(f"tune: {len(tuner.entries)} entries, {len(tuner.failures)} candidates failed")
    return len(tuner.failures)
