"""The tuner: what may win, what is dropped, and that nothing measured is lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastvr
from fastvr import backend, tuner, tuning
from fastvr.ops._op import OPS, Cost, Op, nbytes
from fastvr.ops.layer_norm import layer_norm
from fastvr.tuner import calls, command, gate
from fastvr.tuner.timing import Fn, Times
from fastvr.tuning import table

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="stand-in timers, on a CPU"),
    pytest.mark.skipif(backend.triton_missing() is not None, reason="needs Triton"),
]

CPU = torch.device("cpu")
CONFIGS = [{"BLOCK": size} for size in range(1, 6)]


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor
    residual: Tensor | None


class Fake:
    """An op of two results whose kernel is PyTorch, and does by its configuration what ``acts`` says."""

    def __init__(self) -> None:
        self.acts: dict[int, Callable[[Tensor], Tensor]] = {}
        self.ran: list[int] = []
        self.op = Op(
            "tuner_test",
            "Tensor x, Tensor weight, Tensor? residual",
            arguments=Arguments,
            kernel=self.kernel,
            reference=self.reference,
            fake=lambda a: self.reference(*a),
            unsupported=lambda a: "x is float64" if a.x.dtype == torch.float64 else None,
            measured=lambda a: tuning.choice(self.key(a.x), a.x.device, "reference"),
            cost=lambda a: Cost(2 * a.x.numel() * len(a.weight), nbytes(a)),
            returns="(Tensor, Tensor)",
            differentiable=False,
        )

    def reference(self, x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        y = x @ weight.T
        return (y if residual is None else y + residual), x.abs().amax(-1)

    def key(self, x: Tensor) -> str:
        return tuning.key("tuner_test", x.dtype, m=tuning.bucket(len(x)), k=x.shape[-1])

    def kernel(self, a: Arguments) -> tuple[Tensor, Tensor]:
        config = tuning.config(
            "tuner_test", self.key(a.x), a.x.device, default=lambda: CONFIGS[1], candidates=lambda: CONFIGS
        )
        y, largest = self.reference(*a)
        if a.x.device.type == "cpu":
            self.ran.append(config["BLOCK"])
            y = self.acts.get(config["BLOCK"], lambda y: y)(y)
        return y, largest

    def model(self, x: Tensor) -> Any:
        return self.op(x, torch.empty(6, x.shape[-1], device=x.device), None)


@pytest.fixture(scope="module")
def _fake() -> Iterator[Fake]:
    made = Fake()
    yield made
    del OPS["tuner_test"]


@pytest.fixture
def fake(_fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setattr(_fake, "acts", {})
    monkeypatch.setattr(_fake, "ran", [])
    return _fake


def timer(**ms: float) -> tuner.Timer:
    """Times by configuration: ``b3=0.5`` is BLOCK 3's, ``reference`` PyTorch's, ``others`` the rest's."""

    def take(fn: Fn, device: torch.device) -> Times:
        fn()
        forced = tuning._forced.get("tuner_test")
        name = "reference" if forced is None else f"b{forced['BLOCK']}"
        taken = ms.get(name, ms.get("others", 9.0))
        return Times(taken, taken, taken, 1, "host")

    return take


def run(fake: Fake, path: Path, *, x: Tensor | None = None, **options: Any) -> tuner.Report:
    given: dict[str, Any] = {"budget_seconds": 60.0, "timer": timer(reference=5.0, b4=1.0), "path": path}
    return tuner.tune(fake.model, torch.zeros(3, 4, 8) if x is None else x, **(given | options))


def entry_of(path: Path) -> tuning.Entry:
    (entry,) = table.read(path, "cpu").entries.values()
    return entry


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cpu.json"


# ------------------------------------------------------------------------------------- what may win


def test_the_fastest_wins_and_is_written(fake: Fake, path: Path) -> None:
    report = run(fake, path, timer=timer(reference=5.0, b2=3.0, b4=1.0, b5=2.0))
    entry = tuning.Entry("triton", {"BLOCK": 4}, 1.0, 2.0, 5.0, True, tuner.versions())
    assert entry_of(path) == entry
    (won,) = report.won
    assert (won.entry, won.default_ms, won.key) == (entry, 3.0, "tuner_test|float32|m4.k8")
    assert (report.planned, report.known, report.dropped, report.stopped) == (1, 0, [], "")
    found = table.read(path)
    assert (found.gpu, found.architecture) == ("cpu", "interpreter")
    assert found.header["versions"]["torch"] == torch.__version__.split("+")[0] or found.header["versions"]


def test_pytorch_wins_and_the_kernels_best_is_kept(fake: Fake, path: Path) -> None:
    run(fake, path, timer=timer(reference=0.5, b3=2.0))
    assert entry_of(path) == tuning.Entry("reference", {"BLOCK": 3}, 0.5, 2.0, 0.5, True, tuner.versions())


