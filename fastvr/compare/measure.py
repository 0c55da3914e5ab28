"""Timing that is fair to every column: synchronised, interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call, from the call until its result is there."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return Timing(
            p20=1e3 * ordered[round(0.2 * last)],
            p50=1e3 * statistics.median(ordered),
            p80=1e3 * ordered[round(0.8 * last)],
            rounds=len(ordered),
        )

    def json(self) -> dict[str, float]:
        return asdict(self)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    calls: Mapping[str, Call], device: torch.device, *, seconds: float, least: int = 3, most: int = 200
) -> dict[str, Timing | str]:
    """Time the calls in turn, round after round, so that a machine that slows down slows all of them.

    Args:
        calls: by column; each is warmed up first. The order rotates, so that none always follows the same.
        seconds: for all of them together, warm-up not counted. ``least`` rounds may take longer, but none
            begins after twice the time.

    Returns:
        By column, its timing, or why there is none ("out of memory").
    """
    times: dict[str, list[float]] = {}
    results: dict[str, Timing | str] = {}
    for name, call in calls.items():
        try:
            for _ in range(3 if device.type == "cuda" else 1):
                call()
            synchronize(device)
        except torch.OutOfMemoryError:
            results[name] = "out of memory"
            torch.cuda.empty_cache()
        else:
            times[name] = []
    order = list(times)
    begin = time.perf_counter()
    for done in range(most):
        passed = time.perf_counter() - begin
        if not order or (done and passed > (seconds if done >= least else 2 * seconds)):
            break
        order.append(order.pop(0))
        for name in order:
            synchronize(device)
            start = time.perf_counter()
            calls[name]()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    results |= {name: Timing.of(taken) for name, taken in times.items()}
    return {name: results[name] for name in calls}


def peak_memory(call: Call, weights: int, device: torch.device) -> int | None:
    """Bytes on the GPU that ``call`` needs at most: ``weights`` and what it allocates. None on a CPU, where
    PyTorch keeps no such account."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return weights + torch.cuda.max_memory_allocated(device) - before
