"""The timers: quantiles, turns, waiting."""

from __future__ import annotations

import time

import pytest
import timing
import torch


def test_quantiles_of_known_samples() -> None:
    times = timing.summarise([float(n) for n in range(11)], "host")
    assert (times.p20, times.p50, times.p80, times.count) == (2.0, 5.0, 8.0, 11)


def test_one_sample_is_every_quantile() -> None:
    times = timing.summarise([3.0], "host")
    assert (times.p20, times.p50, times.p80, times.count) == (3.0, 3.0, 3.0, 1)


def test_no_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        timing.summarise([], "host")


def test_columns_take_turns() -> None:
    order: list[str] = []
    fns = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timing.interleaved(fns, torch.device("cpu"), rep_ms=0, min_count=3, warmup=1)
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert {name: t.count for name, t in times.items()} == {"a": 3, "b": 3}


def test_a_sleep_takes_its_time() -> None:
    times = timing.host_times(lambda: time.sleep(0.004), torch.device("cpu"), rep_ms=20)
    assert times.method == "host"
    assert 4.0 <= times.p20 <= times.p50 <= times.p80


def test_throughput_is_time_a_call() -> None:
    calls = []
    ms = timing.throughput(lambda: (calls.append(0), time.sleep(0.002)), torch.device("cpu"), rep_ms=200)
    assert ms >= 2.0
    assert len(calls) > 3


def test_device_times_stand_in_on_a_cpu() -> None:
    times = timing.device_times(lambda: time.sleep(0.001), torch.device("cpu"), rep_ms=1)
    assert times.method == "host"
    assert times.p50 >= 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_times_agree_with_the_clock_and_wait() -> None:
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    graph = timing.device_times(lambda: a @ a, device, rep_ms=50)
    events = timing.device_times(lambda: a @ a, device, rep_ms=50, graph=False)
    host = timing.host_times(lambda: a @ a, device, rep_ms=50)
    assert (graph.method, events.method) == ("graph", "events")
    assert graph.p50 == pytest.approx(events.p50, rel=0.3)
    assert host.p50 == pytest.approx(graph.p50, rel=0.5)
    start = timing.host_clock()
    for _ in range(20):
        a @ a
    assert timing.host_clock() - start > 10 * graph.p50 / 1e3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_cannot_be_captured_is_timed_by_events() -> None:
    device = torch.device("cuda")
    a = torch.randn(64, 64, device=device)
    times = timing.device_times(lambda: (a @ a).sum().item(), device, rep_ms=2)
    assert times.method == "events"
