"""The benchmarks: both models, in training too, then their layers, against eager and torch.compile with
max-autotune.

All columns of a row are taken in turn in one process. Columns that compile come in a second round, since
compiling may take longer than the machine is there; what was measured without them is kept.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import cases
import gpu_train
import gpu_tune
import inputs
import models
import record
import timing
import torch
from session import Session, describe
from torch import Tensor

from fastvr import backend, prepare, tuning
from fastvr.testing import measure_parity

BATCHES = (256, 1, 64)
_COMPILE_SECONDS = 45.0  # what a max-autotune compilation is given at least; without them it is not begun


@contextlib.contextmanager
def fresh_table(session: Session) -> Iterator[None]:
    """``auto`` chooses by the table that this run has just measured, not by the one that ships."""
    path = session.out / gpu_tune.table_name(session.device)
    previous = os.environ.get("FASTVR_TUNING_TABLE")
    if path.exists():
        os.environ["FASTVR_TUNING_TABLE"] = str(path)
    tuning.reload()
    try:
        yield
    finally:
        os.environ.pop("FASTVR_TUNING_TABLE", None)
        if previous is not None:
            os.environ["FASTVR_TUNING_TABLE"] = previous
        tuning.reload()


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Inductor folds weights into constants: what people switch on for a ResNet in inference."""
    from torch._inductor import config

    with config.patch(freezing=True):
        yield


