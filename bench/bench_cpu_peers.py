"""ViT-B/16 and ResNet-50 on a CPU, beside what people use there, in turn in one process.

    python bench/bench_cpu_peers.py [--batch 8] [--threads N] [--models resnet50] [--dtypes bfloat16]

In float32, and in bfloat16 where the CPU has instructions for it. Columns: timm or torchvision eager (ResNet
in both layouts), fastvr as it is called and prepared, ONNX Runtime (float32: it has no bfloat16 there) and
OpenVINO.
Each has the error of its logits against float64, as a multiple of eager's; that of a peer is its own affair.

The goal, for which the exit status answers: the prepared model no slower than ONNX Runtime and within 1.1
times OpenVINO, the plain call no slower than eager in any layout. A peer that is not installed is named and
left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import models
import torch
from record import commit
from torch import Tensor, nn

import fastvr
from fastvr.doctor import environment
from fastvr.ops.cpu import mkldnn

PLAIN, PREPARED = "fastvr", "fastvr prepared"
EAGER, ONNX, OPENVINO = "eager", "ONNX Runtime", "OpenVINO"
# by column and peer, how many times the peer's time is allowed
GOALS = {PLAIN: {EAGER: 1.0}, PREPARED: {EAGER: 1.0, ONNX: 1.0, OPENVINO: 1.1}}
_PACKAGES = {ONNX: "onnxruntime", OPENVINO: "openvino"}
_OPENVINO_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# two calls that do the same thing differ by this much in a median of interleaved runs
NOISE = 0.02
# seconds; the runtimes' threads were seen to spin for less after a call
_REST = 0.05


@dataclasses.dataclass(frozen=True)
class Column:
    """``call`` gives the logits; ``peer`` is which of the goals' peers it is, if it is one."""

    name: str
    call: Callable[[], Tensor]
    peer: str | None = None


def onnx_file(model: nn.Module, x: Tensor) -> bytes:
    """``model`` as ONNX for images of x's shape."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # the exporter that needs no further package is the old one, and tells so
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], output_names=["y"])
    return file.getvalue()


def onnxruntime_column(graph: bytes, x: Tensor, threads: int) -> Column:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = {"x": x.numpy()}
    return Column(ONNX, lambda: torch.from_numpy(session.run(None, given)[0]), ONNX)


def openvino_column(graph: bytes, x: Tensor, threads: int, dtype: torch.dtype) -> Column:
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _OPENVINO_TYPES[dtype],
    }
    compiled = core.compile_model(core.read_model(graph), "CPU", options)
    chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    given, request = x.numpy(), compiled.create_infer_request()
    return Column(
        f"{OPENVINO} {chosen}", lambda: torch.from_numpy(request.infer({0: given})[0].copy()), OPENVINO
    )


def left_out(peer: str, dtype: torch.dtype) -> str | None:
    """Why there is no column of ``peer``, or None."""
    if peer == ONNX and dtype == torch.bfloat16:
        return f"{peer}: it has no bfloat16 on a CPU"
    absent = [p for p in (_PACKAGES[peer], "onnx") if importlib.util.find_spec(p) is None]
    return f"{peer}: {' and '.join(absent)} not installed" if absent else None


def columns(pair: models.Pair, x: Tensor, threads: int) -> tuple[list[Column], list[str]]:
    """The columns, and what is left out with the reason."""
    contiguous = copy.deepcopy(pair.eager).to(memory_format=torch.contiguous_format)
    plain = x.contiguous()
    found = []
    if pair.name == "resnet50":
        found.append(Column(f"{pair.baseline} channels_last", models.call(pair.eager, x), EAGER))
    found.append(Column(f"{pair.baseline} contiguous", models.call(contiguous, plain), EAGER))
    found.append(Column(PLAIN, models.call(pair.ours, x)))
    found.append(Column(PREPARED, models.call(fastvr.prepare(pair.ours, x), x)))
    reasons = {peer: left_out(peer, x.dtype) for peer in _PACKAGES}
    if None in reasons.values():
        # peers take float32, whatever they compute in
        plain = plain.float()
        graph = onnx_file(copy.deepcopy(contiguous).float(), plain)
        if reasons[ONNX] is None:
            found.append(onnxruntime_column(graph, plain, threads))
        if reasons[OPENVINO] is None:
            found.append(openvino_column(graph, plain, threads, x.dtype))
    return found, [reason for reason in reasons.values() if reason is not None]


def measure(found: list[Column], *, rounds: int, seconds: float) -> list[dict[str, float]]:
    """Seconds by column, a round each: at least ``rounds``, and no new one after ``seconds``."""
    for column in found:
        column.call()
    taken: list[dict[str, float]] = []
    order = random.Random(0)
    end = time.perf_counter() + seconds
    while len(taken) < rounds or time.perf_counter() < end:
        times = {}
        # in another order every time, and not before the threads of the one before have stopped waiting for
        # more work: nobody pays for its neighbour
        for column in order.sample(found, len(found)):
            time.sleep(_REST)
            start = time.perf_counter()
            column.call()
            times[column.name] = time.perf_counter() - start
        taken.append(times)
    return taken


def errors(pair: models.Pair, x: Tensor, found: list[Column]) -> dict[str, float]:
    """By column, the RMS error of the logits against float64, as a multiple of eager's."""
    eager, exact = models.truth(pair, x)

    def rms(y: Tensor) -> float:
        return float((y.double() - exact).square().mean().sqrt())

    return {column.name: rms(column.call()) / max(rms(eager), 1e-30) for column in found}


