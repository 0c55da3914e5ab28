"""The kernel launches that a call makes on a named GPU, recorded on meta tensors and compiled without one.

``audit.py`` inspects what comes out, ``on_gpu.py warm`` keeps it for a machine that has the GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import inputs
import torch
from cases import Case

from fastvr import backend, tuning
from fastvr.tuner import calls
from fastvr.tuner import sweep as tuner_sweep

Config = tuple[tuple[str, int], ...]
Forced = tuple[tuple[str, Config], ...]  # (knob, configuration) pairs


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of an op on ``arch``; hashable and picklable, so that processes can share the work."""

    case: Case
    dtype: str
    arch: str
    forced: Forced = ()

    def __str__(self) -> str:
        forced = " ".join(f"{knob}={dict(config)}" for knob, config in self.forced)
        return f"{self.case} {self.dtype} {forced}".rstrip()


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


def refuse_interpreter(script: str) -> None:
    """Kernels decorated under the interpreter cannot be compiled."""
    if backend.interpreting():
        raise SystemExit(f"{script} compiles kernels: run it without TRITON_INTERPRET=1")


def freeze(config: dict[str, int]) -> Config:
    return tuple(config.items())


@contextlib.contextmanager
def forcing(forced: Forced) -> Iterator[None]:
    with tuner_sweep.forcing({knob: dict(config) for knob, config in forced}):
        yield


def record(call: Callable[[], Any], arch: str) -> list[Launch]:
    """The launches of ``call``, whose tensors are on meta, with every op of ours on its Triton kernel.

    Raises:
        BackendError: an op has no kernel for its arguments.
    """
    from fastvr.kernels.common import record_launches
    from fastvr.ops._op import OPS

    launches: list[Launch] = []

    def recorder(
        kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]
    ) -> None:
        launches.append(Launch(kernel, arguments, options))

    schema = inputs.SchemaCalls()
    with backend.use_backend("triton"), backend.assume_architecture(arch), torch.no_grad():
        with schema:
            call()
        with record_launches(recorder):
            for name, args in schema.calls:
                if reason := OPS[name].unsupported(*args):
                    raise backend.BackendError(f"fastvr.{name}: no Triton kernel runs here: {reason}")
                OPS[name].kernel(*args)
    return launches


def record_job(job: Job) -> list[Launch]:
    arguments = inputs.make(job.case, getattr(torch, job.dtype), "meta")
    with forcing(job.forced):
        return record(lambda: inputs.public(job.case.op)(**arguments), job.arch)


@functools.lru_cache(maxsize=4096)
def consult(case: Case, dtype: str, arch: str) -> tuning.Consulted:
    """What a call of ``case`` asks the tuning table for on ``arch``, and which answers there may be."""
    arguments = inputs.make(case, getattr(torch, dtype), "meta")
    function = inputs.public(case.op)
    found = tuning.Consulted()
    for op, args in calls.schema_calls(lambda: function(**arguments), arch):
        one = calls.consult(op, args, arch)
        found.knobs += one.knobs
        found.choices += one.choices
    return found


def sweep(case: Case, dtype: str, arch: str) -> list[Job]:
    """One job for every configuration of every knob of ``case``."""
    return [
        Job(case, dtype, arch, ((knob.name, freeze(config)),))
        for knob in consult(case, dtype, arch).knobs
        for config in knob.candidates
    ]


def compile_launch(launch: Launch, arch: str) -> Any:
    """Triton's CompiledKernel, exactly as the launch would build it on ``arch``."""
    from fastvr.testing.offline import compile_kernel

    return compile_kernel(launch.kernel, launch.arguments, arch=arch, **launch.options)


def resources(compiled: Any) -> Any:
    """``offline.inspect``, remembered beside Triton's cache: disassembling takes longer than a cache hit."""
    from fastvr.testing import offline

    path = _remembered() / f"{compiled.hash}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return offline.Resources(**json.loads(path.read_text()))
    found = offline.inspect(compiled)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(dataclasses.asdict(found), file)
        os.replace(temporary, path)
    return found


@functools.cache
def _remembered() -> Path:
    from fastvr.testing import offline

    default = Path.home() / ".triton" / "cache"
    code = hashlib.sha256(Path(offline.__file__).read_bytes()).hexdigest()[:12]
    return Path(os.environ.get("TRITON_CACHE_DIR", default)) / f"fastvr-audit-{code}"


def uses_dot(kernel: Any) -> bool:
    """Whether the kernel, or a helper that it calls, contains a tl.dot."""
    from triton.runtime.jit import JITFunction

    seen, waiting = set(), [kernel]
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        if "tl.dot(" in function.src:
            return True
        waiting += [
            value
            for name, value in function.fn.__globals__.items()
            if isinstance(value, JITFunction) and f"{name}(" in function.src
        ]
    return False


def workers() -> int:
    return min(16, len(os.sched_getaffinity(0)))


def in_parallel(
    function: Callable[[Any], Any], items: Iterable[Any], progress: Callable[[int, int], None], processes: int
) -> list[Any]:
    """``function`` of every item, in their order, in fresh processes (forked ones share PyTorch's locks)."""
    import concurrent.futures
    import multiprocessing

    items = list(items)
    if processes <= 1 or len(items) <= 2:
        results = []
        for item in items:
            results.append(function(item))
            progress(len(results), len(items))
        return results
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(function, item) for item in items]
        for done, _ in enumerate(concurrent.futures.as_completed(futures), 1):
            progress(done, len(items))
        return [future.result() for future in futures]
