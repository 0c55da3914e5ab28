"""One call's sweep: every configuration behind the gate, beside what would run instead of the kernel."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fastvr import backend, tuning
from fastvr.ops._op import OPS
from fastvr.tuner.calls import Call, materialise
from fastvr.tuner.gate import Gate
from fastvr.tuner.timing import Fn, Times, device_times, host_times

Timer = Callable[[Fn, torch.device], Times]
Known = Callable[[str], "tuning.Entry | None"]


def gpu_timer(rep_ms: float) -> Timer:
    """Device times with a cold L2, from about ``rep_ms`` milliseconds of replays."""
    return functools.partial(device_times, rep_ms=rep_ms)


def stand_in_timer(fn: Fn, device: torch.device) -> Times:
    """A clock around one call, for where there is no GPU: it says nothing about one."""
    return host_times(fn, device, rep_ms=0, min_count=1, warmup=0)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate of one call: its times, or why it was dropped.

    ``impl`` is "triton" with the configurations ``forced``, by knob, or "reference".
    """

    call: Call
    impl: str
    forced: dict[str, tuning.Config]
    times: Times | None
    error: str = ""


def describe(error: BaseException) -> str:
    """The first lines of an error, enough to find it by."""
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return "\n".join(lines[:6])[:800]


@contextlib.contextmanager
def forcing(forced: Mapping[str, tuning.Config]) -> Iterator[None]:
    """Launch each op with its configuration in ``forced``."""
    with contextlib.ExitStack() as stack:
        for knob, config in forced.items():
            stack.enter_context(tuning.force_config(knob, config))
        yield


class Sweep:
    """Measures calls on ``device``.

    Args:
        timer: takes a function and the device.
        versions: what the measurement is made with, for the entries.
        known: the entry of a key, where a knob of a call need not be measured again.
        limit: at most so many configurations a knob, the likeliest; None for all.
        expired: whether to stop, asked before each measurement.
        tell: is given each trial as it ends.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        timer: Timer,
        versions: str,
        known: Known,
        limit: int | None = None,
        expired: Callable[[], bool] = lambda: False,
        tell: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        self._device, self._timer, self._versions, self._known = device, timer, versions, known
        self._limit, self._expired, self._tell = limit, expired, tell

    def measure(self, call: Call) -> dict[str, tuning.Entry]:
        """The entries of the call's own key and of its knobs, as far as time allowed; empty where nothing
        could be said.

        Raises:
            torch.AcceleratorError: a kernel broke the GPU's context: nothing more can run in this process.
        """
        args = materialise(call, self._device)
        gate = Gate(call, args)
        reference = self._time(call, "reference", {}, _instead(call, args), None)
        entries: dict[str, tuning.Entry] = {}
        forced: dict[str, tuning.Config] = {}
        own: tuning.Config | None = None
        best: list[float] = []
        complete = True

        def kernel() -> Any:
            return OPS[call.op](*args)

        for knob in call.knobs:
            known = self._known(knob.key)
            if known is not None and known.config is not None and knob.key != call.key:
                forced[knob.name] = known.config
                continue
            if knob.key != call.key and knob.name in OPS:
                continue  # another op's own entry: its times are not this call's
            timed: list[tuple[float, tuning.Config]] = []
            candidates = self._ordered(knob)
            complete = complete and (self._limit is None or len(candidates) <= self._limit)
            for config in candidates[: self._limit]:
                if self._expired():
                    complete = False
                    break
                ms = self._time(call, "triton", forced | {knob.name: config}, kernel, gate)
                if ms is not None:
                    timed.append((ms, config))
            if not timed:
                # out of time, nothing is known; else no configuration works
                return self._lost(call, reference) if complete else {}
            timed.sort(key=lambda pair: pair[0])
            best, chosen = [ms for ms, _ in timed[:2]], timed[0][1]
            forced[knob.name] = chosen
            if knob.key == call.key:
                own = chosen
            else:
                entries[knob.key] = self._entry("triton", chosen, best, reference, complete)
        if not best and not self._expired():
            ms = self._time(call, "triton", forced, kernel, gate)
            if ms is None:
                return entries | self._lost(call, reference)
            best = [ms]
        if best:
            impl = "triton" if reference is None or best[0] < reference else "reference"
            entries[call.key] = self._entry(impl, own, best, reference, complete)
        return entries

    def _lost(self, call: Call, reference: float | None) -> dict[str, tuning.Entry]:
        if reference is None:
            return {}
        return {call.key: self._entry("reference", None, [], reference, complete=True)}

    def _entry(
        self,
        impl: str,
        config: tuning.Config | None,
        best: list[float],
        reference: float | None,
        complete: bool,
    ) -> tuning.Entry:
        times = [*best, *([] if reference is None else [reference])]
        won = reference if impl == "reference" and reference is not None else best[0]
        times.remove(won)
        return tuning.Entry(
            impl=impl,
            config=config,
            ms=won,
            runner_up_ms=min(times, default=None),
            reference_ms=reference,
            complete=complete,
            versions=self._versions,
        )

    def _ordered(self, knob: tuning.Knob) -> list[tuning.Config]:
        """The default first, then what the tables hold for a near shape or a sibling, then as listed."""
        near = tuning.lookup(knob.key, self._device)
        likely = [knob.default, *([near.config] if near and near.config in knob.candidates else [])]
        ordered: list[tuning.Config] = []
        for config in (*likely, *knob.candidates):
            if config is not None and config not in ordered:
                ordered.append(config)
        return ordered

    def _time(
        self, call: Call, impl: str, forced: dict[str, tuning.Config], run: Fn, gate: Gate | None
    ) -> float | None:
        """Milliseconds behind the gate, or None where the candidate is dropped."""
        # a fused op's parts choose for themselves, as they would without it
        mode = "triton" if impl == "triton" else "auto" if OPS[call.op].parts else "reference"
        times, error = None, ""
        with backend.use_backend(mode, strict=False), forcing(forced), torch.no_grad():
            try:
                if gate is not None:
                    gate.check()
                times = self._timer(run, self._device)
            except torch.AcceleratorError:
                raise
            except Exception as problem:
                error = describe(problem)
                if isinstance(problem, torch.OutOfMemoryError):
                    torch.cuda.empty_cache()
        self._tell(Trial(call, impl, dict(forced), times, error))
        return None if times is None else times.p50


def _instead(call: Call, args: tuple[Any, ...]) -> Fn:
    """What would run without the kernel."""
    op = OPS[call.op]
    if op.parts is not None:
        parts = op.parts
        return lambda: parts(*args)
    return lambda: op.reference(*args)
