"""What the compiler makes of every kernel, on every architecture, without a GPU.

    python bench/audit.py [--arch sm_90 ...] [--op linear ...] [--all] [--json FILE]

Registers, spills, shared memory, matrix instructions and CTAs an SM of the configurations that may run
there, TF32 in float32 kernels, and how many binaries ten batch sizes make. By default every configuration of
every op once and every kind of call once; --all is each configuration with each real shape. Exit status 1
where one breaks a rule (rules.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import cases  # noqa: E402
import launches  # noqa: E402
import record  # noqa: E402
import rules  # noqa: E402
import torch  # noqa: E402
from launches import Job  # noqa: E402

# PyTorch's switch for convolutions lets them use TF32
_CONVOLUTIONS = (
    "conv_bn_relu",
    "dual_conv_bn_relu",
    "conv_bn_relu_max_pool",
    "bottleneck",
    "bottleneck_chain",
    "residual_block",
    "patch_embed",
    "patch_embed_stats",
)
# no tensor cores: what their binaries differ in shows in a few of them
_NO_PRODUCTS = (
    "layer_norm",
    "layer_norm_backward",
    "dropout",
    "batch_norm_act",
    "batch_norm_act_backward",
    "batch_norm_act_max_pool",
    "batch_norm_act_max_pool_backward",
    "residual_block_backward",
    "conv_bn_relu_backward",
    "max_pool",
    "swiglu",
    "swiglu_backward",
    "max_pool_training",
    "max_pool_backward",
)
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@dataclasses.dataclass(frozen=True)
class Row:
    """One binary, or one job that made none."""

    op: str
    dtype: str
    arch: str
    label: str
    config: str
    kernel: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    mma: str = ""
    ctas_per_sm: int | None = None
    tf32: bool = False
    binaries: int | None = None  # that ten batch sizes make; None where not counted
    failures: tuple[str, ...] = ()


def kinds(op: str) -> list[cases.Case]:
    """One case of each kind of call: the shapes of a kind compile to the same binary."""
    found: dict[tuple[Any, ...], cases.Case] = {}
    kind = ("act", "gamma", "residual", "norm", "kernel", "stride", "head_dim", "planes", "uint8", "frozen")
    kind += ("drop_path", "dropout")
    for case in cases.cases(op, real=True):
        single = case.get("tokens", 0) is None
        found.setdefault((single, *(case.get(name) for name in kind)), case)
    if op == "conv_bn_relu":
        # first, where every configuration is audited, the 3x3 of the smallest map: it has the most of them,
        # those for few pixels too
        first = [case for case in cases.cases(op, real=True) if (case["kernel"], case["stride"]) == (3, 1)][
            -1
        ]
        grouped = cases.Case.of(op, "3x3 groups=32", **dict(first.sizes) | {"groups": 32})
        return [first, *found.values(), grouped]
    if op in ("attention_backward", "attention_kv_backward"):
        # a few keys make a kernel of their own
        few = [
            cases.Case.of(op, f"{case.label}, 7 keys", **dict(case.sizes) | {"tokens": 7})
            for case in found.values()
        ]
        return [*found.values(), *few]
    return list(found.values())


def _own(op: str, dtype: str, arch: str, case: cases.Case) -> list[Job]:
    """The sweep without the knobs that are another op's, which that op's jobs audit."""
    jobs = launches.sweep(case, dtype, arch)
    return [job for job in jobs if job.forced[0][0] == op or job.forced[0][0] not in cases.OPS]


def _few(op: str, dtype: str, arch: str, *, sweep: bool) -> list[Job]:
    """With ``sweep`` every configuration in bfloat16 and float32, other kinds of call with one each;
    otherwise the first and the last. float16 on sm_90 alone. What is made of other ops' launches shows one
    of each."""
    todo = kinds(op)
    swept = _own(op, dtype, arch, todo[0])
    # configurations for a small batch only
    known = {job.forced for job in swept}
    few = [job for job in _own(op, dtype, arch, todo[0].at_batch(1)) if job.forced not in known]
    swept[-1:-1] = few
    if dtype == "float16":
        # bfloat16's code but for the activation, which one architecture shows
        return swept[:1] if arch == "sm_90" and op not in _NO_PRODUCTS else []
    if op == "transformer_block_training":
        return swept[:1]
    if not sweep or op in _NO_PRODUCTS:
        return [swept[0], swept[-1]] if dtype == "bfloat16" else swept[:1]
    if dtype == "float32":
        return swept
    turns = [_own(op, dtype, arch, case) for case in todo[1:3] + todo[3:][-2:]]
    return swept + [jobs[index % len(jobs)] for index, jobs in enumerate(turns, 1)]


@dataclasses.dataclass(frozen=True)
class Task:
    """A job, and whether to count the binaries that ten batch sizes make of it.

    ``tf32``: with PyTorch's switches for it on, which for convolutions is its default: what runs then must
    not spill either. Without them a float32 kernel must not use it.
    """

    job: Job
    count: bool = False
    tf32: bool = False


def plan(
    archs: list[str], ops: list[str], *, everything: bool, swept: Sequence[str] = ("sm_90",)
) -> list[Task]:
    """The whole audit, on ``swept`` with every configuration."""
    tasks: list[Task] = []
    for arch in archs:
        for op in ops:
            for dtype in (name for name in cases.DTYPES if op in cases.ops(name)):
                chosen = _few(op, dtype, arch, sweep=arch in swept)
                if everything:
                    shapes = (*cases.cases(op, real=True), *kinds(op))
                    chosen = [job for case in shapes for job in _own(op, dtype, arch, case)]
                chosen = list(dict.fromkeys(chosen))
                tasks += [Task(job, count=index == 0 or everything) for index, job in enumerate(chosen)]
                if dtype == "float32" and op in _CONVOLUTIONS:
                    tasks += [Task(job, tf32=True) for job in chosen]
    return tasks


def _config_text(launch: launches.Launch) -> str:
    blocks = [str(v) for k, v in launch.arguments.items() if k.startswith("BLOCK_")]
    options = launch.options
    chosen = {name: int(launch.arguments.get(name) or 0) for name in ("TMA", "PERSISTENT", "SPLIT_K")}
    blocks[-1:] = [" ".join([*blocks[-1:], *(f"{k}={v}" for k, v in chosen.items() if v > (k == "SPLIT_K"))])]
    return "x".join(blocks) + f" w{options.get('num_warps', '-')} s{options.get('num_stages', '-')}"


def audit(task: Task) -> list[Row]:
    job, count = task.job, task.count
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = task.tf32
    dtype = "tf32" if task.tf32 else job.dtype
    make = functools.partial(Row, op=job.case.op, dtype=dtype, arch=job.arch, label=job.case.label)
    forced = " ".join(f"{knob}={dict(config)}" for knob, config in job.forced)
    try:
        # an op's other launches keep one configuration at every batch: only this one's is audited
        known = dict(job.forced)
        others = [k for k in launches.consult(job.case, job.dtype, job.arch).knobs if k.name not in known]
        pins = tuple((knob.name, launches.freeze(knob.candidates[0])) for knob in others)
        pinned = dataclasses.replace(job, forced=job.forced + pins)
        recorded = [launch for launch in launches.record_job(pinned) if _carries(launch, job)]
        compiled = [launches.compile_launch(launch, job.arch) for launch in recorded]
        binaries = [{kernel.hash} for kernel in compiled]
        for batch in cases.TEN_BATCHES if count else ():
            other = dataclasses.replace(pinned, case=job.case.at_batch(batch))
            again = [launch for launch in launches.record_job(other) if _carries(launch, job)]
            for hashes, launch in zip(binaries, again, strict=True):
                hashes.add(launches.compile_launch(launch, job.arch).hash)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return [make(config=forced, failures=(text[:200],))]
    rows = []
    for launch, kernel, hashes in zip(recorded, compiled, binaries, strict=True):
        needs = launches.resources(kernel)
        failures = rules.binary_failures(
            needs,
            dtype=dtype,
            dot=launches.uses_dot(launch.kernel),
            arguments=launch.arguments,
            options=launch.options,
        )
        if len(hashes) > 1:
            failures.append(f"{len(hashes)} binaries for ten batch sizes")
        rows.append(
            make(
                config=_config_text(launch),
                kernel=needs.name,
                registers=needs.registers,
                spills=needs.spills,
                shared=needs.shared,
                mma=" ".join(f"{name}:{n}" for name, n in needs.mma.items()),
                ctas_per_sm=needs.ctas_per_sm,
                tf32=needs.tf32,
                binaries=len(hashes) if count else None,
                failures=tuple(failures),
            )
        )
    return rows


def _carries(launch: launches.Launch, job: Job) -> bool:
    """False for an op's other launch, which has a configuration of its own. One that only finishes the work
    (the sum behind a split product) takes a part of the configuration."""
    passed = launch.arguments | launch.options
    return any(all(passed.get(key, value) == value for key, value in config) for _, config in job.forced)


def source_rows() -> list[Row]:
    return [
        Row("-", "-", "source", "", "", path.name, failures=(failure,))
        for path in sorted((ROOT / "kernels").glob("*.py"))
        for failure in rules.source_failures(path)
    ]


def distinct(rows: list[Row]) -> list[Row]:
    """Different shapes make the same binary: one row of each."""
    seen: dict[Any, Row] = {}
    for row in rows:
        seen.setdefault(dataclasses.replace(row, label="", binaries=None), row)
    return list(seen.values())


def show(rows: list[Row], seconds: float) -> None:
    failed = [row for row in rows if row.failures]
    for row in failed:
        where = " ".join(part for part in (row.arch, row.op, row.dtype, row.label, row.config) if part)
        print(f"FAILED {where}: {'; '.join(row.failures)}")
    heads = ("arch", "op", "dtype", "binaries", "registers", "shared", "CTAs/SM")
    print("\n{:8}{:24}{:10}{:>9}{:>11}{:>9}{:>9}  matrix".format(*heads))
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.kernel and row.arch != "source":
            groups.setdefault((row.arch, row.op, row.dtype), []).append(row)
    for (arch, op, dtype), group in groups.items():
        ctas = [row.ctas_per_sm for row in group if row.ctas_per_sm is not None]
        span = f"{min(ctas)}-{max(ctas)}" if ctas else "-"
        registers = f"{min(r.registers for r in group)}-{max(r.registers for r in group)}"
        mma = sorted({name.split(":")[0] for row in group for name in row.mma.split()})
        shared = max(r.shared for r in group)
        print(f"{arch:8}{op:24}{dtype:10}{len(group):>9}{registers:>11}{shared:>9}{span:>9}  {' '.join(mma)}")
    print(f"\n{len(rows) - len(failed)} binaries pass, {len(failed)} fail ({seconds:.0f} s)")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--op", nargs="+", choices=cases.OPS, default=list(cases.OPS))
    parser.add_argument("--all", action="store_true", help="each configuration with each real shape")
    parser.add_argument(
        "--sweep", nargs="*", choices=ARCHITECTURES, default=["sm_90"],
        help="where every configuration is audited (default: sm_90)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write every row there")
    parser.add_argument("--jobs", type=int, default=launches.workers(), help="processes (default: the cores)")
    args = parser.parse_args(argv)
    launches.refuse_interpreter("bench/audit.py")
    torch.set_num_threads(1)
    started = time.monotonic()
    tasks = plan(args.arch, args.op, everything=args.all, swept=args.sweep)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total} compiled", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif done % 50 == 0 or done == total:
            print(f"{done}/{total} compiled", file=sys.stderr, flush=True)

    found = launches.in_parallel(audit, tasks, progress, args.jobs)
    rows = distinct(source_rows() + [row for rows in found for row in rows])
    rows.sort(key=lambda row: not row.failures)
    show(rows, time.monotonic() - started)
    if args.json:
        content = {"versions": record.versions(), "commit": record.commit()}
        record.save_json(Path(args.json), content | {"rows": [dataclasses.asdict(row) for row in rows]})
    return 1 if any(row.failures for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
