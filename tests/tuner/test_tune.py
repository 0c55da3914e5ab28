"""The tuner: what it finds in a model, what may win, what is dropped, and that nothing measured is lost."""

from __future__ import annotations

import functools
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
from fastvr.models.resnet import ResNet
from fastvr.models.vit import ViT
from fastvr.nn.residual import Bottleneck
from fastvr.ops._op import OPS, Cost, Op, nbytes
from fastvr.ops.layer_norm import layer_norm
from fastvr.ops.layernorm_mlp import layernorm_mlp
from fastvr.ops.linear import linear
from fastvr.ops.linear_stats import linear_stats
from fastvr.ops.norm_linear import norm_linear
from fastvr.reference.linear_stats import row_stats
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


# ------------------------------------------------------------------------------------ what is tuned


def test_a_models_calls_most_expensive_first_each_key_once() -> None:
    model = fastvr.ViT(img_size=32, patch_size=8, num_classes=10, embed_dim=96, depth=3, num_heads=3).eval()
    found, unsupported = calls.collect(model, [torch.zeros(2, 3, 32, 32)], "sm_90")
    assert not unsupported
    assert next(model.parameters()).device == CPU
    assert [call.weight for call in found] == sorted((call.weight for call in found), reverse=True)
    assert len({(call.op, call.key) for call in found}) == len(found)
    assert {call.op for call in found} >= {"patch_embed", "attention", "linear"}
    assert {call.count for call in found if call.op == "attention"} == {2}  # the last block has its own
    assert all(tensor.device.type == "meta" for call in found for tensor in call.args if tensor is Tensor)
    with pytest.raises(ValueError, match="at least one"):
        tuner.tune(model, [], budget_seconds=1)


def parts_of_mlp(*args: Any) -> Tensor:
    x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, residual, eps, act, *_ = args
    hidden = linear(layer_norm(x, ln_weight, ln_bias, eps), fc1_weight, fc1_bias, act=act)
    return linear(hidden, fc2_weight, fc2_bias, gamma=gamma, residual=residual)


def test_a_fused_op_comes_after_its_parts_and_is_measured_beside_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OPS["layernorm_mlp"], "parts", parts_of_mlp)

    def model(x: Tensor) -> Tensor:
        new = x.new_empty
        return layernorm_mlp(x, new(8), new(8), new(32, 8), new(32), new(8, 32), new(8), residual=x)

    found, _ = calls.collect(model, [torch.zeros(2, 5, 8)], "interpreter")
    assert [call.op for call in found] == ["layer_norm", "linear", "linear", "layernorm_mlp"]
    with backend.observe() as ran:
        report = tuner.tune(model, torch.zeros(2, 5, 8), budget_seconds=60, path=path)
    assert [won.call.split()[0] for won in report.won] == [call.op for call in found]
    # its own reference gives the truth and the eager result, never the time
    assert ran["layernorm_mlp", "reference"] == 0
    assert ran["layernorm_mlp", "triton"] > 0
    assert not report.dropped


# --------------------------------------------------------------------------------- tensors and gate


def test_real_tensors_are_as_the_models() -> None:
    base = torch.empty(4, 9, 8, device="meta")
    x = base[:, 1:, :]
    weight = torch.empty(6, 8, device="meta", dtype=torch.bfloat16)
    residual = torch.empty(8, 1, device="meta").expand(4, 8, 6)
    args = (x, weight, None, None, residual, "none", None, 0.0, None)
    call = calls.Call("linear", args, "k", (), Cost(0, 0))
    made = calls.materialise(call, CPU)
    for tensor, like in zip(made, call.args, strict=True):
        if isinstance(like, Tensor):
            assert (tensor.shape, tensor.stride(), tensor.dtype) == (like.shape, like.stride(), like.dtype)
            assert tensor.storage_offset() % 64 == like.storage_offset() % 64
            assert tensor.std() > 0
    assert made[2:4] == (None, None)
    assert made[5] == "none"
    assert abs(float(made[1].float().std()) - 8**-0.5) < 0.15
    again = calls.materialise(call, CPU)
    assert torch.equal(made[0], again[0])


def test_variances_are_positive_and_images_are_bytes() -> None:
    names = [argument.name for argument in OPS["conv_bn_relu"].overload._schema.arguments]
    values = {"running_var": torch.empty(64, device="meta"), "x": torch.empty(2, 3, 8, 8, device="meta")}
    values["x"] = values["x"].to(torch.uint8)
    call = calls.Call("conv_bn_relu", tuple(values.get(name) for name in names), "k", (), Cost(0, 0))
    made = dict(zip(names, calls.materialise(call, CPU), strict=True))
    assert made["running_var"].min() >= 0.5
    assert made["x"].dtype == torch.uint8
    assert made["x"].unique().numel() > 100