def _under(mode: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``call`` with ``mode`` in force: the columns take turns, so each must set its own."""

    def run() -> Tensor:
        with backend.use_backend(mode):
            return call()

    return run


def compiled(model: Any, session: Session) -> Any:
    mode = "max-autotune" if session.device.type == "cuda" else "default"
    return torch.compile(model, mode=mode, dynamic=False)


def _model_columns(pair: models.Pair, x: Tensor, session: Session) -> dict[str, Callable[[], Tensor]]:
    columns = {"eager": _under("reference", models.call(pair.eager, x))}
    # in the interpreter a forced kernel has no speed
    modes = {"": "auto", ", triton forced": "triton"} if session.device.type == "cuda" else {"": "auto"}
    for suffix, mode in modes.items():
        with backend.use_backend(mode):
            prepared = prepare(pair.ours, x)
        columns[f"fastvr{suffix}"] = _under(mode, models.call(pair.ours, x))
        columns[f"prepared{suffix}"] = _under(mode, models.call(prepared, x))
    return columns


def _row(
    columns: dict[str, Callable[[], Tensor]],
    expected: tuple[Tensor, Tensor],
    cost: tuple[int, int] | None,
    batch: int,
    peaks: record.Peaks,
    session: Session,
) -> dict[str, Any]:
    """Every column behind its parity gate: interleaved latencies, throughput, share of the roofline."""
    found: dict[str, Any] = {}
    good: dict[str, Callable[[], Tensor]] = {}
    for name, run in columns.items():
        try:
            with backend.observe() as ran:
                report = measure_parity(run(), *expected, name=name)
        except Exception as error:
            found[name] = {"error": describe(error)}
            continue
        found[name] = {"parity": report.verdict}
        found[name]["ran"] = {f"{op}: {implementation}": n for (op, implementation), n in ran.items()}
        # a wrong result has no speed; a peer's is its own affair
        if report.passed or name in ("eager", "compile"):
            good[name] = run
    rep_ms = 3 if session.small else 300
    for name, times in timing.interleaved(good, session.device, rep_ms=rep_ms).items():
        ms = timing.throughput(good[name], session.device, rep_ms=rep_ms)
        found[name] |= {"latency_ms": times.as_dict(), "ms": ms, "images_per_s": round(batch / ms * 1e3, 1)}
        if cost is not None and not session.small:
            found[name]["roofline"] = round(peaks.floor_ms(*cost) / ms, 4)
    return found


def _models(
    session: Session,
    content: dict[str, Any],
    save: Callable[[], None],
    peaks: record.Peaks,
    *,
    compiling: bool,
) -> bool:
    """False where the budget ended it."""
    dtype = torch.bfloat16
    batches = (2,) if session.small else BATCHES
    for batch in batches:
        for name in cases.MODELS:
            if session.left() <= (_COMPILE_SECONDS if compiling and not session.small else 0):
                return False
            pair = models.build(name, dtype, session.device, small=session.small)
            x = pair.example(batch, dtype, session.device)
            expected = models.truth(pair, x)
            columns = _model_columns(pair, x, session)
            freezing = frozen() if compiling and name == "resnet50" else contextlib.nullcontext()
            with torch.no_grad(), freezing:
                if compiling:
                    torch.compiler.reset()
                    columns["compile"] = _under("reference", models.call(compiled(pair.eager, session), x))
                row = _row(columns, expected, models.cost(pair, x), batch, peaks, session)
            row["baseline"] = {"eager": pair.baseline}
            content["models"][f"{name} b{batch}"] = row
            save()
            session.say(f"bench {name} b{batch}: " + _speeds(row))
    return True


def _speeds(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {v['images_per_s']:g}/s" for name, v in row.items() if "images_per_s" in v)


def _layers(session: Session, content: dict[str, Any], save: Callable[[], None], peaks: record.Peaks) -> bool:
    dtype, kind = "bfloat16", torch.bfloat16
    layers = [c for op in cases.OPS for c in cases.cases(op, real=not session.small)]
    for case in layers:
        if case.label.startswith(("ViT-S", "ViT-L")):
            continue
        if session.left() <= (0 if session.small else 10):
            return False
        arguments, function = inputs.make(case, kind, session.device), inputs.public(case.op)
        cost = inputs.cost(case.op, arguments)
        with backend.use_backend("reference"):
            expected = function(**arguments), function(**inputs.double(arguments))

        def call(function: Any = function, arguments: dict[str, Any] = arguments) -> Tensor:
            result: Tensor = function(**arguments)
            return result

        columns = {"eager": _under("reference", call), "fastvr": _under("auto", call)}
        if session.device.type == "cuda":
            columns["fastvr, triton forced"] = _under("triton", call)
        if not session.small:
            torch.compiler.reset()
            # without graphs of its own: every column is captured the same way
            inductor = torch.compile(call, mode="max-autotune-no-cudagraphs", dynamic=False)
            columns["compile"] = _under("reference", inductor)
        row: dict[str, Any] = {}
        for name, run in columns.items():
            try:
                report = measure_parity(run(), *expected, name=name)
                row[name] = {"parity": report.verdict}
                if report.passed or name in ("eager", "compile"):
                    times = timing.device_times(run, session.device, rep_ms=1 if session.small else 20)
                    row[name] |= times.as_dict() | record.achieved(*cost, times.p50)
                    row[name]["roofline"] = round(peaks.floor_ms(*cost) / times.p50, 4)
            except Exception as error:
                row[name] = {"error": describe(error)}
        content["ops"][f"{case} {dtype}"] = row
        save()
    return True


def run(session: Session) -> int:
    """Writes bench.json; returns the number of columns that failed."""
    content: dict[str, Any] = {"complete": False, "peaks": {}, "models": {}, "training": {}, "ops": {}}

    def save() -> None:
        session.save("bench.json", content)

    if session.left() <= 0:
        save()
        session.say("bench: the budget is used up")
        return 0
    peaks = record.measure_peaks(session.device, torch.bfloat16)
    content["peaks"] = {"bfloat16": vars(peaks)}
    with fresh_table(session), torch.no_grad():
        finished = all(
            _models(session, content, save, peaks, compiling=compiling)
            and gpu_train.bench(session, content, save, compiling=compiling)
            for compiling in (False, True)
        )
        # the layers even where the models' compilations did not fit: they are short
        content["complete"] = _layers(session, content, save, peaks) and finished
    save()
    if not content["complete"]:
        session.say("bench: the budget is used up")
    rows = (*content["models"].values(), *content["training"].values(), *content["ops"].values())
    columns = [
        column for row in rows for name, column in row.items() if name.startswith(("fastvr", "prepared"))
    ]
    return sum("error" in column or str(column.get("parity", "")).startswith("differs") for column in columns)
