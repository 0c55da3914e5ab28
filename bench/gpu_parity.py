"""Parity of every op and both models, in training too, with their Triton kernels forced: first on a GPU,
since nothing else counts where it fails."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import cases
import gpu_train
import inputs
import launches
import models
import torch
from launches import Job
from session import Session, describe, samples
from torch.utils._pytree import tree_leaves, tree_map

from fastvr import backend, prepare
from fastvr.testing import ParityReport, check_op, guarded, measure_parity

BATCH = 3  # of the layers' shapes: every tile's edge occurs, and float64 stays cheap
SAMPLES = 24  # random shapes an op and dtype on a GPU
SAMPLES_SMALL = 3
FEW_VALUES, DRAWS = 256, 4  # results of fewer values are held to the rule over so many draws of numbers


def plan(arch: str, dtypes: tuple[str, ...], *, small: bool, seed: int, count: int) -> list[Job]:
    """The layers with every configuration, then a seeded sample of shapes; most wanted dtype first."""
    jobs: list[Job] = []
    for dtype in dtypes:
        # the interpreter is slow: one dtype's layers, and samples in the others
        for op in cases.ops(dtype) if not small or dtype == dtypes[0] else ():
            layers = [case.at_batch(BATCH) for case in cases.cases(op, real=not small)]
            # each configuration on the first layer, and again in turns on the others
            for index, case in enumerate(layers):
                swept = launches.sweep(case, dtype, arch)
                jobs += swept if index == 0 else [swept[index % len(swept)]]
                jobs.append(Job(case, dtype, arch))
        for op in cases.ops(dtype):
            for index, case in enumerate(samples(op, count, small=small, seed=seed)):
                # mostly by the configuration that would run, now and then by another
                swept = launches.sweep(case, dtype, arch) if index % 4 == 3 else []
                jobs.append(swept[index % len(swept)] if swept else Job(case, dtype, arch))
    return list(dict.fromkeys(jobs))


def _check(job: Job, device: torch.device) -> None:
    """Raises AssertionError where a job fails."""
    function = inputs.public(job.case.op)

    def each(draws: list[dict[str, Any]]) -> Any:
        results = [function(**arguments) for arguments in draws]
        return results[0] if len(results) == 1 else tree_map(_joined, *results)

    def forced(draws: list[dict[str, Any]]) -> Any:
        with backend.use_backend("triton"), launches.forcing(job.forced):
            return each(draws)

    def reference(draws: list[dict[str, Any]]) -> Any:
        with backend.use_backend("reference"):
            return each(draws)

    dtype = getattr(torch, job.dtype)
    drawn = [inputs.make(job.case, dtype, device)]
    with torch.no_grad():
        results = [t for t in tree_leaves(reference(drawn)) if isinstance(t, torch.Tensor)]
        # of a few values eager's own error is a matter of luck, and may be exactly 0
        if min(t.numel() for t in results) < FEW_VALUES:
            drawn += [inputs.make(job.case, dtype, device, seed=seed) for seed in range(1, DRAWS)]
        check_op(
            forced,
            reference,
            {"draws": drawn},
            backward=False,
            name=str(job.case),
            absolute_floor=inputs.absolute_floor(job.case),
            kind="gradient" if job.case.op.endswith("_backward") else "forward",
        )
        if device.type == "cuda":
            _repeatable(lambda: forced(drawn[:1]))


def _joined(*results: torch.Tensor | None) -> torch.Tensor | None:
    found = [result for result in results if result is not None]
    return torch.cat(found) if found else None


def _repeatable(call: Any) -> None:
    """Twice the same bits, and the same once more from a captured graph on memory that was dirtied."""
    first = call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        again = call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call()
    for result in tree_leaves(replayed):
        result.fill_(float("nan"))
    graph.replay()
    for name, other in (("a second run", again), ("a graph's replay", replayed)):
        if not all(map(torch.equal, tree_leaves(first), tree_leaves(other))):
            raise AssertionError(f"{name} gives other bits")


def _model(name: str, dtype: torch.dtype, session: Session) -> dict[str, Any]:
    pair = models.build(name, dtype, session.device, small=session.small)
    x = pair.example(2 if session.small else 4, dtype, session.device)
    eager, truth = models.truth(pair, x)
    found: dict[str, Any] = {"baseline": pair.baseline}
    with torch.no_grad(), backend.use_backend("triton"):
        with guarded(), backend.observe() as ran:
            actual = pair.ours(x)
        found["fastvr"] = measure_parity(actual, eager, truth, name=name)
        prepared = prepare(pair.ours, x)
        found["prepared"] = measure_parity(prepared(x), eager, truth, name=f"{name} prepared")
    found["ran"] = {f"{op}: {implementation}": n for (op, implementation), n in ran.items()}
    if any(implementation != "triton" for _, implementation in ran):
        raise AssertionError(f"{name}: some ops ran in PyTorch: {found['ran']}")
    return found


def _model_checks(session: Session) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is checked of the models, by its name in the file: inference in every dtype, then training."""
    checks: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in cases.MODELS:
        for dtype in session.dtypes[:1] if session.small else session.dtypes:
            checks[f"{name} {dtype}"] = functools.partial(_model, name, getattr(torch, dtype), session)
    for name in cases.MODELS:
        for precision in gpu_train.PRECISIONS:
            key = f"{name} training {precision}"
            checks[key] = functools.partial(gpu_train.parity, name, precision, session)
    return checks


def run(session: Session) -> int:
    """Writes parity.json; returns the number of failures."""
    jobs = plan(session.arch, session.dtypes, small=session.small, seed=session.seed, count=session.samples)
    content: dict[str, Any] = {
        "complete": False,
        "planned": len(jobs),
        "passed": 0,
        "failures": [],
        "models": {},
    }
    done: dict[str, int] = {}
    current = ""

    def save() -> None:
        session.save("parity.json", content | {"passed_by_op": done})

    for name, check in _model_checks(session).items():
        if session.left() <= 0:
            save()
            session.say("parity: the budget is used up")
            return len(content["failures"])
        try:
            found = check()
        except Exception as error:
            content["failures"].append({"job": name, "error": describe(error)})
            session.say(f"parity FAILED {name}: {describe(error)}")
            continue
        for column, report in found.items():
            if isinstance(report, ParityReport):
                found[column] = {**dataclasses.asdict(report), "verdict": report.verdict}
                if report.failure:
                    content["failures"].append({"job": f"{name} {column}", "error": report.failure})
        content["models"][name] = found
        session.say(f"parity {name}: {found['fastvr']['verdict']}")
        save()
    for job in jobs:
        if job.case.op != current:
            current = job.case.op
            save()
        if session.left() <= 0:
            save()
            session.say(f"parity: the budget is used up after {content['passed']} of {len(jobs)}")
            return len(content["failures"])
        label = str(job)
        try:
            _check(job, session.device)
        except Exception as error:
            content["failures"].append(
                {"job": label, "sizes": dict(job.case.sizes), "error": describe(error)}
            )
            session.say(f"parity FAILED {label}: {describe(error)}")
        else:
            content["passed"] += 1
            key = f"{job.case.op} {job.dtype}"
            done[key] = done.get(key, 0) + 1
    content["complete"] = True
    save()
    session.say(f"parity: {content['passed']} of {len(jobs)} pass, {len(content['failures'])} failures")
    return len(content["failures"])
