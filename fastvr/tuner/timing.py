"""What a call takes: device times by CUDA graph replay or CUDA events, host times in turn.

Host and device time are different numbers: a host timer around a short kernel measures the launch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Fn = Callable[[], Any]
_FLUSH_BYTES = 256 * 2**20  # several times the L2 of any GPU


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of one call: median, 20 % and 80 % quantiles of ``count`` samples.

    ``method`` is "graph" (CUDA graph replay between events, L2 flushed), "events" (the call between
    events, L2 flushed) or "host" (a clock around the call; the stand-in where there is no GPU).
    """

    p20: float
    p50: float
    p80: float
    count: int
    method: str

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def summarise(samples: Sequence[float], method: str) -> Times:
    """Quantiles of at least one sample, in milliseconds, by linear interpolation."""
    if not samples:
        raise ValueError("no samples were taken")
    if len(samples) == 1:
        return Times(samples[0], samples[0], samples[0], 1, method)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Times(cuts[1], statistics.median(samples), cuts[7], len(samples), method)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_times(fn: Fn, device: torch.device, *, rep_ms: float, min_count: int = 3, warmup: int = 1) -> Times:
    """Each sample is one call, waited for."""
    return interleaved({"": fn}, device, rep_ms=rep_ms, min_count=min_count, warmup=warmup)[""]


def interleaved(
    fns: Mapping[str, Fn], device: torch.device, *, rep_ms: float, min_count: int = 3, warmup: int = 1
) -> dict[str, Times]:
    """Host times of several functions taken in turn: a drifting clock or a neighbour meets them alike.

    ``rep_ms`` is the time to spend on each on average.
    """
    for fn in fns.values():
        for _ in range(warmup):
            fn()
    synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in fns}
    end = time.perf_counter() + rep_ms * len(fns) / 1e3
    rounds = 0
    while rounds < min_count or time.perf_counter() < end:
        for name, fn in fns.items():
            start = time.perf_counter()
            fn()
            synchronize(device)
            samples[name].append((time.perf_counter() - start) * 1e3)
        rounds += 1
    return {name: summarise(taken, "host") for name, taken in samples.items()}


@functools.cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)


def release() -> None:
    """Free the buffer that the L2 is flushed with."""
    _flush_buffer.cache_clear()


def _captured(fn: Fn) -> Fn | None:
    """``fn`` as a CUDA graph's replay, or None where it cannot be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                fn()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fn()
    except RuntimeError:
        # a failed capture leaves an error behind that the next call would report
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        return None
    return graph.replay


def device_times(
    fn: Fn, device: torch.device, *, rep_ms: float = 50.0, min_count: int = 5, graph: bool = True
) -> Times:
    """What the device takes for one call with a cold L2; on a CPU a clock around the call.

    ``graph=False`` where ``fn`` replays CUDA graphs itself (``torch.compile(mode="max-autotune")``).
    """
    if device.type != "cuda":
        return host_times(fn, device, rep_ms=rep_ms, min_count=1)
    fn()
    replay = _captured(fn) if graph else None
    run, method = (replay, "graph") if replay is not None else (fn, "events")
    buffer = _flush_buffer(device)

    def sample(count: int) -> list[float]:
        marks = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)
        ]
        for start, end in marks:
            buffer.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) for start, end in marks]

    first = min(sample(2))
    # the flush takes time too, about 0.1 ms
    return summarise(sample(max(min_count, min(1000, int(rep_ms / (first + 0.1))))), method)