def test_the_same_tensor_twice_stays_one() -> None:
    x = torch.empty(2, 8, 8, device="meta")
    call = calls.Call("tuner_test_twice", (x, x), "k", (), Cost(0, 0))
    schema = SimpleNamespace(arguments=[SimpleNamespace(name="x"), SimpleNamespace(name="residual")])
    OPS["tuner_test_twice"] = SimpleNamespace(overload=SimpleNamespace(_schema=schema))  # type: ignore[assignment]
    try:
        one, two = calls.materialise(call, CPU)
    finally:
        del OPS["tuner_test_twice"]
    assert one is two


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


def test_row_statistics_are_held_to_the_truth_with_their_samples() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, wide = meta(12, 5, 96), {"dtype": torch.float32}
    folded = (x, meta(60, 2, 2, **wide), meta(48, 96), meta(48, **wide), None, 1e-6, "gelu")
    for op, args in (
        (linear_stats, (x, meta(96, 96), None, None, x, "none")),
        (norm_linear, folded),
    ):
        call = calls.make_call(op.__name__, args, "interpreter")
        assert call is not None
        made = calls.materialise(call, CPU)
        held = gate.Gate(call, made)
        assert held._ends is not None
        truth = held._truth if isinstance(held._truth, tuple) else (held._truth,)
        assert [len(t) for t in truth] == ([8, 40] if op is linear_stats else [8])
        if op is norm_linear:
            assert torch.equal(made[1], row_stats(made[0]))
            assert torch.equal(made[3], made[2].float().sum(1))
        with backend.use_backend("triton"):
            held.check()


def test_a_gradients_inputs_belong_together() -> None:
    def meta(*shape: int, **options: torch.dtype) -> Tensor:
        return torch.empty(shape, device="meta", **options)

    half = {"dtype": torch.float16}
    y, kv, lse = meta(2, 50, 64, **half), meta(2, 9, 128, **half), meta(2, 2, 50)
    for op, args in (
        ("attention_backward", (y, meta(2, 50, 192, **half), y.clone(), lse, 2, 0.2)),
        ("attention_kv_backward", (y, y.clone(), kv, y.clone(), lse, 2, 0.2, True, True)),
    ):
        call = calls.make_call(op, args, "interpreter")
        assert call is not None
        held = gate.Gate(call, calls.materialise(call, CPU))
        with backend.use_backend("triton"):
            held.check()


def training_calls(family: str) -> list[calls.Call]:
    """Those of a step of a small model."""
    model: ViT | ResNet
    if family == "vit":
        model = ViT(img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=7)
    else:
        model = ResNet(Bottleneck, (1, 1, 1, 1), num_classes=7, width=8)
    x = torch.zeros(6, 3, *((16, 16) if family == "vit" else (32, 32)))
    step = functools.partial(command.step, model.to("meta").train())
    found, unsupported = calls.collect(step, [x], "interpreter")
    assert not unsupported
    assert all(p.grad is None for p in model.parameters())
    return found


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_every_call_of_a_training_step_passes_its_own_gate(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tuner makes up belongs together, and what it holds to the truth can be held to it."""
    monkeypatch.setattr(gate, "_CHECKED", 2)
    monkeypatch.setattr(gate, "_CHECKED_ROWS", 2)
    found = training_calls(family)
    ends = set()
    for call in found:
        held = gate.Gate(call, calls.materialise(call, CPU))
        if held._ends is not None:
            ends.add(call.op)
        with backend.use_backend("triton"):
            held.check()
    wanted = {
        "vit": {"attention_backward", "linear_act_backward", "layernorm_mlp_training"},
        "resnet": {"avg_pool_linear_backward"},
    }
    assert wanted[family] <= ends
    whole = {"residual_block", "residual_block_backward", "batch_norm_act_max_pool_backward"}
    assert not ends & whole
    assert family == "vit" or whole <= {call.op for call in found}


def test_the_command_tunes_a_training_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVR_CACHE_DIR", str(tmp_path))
    given = {"batches": [2], "dtype": torch.float32, "budget": 1e-3, "dry_run": True}
    plain = command.run("vit_base", **given)
    trained = command.run("vit_base", **given, train=True)
    assert plain.stopped == trained.stopped == "budget"
    # nobody had the time to measure, but a step asks for more
    assert trained.planned > plain.planned > 0


def test_gelus_tail_is_granted_to_a_linears_output_alone() -> None:
    assert gate.absolute_floor("linear", "gelu") > 0
    assert gate.absolute_floor("linear", "relu") == gate.absolute_floor("layernorm_mlp", "gelu") == 0


# ------------------------------------------------------------------------------------------ around it


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