def verdicts(found: list[Column], taken: list[dict[str, float]]) -> list[dict[str, Any]]:
    """For each goal the median over rounds of its ratio, by the fastest column of each peer."""
    result = []
    for ours, peers in GOALS.items():
        for peer, limit in peers.items():
            names = [column.name for column in found if column.peer == peer]
            if not names:
                continue
            best = min(names, key=lambda name: statistics.median(times[name] for times in taken))
            ratio = statistics.median(times[ours] / times[best] for times in taken)
            holds = ratio <= limit * (1 + NOISE)
            result.append({"column": ours, "peer": best, "ratio": ratio, "limit": limit, "holds": holds})
    return result


def run(name: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    pair = models.build(name, _DTYPES[dtype], "cpu", small=args.small)
    x = pair.example(args.batch, _DTYPES[dtype], torch.device("cpu"))
    with torch.no_grad():
        found, missing = columns(pair, x, args.threads)
        error = errors(pair, x, found)
        taken = measure(found, rounds=args.rounds, seconds=args.seconds)
    best_peer = min(statistics.median(t[c.name] for t in taken) for c in found if c.peer)
    rows = {
        column.name: {
            "ms_per_image": statistics.median(t[column.name] for t in taken) * 1e3 / args.batch,
            "fastest_ms_per_image": min(t[column.name] for t in taken) * 1e3 / args.batch,
            "ratio_to_best_peer": statistics.median(t[column.name] for t in taken) / best_peer,
            "error": error[column.name],
        }
        for column in found
    }
    return {
        "model": name,
        "dtype": dtype,
        "rounds": len(taken),
        "columns": rows,
        "goals": verdicts(found, taken),
        "left_out": missing,
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['model']}, {result['dtype']}, {result['rounds']} rounds")
    width = max(map(len, result["columns"]))
    print(f"{'':{width}}  ms/image  fastest  to best peer  error to eager's")
    for name, row in result["columns"].items():
        print(
            f"{name:{width}}  {row['ms_per_image']:8.2f}  {row['fastest_ms_per_image']:7.2f}"
            f"  {row['ratio_to_best_peer']:12.2f}  {row['error']:.2f}"
        )
    for reason in result["left_out"]:
        print(f"left out: {reason}")
    for goal in result["goals"]:
        word = "holds" if goal["holds"] else "MISSED"
        print(f"{word}: {goal['column']} / {goal['peer']} = {goal['ratio']:.2f}, goal {goal['limit']}")


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "timm", "torchvision", "onnx", "onnxruntime", "openvino"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every column")
    parser.add_argument("--models", nargs="+", choices=cases.MODELS, default=list(cases.MODELS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=_DTYPES, default=[n for n, d in _DTYPES.items() if mkldnn.supports(d)]
    )
    parser.add_argument("--rounds", type=int, default=7, help="at least so many")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="a model and dtype, while rounds may begin"
    )
    parser.add_argument("--small", action="store_true", help="small models, to see that it runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if min(args.batch, args.threads, args.rounds) < 1:
        parser.error("--batch, --threads and --rounds must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        where = environment(torch.device("cpu"))
        print(f"{where['cpu']}, {args.threads} threads, batch {args.batch}")
        print(", ".join(f"{name} {version}" for name, version in versions().items()))
        results = []
        for name in args.models:
            for dtype in args.dtypes:
                results.append(run(name, dtype, args))
                show(results[-1])
    finally:
        torch.set_num_threads(before)
    if args.json:
        found = {"environment": where, "versions": versions(), "commit": commit(), "batch": args.batch}
        args.json.write_text(json.dumps(found | {"models": results}, indent=1) + "\n")
    return 0 if all(goal["holds"] for result in results for goal in result["goals"]) else 1


if __name__ == "__main__":
    sys.exit(main())