def test_wrong_unwritten_and_broken_candidates_are_dropped_with_their_reason(fake: Fake, path: Path) -> None:
    def raises(y: Tensor) -> Tensor:
        raise RuntimeError("out of resource: shared memory, 300000 bytes")

    def unwritten(y: Tensor) -> Tensor:
        y[20] = float("nan")  # between the samples that are held to the truth
        return y

    fake.acts = {1: lambda y: y * 1.01, 3: raises, 4: unwritten}
    report = run(
        fake, path, x=torch.zeros(40, 4, 8), timer=timer(reference=5.0, b1=0.1, b3=0.1, b4=0.1, b5=1.0)
    )
    assert entry_of(path).config == {"BLOCK": 5}
    reasons = {one.config["tuner_test"]["BLOCK"]: one.reason for one in report.dropped}
    assert set(reasons) == {1, 3, 4}
    assert "breaks parity" in reasons[1]
    assert "out of resource" in reasons[3]
    assert "NaN where PyTorch has none" in reasons[4]


def test_a_kernel_that_never_works_leaves_pytorch(fake: Fake, path: Path) -> None:
    fake.acts = {config["BLOCK"]: lambda y: y + 1 for config in CONFIGS}
    report = run(fake, path)
    assert len(report.dropped) == len(CONFIGS)
    assert entry_of(path) == tuning.Entry("reference", None, 5.0, None, 5.0, True, tuner.versions())


