"""The sweep: every configuration of every layer beside the vendor's own call, none without a green gate.

Writes <GPU>.json, a table as ``fastvr.tuning`` reads it, and tune.json with every candidate's time. The
measuring itself is ``fastvr.tuner``'s.
"""

from __future__ import annotations

import functools
from typing import Any

import cases
import inputs
import record
import timing
import torch
from session import Session, describe

from fastvr import tuner, tuning
from fastvr.tuner import calls
from fastvr.tuner.sweep import Sweep, Trial
from fastvr.tuning import table


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


class Tuner:
    """The table as it grows."""

    def __init__(self, session: Session, *, rep_ms: float) -> None:
        self._session = session
        self._path = session.out / table_name(session.device)
        earlier = table.load(self._path, record.gpu_name(session.device))
        same = earlier is not None and earlier.header.get("sources") == record.source_digest()
        self.entries: dict[str, tuning.Entry] = dict(earlier.entries) if earlier and same else {}
        self.measured: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self._case, self._dtype = "", ""
        self._sweep = Sweep(
            session.device,
            timer=lambda fn, device: timing.device_times(fn, device, rep_ms=rep_ms, min_count=5),
            versions=tuner.versions(),
            known=self.entries.get,
            expired=lambda: session.left() <= 0,
            tell=self._told,
        )

    @functools.cached_property
    def peaks(self) -> dict[str, record.Peaks]:
        return {
            name: record.measure_peaks(self._session.device, getattr(torch, name))
            for name in self._session.dtypes
        }

    def save(self, *, complete: bool) -> None:
        header = record.environment(self._session.device)
        content = tuning.Table(header["gpu"], self._session.arch, self.entries, header)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        table.replace_file(self._path, content.text())
        peaks = {name: vars(peak) for name, peak in self.peaks.items()} if self.measured else {}
        self._session.save(
            "tune.json",
            {"complete": complete, "peaks": peaks, "measured": self.measured, "failures": self.failures},
        )

    def tune(self, case: cases.Case, dtype: str) -> None:
        """Measure every candidate of one call, and enter the winner."""
        session, self._case, self._dtype = self._session, str(case), dtype
        arguments = inputs.make(case, getattr(torch, dtype), "meta")
        function = inputs.public(case.op)
        for op, args in calls.schema_calls(lambda: function(**arguments), session.arch):
            call = calls.make_call(op, args, session.arch)
            if call is None or ((known := self.entries.get(call.key)) and known.complete):
                continue
            entries = self._sweep.measure(call)
            self.entries.update(entries)
            if session.device.type == "cuda":
                # a fused op is measured beside its parts as they now run
                tuning.remember(tuning.card(session.device), entries)

    def _told(self, trial: Trial) -> None:
        if trial.times is None:
            forced = " ".join(f"{knob}={config}" for knob, config in trial.forced.items())
            label = f"{self._case} {self._dtype} {forced}".rstrip()
            self.failures.append({"job": label, "error": trial.error})
            self._session.say(f"tune FAILED {label}: {trial.error}")
            return
        flops, moved = trial.call.cost.flops, trial.call.cost.bytes
        self.measured.append(
            {"case": self._case, "dtype": self._dtype, "key": trial.call.key, "mode": trial.impl}
            | trial.times.as_dict()
            | {"forced": trial.forced}
            | {"roofline": round(self.peaks[self._dtype].floor_ms(flops, moved) / trial.times.p50, 4)}
            | record.achieved(flops, moved, trial.times.p50)
        )


def run(session: Session) -> int:
    """Writes the table and tune.json; returns the number of candidates that failed."""
    sweep = Tuner(session, rep_ms=1 if session.small else 20)
    todo = plan(session.dtypes[:1] if session.small else session.dtypes, small=session.small)
    current = ("", "")
    for index, (case, dtype) in enumerate(todo):
        if session.left() <= 0:
            sweep.save(complete=False)
            session.say(f"tune: the budget is used up after {index} of {len(todo)} shapes")
            return len(sweep.failures)
        if (case.op, dtype) != current:
            current = (case.op, dtype)
            sweep.save(complete=False)
            session.say(f"tune {case.op} {dtype} ({index} of {len(todo)} shapes)")
        try:
            sweep.tune(case, dtype)
        except Exception as error:
            sweep.failures.append({"job": f"{case} {dtype}", "error": describe(error)})
            session.say(f"tune FAILED {case} {dtype}: {describe(error)}")
    sweep.save(complete=all(entry.complete for entry in sweep.entries.values()))
    session.say(f"tune: {len(sweep.entries)} entries, {len(sweep.failures)} candidates failed")
    return len(sweep.failures)
