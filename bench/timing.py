"""The timers of the benchmarks: the package's own (``fastvr.tuner.timing``), and two that only they need.

``host_clock`` is what pytest-benchmark uses (it synchronises), ``device_times`` what the tuner and the
rooflines use.
"""

from __future__ import annotations

import time

import torch

from fastvr.tuner.timing import Fn, Times, device_times, host_times, interleaved, summarise, synchronize

__all__ = [
    "Fn",
    "Times",
    "device_times",
    "host_clock",
    "host_times",
    "interleaved",
    "summarise",
    "synchronize",
    "throughput",
]


def host_clock() -> float:
    """Seconds, after everything that was launched has ended: pytest-benchmark's timer."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def throughput(fn: Fn, device: torch.device, *, rep_ms: float) -> float:
    """Milliseconds a call when calls are queued back to back and waited for once at the end."""
    fn()
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    count = max(1, int(rep_ms / max((time.perf_counter() - start) * 1e3, 1e-3)))
    start = time.perf_counter()
    for _ in range(count):
        fn()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / count
