"""A compile cache made without a GPU and taken along to one, so that its minutes are not spent compiling.

Triton's cache knows its files by absolute paths and keeps every intermediate form. ``pack`` drops what a
launch does not read and makes the paths relative, ``adopt`` puts a copy where this process may write and
restores them. A hit needs the same Triton, the same Python minor version and the same kernel sources.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
LIMIT_BYTES = 60_000_000
_KEPT = (".json", ".cubin", ".hsaco")


def _identity() -> dict[str, str]:
    major, minor, _ = platform.python_version_tuple()
    return {
        "triton": importlib.metadata.version("triton"),
        "python": f"{major}.{minor}",
        "machine": platform.machine(),
    }


def pack(source: Path, target: Path, **facts: Any) -> int:
    """Copy what launches need of the cache ``source`` into ``target``; returns its bytes.

    Raises:
        ValueError: it came out larger than LIMIT_BYTES.
    """
    size = 0
    target.mkdir(parents=True, exist_ok=True)
    for group in sorted(source.glob("*/__grp__*.json")):
        content = json.loads(group.read_text())
        kept = {name: path for name, path in content["child_paths"].items() if name.endswith(_KEPT)}
        folder = target / group.parent.name
        folder.mkdir(exist_ok=True)
        for name, path in kept.items():
            shutil.copyfile(path, folder / name)
            size += (folder / name).stat().st_size
        (folder / group.name).write_text(json.dumps({"child_paths": {name: name for name in kept}}))
    if size > LIMIT_BYTES:
        raise ValueError(f"the cache takes {size / 1e6:.0f} MB, more than {LIMIT_BYTES / 1e6:.0f} MB")
    (target / MANIFEST).write_text(json.dumps(_identity() | {"bytes": size} | facts, indent=1) + "\n")
    return size


def adopt(packed: Path) -> str:
    """Point Triton, not imported yet, at a writable copy of ``packed``; returns what happened."""
    try:
        manifest = json.loads((packed / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"no compile cache at {packed}: {error}"
    different = {
        key: f"{manifest.get(key)} there, {value} here"
        for key, value in _identity().items()
        if manifest.get(key) != value
    }
    if different:
        return f"the compile cache at {packed} is for another machine: {different}"
    home = Path(tempfile.mkdtemp(prefix="fastvr-triton-"))
    count = 0
    for group in packed.glob("*/__grp__*.json"):
        folder = home / group.parent.name
        shutil.copytree(group.parent, folder)
        children = json.loads(group.read_text())["child_paths"]
        absolute = {name: str(folder / path) for name, path in children.items()}
        (folder / group.name).write_text(json.dumps({"child_paths": absolute}))
        count += 1
    os.environ["TRITON_CACHE_DIR"] = str(home)
    return f"compile cache: {count} kernels from {packed}"


class Hits:
    """How many compilations Triton's cache spared this process."""

    def __init__(self) -> None:
        self.hits = 0
        self.misses: list[str] = []

    def listen(self) -> None:
        import triton

        def listener(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
            if cache_hit:
                self.hits += 1
            else:
                self.misses.append(str(metadata.get("name")))

        triton.knobs.compilation.listener = listener

    def __str__(self) -> str:
        names = ", ".join(sorted(set(self.misses))[:8])
        return f"{self.hits} kernels from the cache, {len(self.misses)} compiled" + (
            f" ({names})" if names else ""
        )


def warm_jobs(jobs: list[Any]) -> list[str]:
    """Compile what the jobs launch; the errors of those where that fails."""
    import launches

    errors = []
    for job in jobs:
        try:
            for launch in launches.record_job(job):
                launches.compile_launch(launch, job.arch)
        except Exception as error:
            errors.append(f"{job}: {type(error).__name__}: {str(error)[:200]}")
    return errors


def warm_models(item: tuple[str, str, str]) -> list[str]:
    """The same for a model's default configurations at every batch that is measured."""
    import gpu_bench
    import launches
    import models
    import torch

    import fastvr

    name, dtype, arch = item
    kind = getattr(torch, dtype)
    try:
        pair = models.build(name, kind, "meta")
        for batch in (4, *gpu_bench.BATCHES):
            x = pair.example(batch, kind, torch.device("meta"))
            for model in (pair.ours, fastvr.prepare(pair.ours, x)):
                for launch in launches.record(models.call(model, x), arch):
                    launches.compile_launch(launch, arch)
    except Exception as error:
        return [f"{name} {dtype}: {type(error).__name__}: {str(error)[:200]}"]
    return []


def warm(out: Path, arch: str, *, seed: int, samples: int | None) -> int:
    """Compile for ``arch`` what ``on_gpu.py`` launches there, into ``out``; returns how many failed."""
    with tempfile.TemporaryDirectory(prefix="fastvr-warm-") as scratch:
        os.environ["TRITON_CACHE_DIR"] = scratch
        import cases
        import gpu_parity
        import gpu_tune
        import launches

        dtypes = ("bfloat16", "float16", "float32")
        count = samples or gpu_parity.SAMPLES
        jobs = gpu_parity.plan(arch, dtypes, small=False, seed=seed, count=count)
        for case, dtype in gpu_tune.plan(dtypes, small=False):
            jobs += launches.sweep(case, dtype, arch)
        # jobs that may make the same binary go to the same process, which then compiles it once
        groups: dict[Any, list[Any]] = {}
        for job in dict.fromkeys(jobs):
            groups.setdefault((job.case.op, job.dtype, job.forced), []).append(job)

        def progress(done: int, total: int) -> None:
            if done % 20 == 0 or done == total:
                print(f"{done} of {total}", flush=True)

        # the longest first
        work = sorted(groups.values(), key=len, reverse=True)
        found = launches.in_parallel(warm_jobs, work, progress, launches.workers())
        items = [(name, dtype, arch) for name in cases.MODELS for dtype in dtypes]
        found += launches.in_parallel(warm_models, items, progress, launches.workers())
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(out)
        size = pack(Path(scratch), out, arch=arch, seed=seed, samples=count)
    errors = [error for several in found for error in several]
    for error in errors[:20]:
        print(f"FAILED {error}")
    kernels = len(list(out.glob("*/__grp__*.json")))
    print(f"{kernels} kernels for {arch}, {size / 1e6:.1f} MB in {out}; {len(errors)} failures")
    return len(errors)
