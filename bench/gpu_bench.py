"""The benchmarks: both models, in training too, then their layers, against eager and torch.compile with
max-autotune.

All columns of a row are taken in turn in one process. Columns that compile come in a second round, since
compiling may take longer than the machine is there; what was measured without them is kept.
"""

from __future__ import annotations

import contextlib
import functools
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

BATCHES, BATCHES_MORE = (256, 1, 64), (256,)
# on an H200: times a peer's speed, images a second at least, milliseconds at most
_GOALS: dict[str, dict[str, float]] = {
    "resnet50 b256": {"eager": 2.2, "compile": 1.6, "images/s": 49000.0},
    "vit_b_16 b256": {"eager": 1.35, "compile": 1.2, "images/s": 16000.0},
    "vit_l_16 b256": {"eager": 1.25, "compile": 1.1},
    "vit_s_16 b256": {"eager": 1.4, "compile": 1.2},
    "resnet50 b1": {"eager": 8.0, "compile": 1.3, "ms": 0.18},
    "vit_b_16 b1": {"eager": 5.0, "compile": 1.3, "ms": 0.25},
}
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
        columns[f"fastvr{suffix}"] = _under(mode, models.call(pair.ours, x))
        try:
            with backend.use_backend(mode):
                prepared: Callable[[Tensor], Tensor] = prepare(pair.ours, x)
        except Exception as error:
            # without what its frames hold
            prepared = functools.partial(_raise, error.with_traceback(None))
        columns[f"prepared{suffix}"] = _under(mode, models.call(prepared, x))
    return columns


def _raise(error: Exception, x: Tensor) -> Tensor:
    raise error


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


def _model(
    name: str, batch: int, dtype: torch.dtype, session: Session, peaks: record.Peaks, *, compiling: bool
) -> dict[str, Any]:
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
    if "H200" in record.gpu_name(session.device):
        row["goals"] = verdicts(name, batch, row)
    return row


def verdicts(name: str, batch: int, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Each of the goals that the row's columns can be held to, by medians of the interleaved run: the
    prepared model's, and from more than one image the plain call's too."""
    found = []
    for column in ("prepared",) if batch == 1 else ("fastvr", "prepared"):
        if "latency_ms" not in (ours := row.get(column, {})):
            continue
        ms = ours["latency_ms"]["p50"]
        for against, limit in _GOALS.get(f"{name} b{batch}", {}).items():
            own = {"ms": ms, "images/s": ours["images_per_s"]}
            if against not in own:
                if "latency_ms" not in (peer := row.get(against, {})):
                    continue
                own[against] = peer["latency_ms"]["p50"] / ms
            value = own[against]
            holds = value <= limit if against == "ms" else value >= limit
            found.append(
                {"column": column, "against": against, "value": value, "limit": limit, "holds": holds}
            )
    return found


def _models(
    session: Session,
    content: dict[str, Any],
    save: Callable[[], None],
    peaks: record.Peaks,
    *,
    compiling: bool,
    more: bool = False,
) -> bool:
    """False where the budget ended it. ``more``: the models that are measured after everything else."""
    dtype = torch.bfloat16
    batches = BATCHES_MORE if more else BATCHES
    for batch in (2,) if session.small else batches:
        for name in cases.MORE_MODELS if more else cases.MODELS:
            if session.left() <= (_COMPILE_SECONDS if compiling and not session.small else 0):
                return False
            label = f"{name} b{batch}"
            try:
                row = _model(name, batch, dtype, session, peaks, compiling=compiling)
            except Exception as error:
                session.say(f"bench FAILED {label}: {describe(error)}")
                # what an earlier round has measured stays
                content["models"].setdefault(label, {"fastvr": {"error": describe(error)}})
                save()
                continue
            content["models"][label] = row
            save()
            session.say(f"bench {label}: " + _speeds(row))
    return True


def _speeds(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {v['images_per_s']:g}/s" for name, v in row.items() if "images_per_s" in v)


def _layer(case: cases.Case, kind: torch.dtype, session: Session, peaks: record.Peaks) -> dict[str, Any]:
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
    return row


def _layers(session: Session, content: dict[str, Any], save: Callable[[], None], peaks: record.Peaks) -> bool:
    dtype, kind = "bfloat16", torch.bfloat16
    layers = [c for op in cases.OPS for c in cases.cases(op, real=not session.small)]
    for case in layers:
        if case.label.startswith(("ViT-S", "ViT-L")):
            continue
        if session.left() <= (0 if session.small else 10):
            return False
        try:
            row = _layer(case, kind, session, peaks)
        except Exception as error:
            row = {"fastvr": {"error": describe(error)}}
            session.say(f"bench FAILED {case} {dtype}: {describe(error)}")
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
            and _models(session, content, save, peaks, compiling=compiling, more=True)
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
