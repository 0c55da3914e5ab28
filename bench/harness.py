"""The columns of a benchmark: eager, fastvr and torch.compile of the same call on the same tensors.

``op_benchmark`` makes the test of a ``bench_<op>.py``; ``models.py`` has what ``bench_models.py`` compares.
On a GPU the fastvr column is the Triton kernel, forced; on a CPU it is what ``auto`` runs there, PyTorch
itself, since a kernel in the interpreter has no speed to speak of. extra_info says so.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from typing import Any

import cases
import inputs
import pytest
import record
import timing
import torch

from fastvr import backend
from fastvr.testing import assert_parity, measure_parity

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
COLUMNS = ("eager", "fastvr", "compile")
DTYPES = ("bfloat16",) if CUDA else ("float32",)
CPU_NOTE = "no GPU: the fastvr column is PyTorch (auto); its kernels are not timed in the interpreter"
# compiling for a CPU takes seconds a function, and says nothing about a GPU
_COMPILED_ON_CPU = 1


def no_compiler() -> str | None:
    """Why torch.compile cannot run here, or None."""
    if not CUDA and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler on a CPU, and there is none"
    return None


@dataclasses.dataclass(frozen=True)
class Column:
    """One way to run the call; ``mode`` is the backend in force while it runs."""

    name: str
    mode: str
    run: Callable[[], torch.Tensor]
    graph: bool = True  # whether its device time may be taken by capturing it


def column(name: str, call: Callable[[], torch.Tensor]) -> Column:
    """``call``, the public function or a model of ours, as the column ``name``."""
    if name == "eager":
        return Column(name, "reference", call)
    if name == "compile":
        # without its own CUDA graphs, so that both are timed by the same replay
        mode = "max-autotune-no-cudagraphs" if CUDA else None
        return Column(name, "reference", torch.compile(call, mode=mode, dynamic=False))
    return Column(name, "triton" if CUDA else "auto", call)


@dataclasses.dataclass(frozen=True)
class Expected:
    """PyTorch's own result, the float64 truth, and what one call must do at least."""

    eager: torch.Tensor
    truth: torch.Tensor
    cost: tuple[int, int]


@functools.lru_cache(maxsize=2)
def _arguments(case: cases.Case, dtype: str) -> dict[str, Any]:
    return inputs.make(case, getattr(torch, dtype), DEVICE)


@functools.lru_cache(maxsize=1)
def _expected(case: cases.Case, dtype: str) -> Expected:
    arguments = _arguments(case, dtype)
    function = inputs.public(case.op)
    with backend.use_backend("reference"):
        eager, truth = function(**arguments), function(**inputs.double(arguments))
    return Expected(eager, truth, inputs.cost(case.op, arguments))


@functools.cache
def peaks(dtype: torch.dtype) -> record.Peaks:
    return record.measure_peaks(DEVICE, dtype)


def measure(benchmark: Any, taken: Column, expected: Expected, *, name: str, dtype: torch.dtype) -> None:
    """Gate, time, and say everything needed to believe the number. A red gate fails the benchmark."""
    with backend.use_backend(taken.mode), torch.no_grad():
        with backend.observe() as ran:
            actual = taken.run()
        # a peer's error is its own affair: shown, not judged
        judge = measure_parity if taken.name == "compile" else assert_parity
        report = judge(actual, expected.eager, expected.truth, name=f"{name} {taken.name}")
        benchmark.group = f"{name} {str(dtype).removeprefix('torch.')}"
        benchmark(taken.run)
        times = timing.device_times(taken.run, DEVICE, rep_ms=50 if CUDA else 5, graph=taken.graph)
    flops, moved = expected.cost
    benchmark.extra_info.update(
        record.environment(DEVICE),
        column=taken.name,
        ran=sorted(f"{op}: {implementation}" for op, implementation in ran),
        parity=report.verdict,
        device_ms={"p20": times.p20, "p50": times.p50, "p80": times.p80, "method": times.method},
        **record.achieved(flops, moved, times.p50),
    )
    if CUDA:
        floor = peaks(dtype).floor_ms(flops, moved)
        benchmark.extra_info["roofline"] = round(floor / times.p50, 3)
    elif taken.name == "fastvr":
        benchmark.extra_info["note"] = CPU_NOTE


def columns_of(index: int) -> tuple[str, ...]:
    """The columns of a list's index-th case."""
    return COLUMNS if CUDA or index < _COMPILED_ON_CPU else COLUMNS[:2]


def timed(test: Callable[..., None]) -> Callable[..., None]:
    """pytest-benchmark's options, on the test itself: it ignores what a conftest adds to a marked one."""
    marked: Callable[..., None] = pytest.mark.benchmark(
        timer=timing.host_clock, min_rounds=5, max_time=0.3 if CUDA else 0.1, warmup=False
    )(test)
    return marked


def op_benchmark(op: str) -> Callable[..., None]:
    """The test that measures every case of ``op`` in every dtype and column."""
    rows = [
        pytest.param(case, dtype, name, id=f"{case.label}-{dtype}-{name}".replace(" ", "_"))
        for index, case in enumerate(cases.cases(op, real=CUDA))
        for dtype in DTYPES
        for name in columns_of(index)
    ]

    @timed
    @pytest.mark.parametrize(("case", "dtype", "name"), rows)
    def test(benchmark: Any, case: cases.Case, dtype: str, name: str) -> None:
        if name == "compile" and (reason := no_compiler()):
            pytest.skip(reason)
        arguments, function = _arguments(case, dtype), inputs.public(op)
        torch.compiler.reset()
        taken = column(name, lambda: function(**arguments))
        measure(benchmark, taken, _expected(case, dtype), name=str(case), dtype=getattr(torch, dtype))

    return test