def test_a_candidate_that_does_not_compile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastvr.kernels.layer_norm as kernel

    real, broken = kernel.candidate_configs, {"BLOCK_M": 3, "BLOCK_N": 8, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(kernel, "candidate_configs", lambda n, arch: [*real(n, arch), broken])
    monkeypatch.setattr(kernel, "default_config", lambda n, arch: real(n, arch)[0])
    weight = torch.ones(8)
    report = tuner.tune(
        lambda x: layer_norm(x, weight.to(x.device), None),
        torch.zeros(3, 8),
        budget_seconds=60,
        path=path,
    )
    (dropped,) = report.dropped
    assert dropped.config == {"layer_norm": broken}
    assert "power of 2" in dropped.reason
    assert entry_of(path).config in real(8, "interpreter")


def test_an_op_without_a_kernel_for_its_arguments_is_named(fake: Fake, path: Path) -> None:
    report = run(fake, path, x=torch.zeros(3, 4, 8, dtype=torch.float64))
    assert "x is float64" in report.unsupported["tuner_test"]
    assert report.planned == 0


# -------------------------------------------------------------------------- budget, Ctrl-C, resuming


def test_no_budget_measures_nothing(fake: Fake, path: Path) -> None:
    report = run(fake, path, budget_seconds=0.0)
    assert (report.stopped, report.won, report.planned) == ("budget", [], 1)
    assert fake.ran == []
    assert table.read(path).entries == {}


def test_a_budget_that_ends_within_a_call_keeps_the_best_so_far(
    fake: Fake, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(tuner, "time", SimpleNamespace(monotonic=lambda: clock.now))
    measure = timer(reference=5.0, b2=3.0, b1=2.0, b3=1.0)

    def slow(fn: Fn, device: torch.device) -> Times:
        clock.now += 10.0
        return measure(fn, device)

    examples = [torch.zeros(batch, 4, 8) for batch in (64, 2)]
    report = run(fake, path, x=examples, timer=slow, budget_seconds=25.0)
    # the reference, the default and one more
    assert set(fake.ran) == {2, 1}
    assert report.stopped == "budget"
    assert (report.planned, len(report.won)) == (2, 1)
    (entry,) = table.read(path).entries.values()
    assert (entry.config, entry.complete) == ({"BLOCK": 1}, False)
    # the same command goes on: what is incomplete is measured anew
    monkeypatch.undo()
    again = run(fake, path, x=examples, timer=measure)
    assert (again.known, len(again.won), again.stopped) == (0, 2, "")
    assert {e.config["BLOCK"] for e in table.read(path).entries.values() if e.config} == {3}
    assert run(fake, path, x=examples, timer=measure).known == 2


def test_what_was_measured_survives_an_interruption(fake: Fake, path: Path) -> None:
    measure, examples = timer(reference=5.0, b4=1.0), [torch.zeros(batch, 4, 8) for batch in (64, 2)]

    def interrupted(fn: Fn, device: torch.device) -> Times:
        if 5 in fake.ran and not tuning._forced:  # the second call's reference
            raise KeyboardInterrupt
        return measure(fn, device)

    report = run(fake, path, x=examples, timer=interrupted)
    assert (report.stopped, report.planned, len(report.won)) == ("interrupted", 2, 1)
    assert set(table.read(path).entries) == {"tuner_test|float32|m64.k8"}
    report = run(fake, path, x=examples)
    assert (report.planned, report.known, report.stopped) == (2, 1, "")


def test_a_gpu_that_fails_ends_the_run(fake: Fake, path: Path) -> None:
    def lost(y: Tensor) -> Tensor:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    fake.acts = {3: lost}
    report = run(fake, path)
    assert report.failed
    assert "illegal memory access" in report.stopped


def test_other_versions_are_measured_again(fake: Fake, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(fake, path)
    assert run(fake, path).known == 1
    assert len(run(fake, path, again=True).won) == 1
    monkeypatch.setattr(tuner, "versions", lambda: "fastvr 9")
    assert run(fake, path).known == 0
    assert entry_of(path).versions == "fastvr 9"


def test_quick_takes_three_and_tune_completes_them(fake: Fake, path: Path) -> None:
    x, measure = torch.zeros(3, 4, 8), timer(reference=5.0, b3=2.0, b5=1.0)
    report = tuner.quick(fake.model, x, timer=measure, path=path)
    assert set(fake.ran) == {2, 1, 3}
    assert (report.won[0].entry.config, report.won[0].entry.complete) == ({"BLOCK": 3}, False)
    assert tuner.quick(fake.model, x, timer=measure, path=path).known == 1
    assert run(fake, path, timer=measure).known == 0
    assert (entry_of(path).config, entry_of(path).complete) == ({"BLOCK": 5}, True)


def test_a_near_shapes_winner_is_tried_early(fake: Fake, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = tuning.Entry("triton", {"BLOCK": 5}, 1.0, None, None)
    monkeypatch.setattr(tuning, "lookup", lambda key, device: near if device.type == "cpu" else None)
    tuner.quick(fake.model, torch.zeros(3, 4, 8), timer=timer(), path=path)
    assert list(dict.fromkeys(fake.ran)) == [2, 5, 1]


def test_a_table_that_cannot_be_written(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "cpu.json"
    with pytest.raises(tuning.TableError, match="cannot be written"):
        run(fake, path)
    assert fake.ran == []
    report = tuner.quick(fake.model, torch.zeros(3, 4, 8), timer=timer(reference=5.0, b3=1.0), path=path)
    assert "cannot be written" in report.unsaved
    assert report.won[0].entry.config == {"BLOCK": 3}


def test_a_disk_that_fills_up_and_is_freed_loses_nothing(
    fake: Fake, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failing = table.merge, []

    def merge(*args: Any) -> Any:
        if failing:
            failing.clear()
            raise tuning.TableError("full")
        return real(*args)

    monkeypatch.setattr(table, "merge", merge)
    measure = timer(reference=5.0, b4=1.0)

    def filling(fn: Fn, device: torch.device) -> Times:
        if not fake.ran:
            failing.append(1)
        return measure(fn, device)

    report = run(fake, path, x=[torch.zeros(batch, 4, 8) for batch in (64, 2)], timer=filling)
    assert report.unsaved == ""
    assert len(table.read(path).entries) == 2


# ------------------------------------------------------------------------------------------ around it


@pytest.mark.parametrize(
    ("shape", "checked"), [((3, 4, 8), None), ((40, 4, 8), 8), ((40, 8), None), ((300, 8), 128)]
)
def test_how_many_samples_are_held_to_the_truth(
    fake: Fake, shape: tuple[int, ...], checked: int | None
) -> None:
    call = calls.make_call(
        "tuner_test",
        (torch.empty(shape, device="meta"), torch.empty(6, 8, device="meta"), None),
        "interpreter",
    )
    assert call is not None
    held = gate.Gate(call, calls.materialise(call, CPU))
    assert (None if held._ends is None else len(held._ends)) == checked
    with backend.use_backend("triton"):
        held.check()
        fake.acts = {2: lambda y: y.index_fill(0, torch.tensor([len(y) - 1]), 3.0)}
        with pytest.raises(AssertionError, match="breaks parity"):
            held.check()


def test_the_command_tunes_a_training_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVR_CACHE_DIR", str(tmp_path))
    given = {"batches": [2], "dtype": torch.float32, "budget": 1e-3, "dry_run": True}
    plain = command.run("vit_base", **given)
    trained = command.run("vit_base", **given, train=True)
    assert plain.stopped == trained.stopped == "budget"
    # nobody had the time to measure, but a step asks for more
    assert trained.planned > plain.planned > 0


def test_where_nothing_can_be_tuned(fake: Fake, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    with pytest.raises(ValueError, match="path must name a table"):
        tuner.tune(fake.model, torch.zeros(3, 4, 8), budget_seconds=1)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(backend.BackendError, match="nothing can be tuned here: the tensors are on cpu"):
        run(fake, path)


def test_importing_fastvr_leaves_the_tuner_alone_and_neither_needs_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import fastvr; "
        "assert not [name for name in sys.modules if name.startswith('fastvr.tuner')]; "
        "import fastvr.tuner"
    )
    root = str(Path(fastvr.__file__).resolve().parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
