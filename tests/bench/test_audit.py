"""bench/audit.py on real compilations, in processes without the interpreter: what is right passes, and a
planted spill, misfit, TF32 and a specialised batch size are each found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]

# The audit's plan becomes four jobs on kernels made wrong.
PLANTED = """
import sys
sys.path[:0] = [{bench!r}]
import audit, cases, launches
import triton
import fastvr.kernels.linear as kernel
case = cases.Case.of("linear", "planted", batch=32, tokens=None, k=768, n=768)
def task(dtype, arch, count=False, **changed):
    config = {{"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 2}}
    forced = (("linear", launches.freeze(config | changed)),)
    return audit.Task(launches.Job(case, dtype, arch, forced), count)
kernel.dot_precision = lambda dtype: "tf32"
kernel._linear_fwd_kernel = triton.jit(kernel._linear_fwd_kernel.fn)  # M is specialised again
tasks = [
    task("bfloat16", "sm_80", BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, maxnreg=64),
    task("bfloat16", "sm_86", BLOCK_N=256, BLOCK_K=128, num_stages=3),
    task("float32", "sm_80", BLOCK_K=32),
    task("bfloat16", "sm_80", count=True),
]
audit.plan = lambda *args, **kwargs: tasks
raise SystemExit(audit.main(["--jobs", "1"]))
"""


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=kept | environment
    )


def test_two_ops_pass_on_one_architecture(tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    ops = ("layer_norm", "max_pool")
    done = _run("bench/audit.py", "--arch", "sm_90", "--op", *ops, "--json", str(file), "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["op"] for row in rows} == set(ops)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(row["registers"] > 0 and row["ctas_per_sm"] > 0 for row in rows)
    assert {row["binaries"] for row in rows} == {None, 1}
    assert "0 fail" in done.stdout


def test_planted_faults_are_found() -> None:
    done = _run("-c", PLANTED.format(bench=str(ROOT / "bench")))
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 4
    for line, words in zip(
        failed,
        ("spills", "does not fit", "TF32 in a float32 kernel", "binaries for ten batch sizes"),
        strict=True,
    ):
        assert words in line


def test_it_refuses_the_interpreter() -> None:
    done = _run("bench/audit.py", "--arch", "sm_90", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "without TRITON_INTERPRET" in done.stderr
