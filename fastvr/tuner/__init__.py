"""Measures on this GPU what a model's calls run fastest with, and writes it down for ``fastvr.tuning``.

:func:`tune` takes every configuration of every call that a model makes, :func:`quick` the likeliest few of
those that nobody has measured. Each candidate is held to the parity rule before it may win; one that does not
compile, does not fit or gives wrong numbers is dropped and named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvr import backend, tuning
from fastvr.tuner import timing
from fastvr.tuner.calls import Call, collect
from fastvr.tuner.sweep import Sweep, Timer, Trial, gpu_timer, stand_in_timer
from fastvr.tuning import table

__all__ = ["Dropped", "Progress", "Report", "Won", "header", "quick", "tune", "versions"]

QUICK_SECONDS = 20.0
_QUICK_CANDIDATES = 3  # the default and the two likeliest others
_REP_MS, _QUICK_REP_MS = 20.0, 5.0

Progress = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and what is measured next."""


@dataclasses.dataclass(frozen=True)
class Won:
    """What was found for one call; ``default_ms`` is the time of the kernel's own default configuration."""

    call: str
    count: int
    key: str
    entry: tuning.Entry
    default_ms: float | None


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A candidate that may not win, and why; ``config`` is empty where it is PyTorch or the call itself."""

    call: str
    config: dict[str, tuning.Config]
    reason: str


@dataclasses.dataclass
class Report:
    """What a run of the tuner did.

    ``planned`` counts the keys that the model asks for, ``known`` those that had been measured before.
    ``stopped`` is empty where all were measured, else "budget", "interrupted", or what the GPU reported.
    ``unsaved`` says why the table could not be written; its choices hold for this process even so.
    """

    gpu: str
    path: Path
    timer: str
    planned: int = 0
    known: int = 0
    won: list[Won] = dataclasses.field(default_factory=list)
    dropped: list[Dropped] = dataclasses.field(default_factory=list)
    unsupported: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    stopped: str = ""
    unsaved: str = ""

    @property
    def failed(self) -> bool:
        """Whether the GPU failed."""
        return self.stopped not in ("", "budget", "interrupted")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"path": str(self.path)}


def tune(
    model: Callable[[Tensor], Any],
    examples: Tensor | Sequence[Tensor],
    *,
    budget_seconds: float,
    progress: Progress | None = None,
    timer: Timer | None = None,
    path: Path | None = None,
    again: bool = False,
) -> Report:
    """Measure every candidate of every call that ``model`` makes on images like ``examples``.

    The most expensive calls come first, and what is done is saved as it goes: a budget that runs out, Ctrl-C
    or a kill lose at most the call in progress. Calls that were measured whole with the same versions are
    not measured again. The backend is switched for the whole process meanwhile: no other thread may call ops.

    Args:
        model: a module in eval mode, or any callable that also takes meta tensors.
        examples: images as the model takes them, one tensor for each batch size, on the device to tune for;
            their values do not matter.
        budget_seconds: after which no candidate is begun.
        progress: told before each call.
        timer: milliseconds of a function; by default device times with a cold L2.
        path: the table to write instead of the user's own.
        again: measure also what is known.

    Raises:
        BackendError: no kernel runs on the examples' device.
        TableError: the table cannot be written.
        RuntimeError: a CUDA graph is being captured.
    """
    run = _Run(examples, budget_seconds, timer, path, again=again, limit=None, rep_ms=_REP_MS)
    if run.report.unsaved:
        raise tuning.TableError(run.report.unsaved)
    return run.tune(model, progress)


def quick(
    model: Callable[[Tensor], Any],
    examples: Tensor | Sequence[Tensor],
    *,
    budget_seconds: float = QUICK_SECONDS,
    progress: Progress | None = None,
    timer: Timer | None = None,
    path: Path | None = None,
) -> Report:
    """Measure, for the calls that this card has no entry for, the default and the two likeliest others.

    As :func:`tune` otherwise, except that a table which cannot be written is no error: the choices hold for
    this process, and the report says so. What it finds is marked incomplete: :func:`tune` measures it whole.
    """
    run = _Run(
        examples, budget_seconds, timer, path, again=False, limit=_QUICK_CANDIDATES, rep_ms=_QUICK_REP_MS
    )
    return run.tune(model, progress)


@functools.cache
def versions() -> str:
    """What a measurement depends on besides the GPU."""
    return ", ".join(f"{name} {_version(name)}" for name in ("fastvr", "torch", "triton"))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def header(card: tuning.Card) -> dict[str, Any]:
    """What a table says besides its entries."""
    found = {name: _version(name) for name in ("fastvr", "torch", "triton")}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda or torch.version.hip}
    return {"multiprocessors": card.multiprocessors, "versions": found}


def _card(device: torch.device) -> tuning.Card:
    if device.type == "cuda":
        return tuning.card(device)
    return tuning.Card("cpu", backend.architecture(device), torch.get_num_threads())


class _Run:
    """One run: which calls, until when, what came out."""

    def __init__(
        self,
        examples: Tensor | Sequence[Tensor],
        budget_seconds: float,
        timer: Timer | None,
        path: Path | None,
        *,
        again: bool,
        limit: int | None,
        rep_ms: float,
    ) -> None:
        self._start = time.monotonic()
        self._end = self._start + budget_seconds
        self._examples = [examples] if isinstance(examples, Tensor) else list(examples)
        if not self._examples:
            raise ValueError("tune: examples must hold at least one tensor")
        self._device = self._examples[0].device
        if (missing := backend.unavailable(self._device)) is not None:
            raise backend.BackendError(f"nothing can be tuned here: {missing}")
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("nothing can be tuned while a CUDA graph is being captured")
        self._arch = backend.architecture(self._device)
        self._card = _card(self._device)
        self._again, self._limit = again, limit
        default = gpu_timer(rep_ms) if self._device.type == "cuda" else stand_in_timer
        self._sweep = Sweep(
            self._device,
            timer=timer or default,
            versions=versions(),
            known=lambda key: self._known.get(key),
            limit=limit,
            expired=self._expired,
            tell=self._told,
        )
        method = "stand-in (one call by the clock)" if default is stand_in_timer else "device"
        self.report = Report(self._card.name, path or self._own_path(), "given" if timer else method)
        self._entries: dict[str, tuning.Entry] = {}
        self._trials: list[Trial] = []
        self._save()
        self._known = self._measured()

    def _own_path(self) -> Path:
        if self._device.type != "cuda":
            raise ValueError("tune: path must name a table where there is no GPU")
        return tuning.own_path(self._card.name)

    def _measured(self) -> dict[str, tuning.Entry]:
        entries = tuning.measured(self._card) if self._device.type == "cuda" else {}
        found = table.load(self.report.path, self._card.name)
        return entries | dict(found.entries if found else {})

    def tune(self, model: Callable[[Tensor], Any], progress: Progress | None) -> Report:
        report = self.report
        on_device = (
            torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()
        )
        try:
            with torch.inference_mode(False), on_device:
                calls, report.unsupported = collect(model, self._examples, self._arch)
                report.planned = len(calls)
                todo = [call for call in calls if not self._is_known(call)]
                report.known = len(calls) - len(todo)
                self._all(todo, progress)
        except KeyboardInterrupt:
            report.stopped = "interrupted"
        except torch.AcceleratorError as error:
            report.stopped = f"the GPU failed: {str(error).splitlines()[0]}"
        finally:
            timing.release()
        self._save()
        report.seconds = time.monotonic() - self._start
        return report

    def _is_known(self, call: Call) -> bool:
        entry = self._known.get(call.key)
        if entry is None or self._again:
            return False
        return self._limit is not None or (entry.complete and entry.versions == versions())

    def _all(self, todo: Sequence[Call], progress: Progress | None) -> None:
        for done, call in enumerate(todo):
            if self._expired():
                return
            if progress is not None:
                progress(done / len(todo), str(call))
            self._trials = []
            try:
                entries = self._sweep.measure(call)
            except (KeyboardInterrupt, torch.AcceleratorError):
                raise
            except Exception as error:
                # not a candidate but the call as a whole: no memory for the float64 truth, for one
                self.report.dropped.append(Dropped(str(call), {}, f"{type(error).__name__}: {error}"))
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            self._enter(call, entries)

    def _expired(self) -> bool:
        if time.monotonic() < self._end:
            return False
        self.report.stopped = "budget"
        return True

    def _told(self, trial: Trial) -> None:
        self._trials.append(trial)
        if trial.error:
            self.report.dropped.append(Dropped(str(trial.call), trial.forced, trial.error))

    def _enter(self, call: Call, entries: dict[str, tuning.Entry]) -> None:
        self._known |= entries
        self._entries |= entries
        if (entry := entries.get(call.key)) is not None:
            # the default is tried first
            first = next((trial for trial in self._trials if trial.impl == "triton"), None)
            default_ms = first.times.p50 if first and first.times else None
            self.report.won.append(Won(str(call), call.count, call.key, entry, default_ms))
        if self._device.type == "cuda":
            # a fused op is measured beside its parts as they now run
            tuning.remember(self._card, entries)
        self._save()

    def _save(self) -> None:
        content = tuning.Table(self._card.name, self._arch, self._entries, header(self._card))
        try:
            table.merge(self.report.path, content)
            self.report.unsaved = ""
        except tuning.TableError as error:
            self.report.unsaved = str(error)
