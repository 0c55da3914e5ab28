"""bench/on_gpu.py without a GPU: every step runs, writes its file, and respects its budget."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import cases
import gpu_bench
import gpu_parity
import gpu_train
import gpu_tune
import inputs
import on_gpu
import pytest
import record
import summary
import timing
import torch
from launches import Job
from session import Session

import fastvr
from fastvr import tuning
from fastvr.testing import ParityReport
from fastvr.tuning import table

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the steps would take the GPU's time")


@pytest.fixture(autouse=True)
def _one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """One op with one configuration's worth of work; ``--op`` changes these for the process."""
    monkeypatch.setattr(cases, "OPS", ("layer_norm",))
    monkeypatch.setattr(cases, "MODELS", ())
    monkeypatch.setattr(cases, "MORE_MODELS", ())


def _session(out: Path, seconds: float = 60.0) -> Session:
    return Session(out, torch.device("cpu"), time.monotonic() + seconds, small=True)


def _load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_all_steps_write_their_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        on_gpu.main(["--out", str(tmp_path), "--device", "cpu", "--op", "layer_norm", "--budget", "600"]) == 0
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bench.json",
        "cpu.json",
        "parity.json",
        "tune.json",
    ]
    parity, tune, bench = (_load(tmp_path / f"{step}.json") for step in on_gpu.STEPS)
    for content in (parity, tune, bench):
        assert content["gpu"] == "cpu"
        assert content["complete"]
        assert content["commit"]
    assert parity["passed"] == parity["planned"] > 4
    assert {row["mode"] for row in tune["measured"]} == {"reference", "triton"}
    assert list(bench["ops"]) == ["layer_norm[ViT-Ti b2] bfloat16"]
    assert bench["ops"]["layer_norm[ViT-Ti b2] bfloat16"]["fastvr"]["parity"]
    table = capsys.readouterr().out
    assert "no GPU" in table
    assert "parity (complete)" in table


def test_a_training_step_of_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "OPS", ())
    monkeypatch.setattr(cases, "MODELS", ("vit_b_16", "resnet50"))
    monkeypatch.setattr(gpu_parity, "_model", lambda *args: {"fastvr": ParityReport("", 0, 0, 0, 0, 0)})
    monkeypatch.setattr(gpu_bench, "_models", lambda *args, **kwargs: True)
    # bfloat16 alone takes the same way; Dynamo takes seconds a model
    monkeypatch.setattr(gpu_train, "PRECISIONS", {"autocast": gpu_train.PRECISIONS["autocast"]})
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: model)
    assert gpu_parity.run(_session(tmp_path)) == 0
    checked = _load(tmp_path / "parity.json")["models"]
    trained = {name: found for name, found in checked.items() if "training" in name}
    assert len(trained) == 2
    for name, found in trained.items():
        assert 0 < found["fastvr"]["ratio"] <= 1
        assert found["fastvr"]["tensors"] > 20
        assert all(op.endswith(": triton") for op in found["ran"])
        assert ("attention_backward" if "vit" in name else "residual_block_backward") in str(found["ran"])
    assert gpu_bench.run(_session(tmp_path)) == 0
    rows = _load(tmp_path / "bench.json")["training"]
    assert list(rows) == ["vit_b_16 training b2", "resnet50 training b2"]
    for row in rows.values():
        assert row["fastvr"]["parity"]
        assert all(row[column]["images_per_s"] > 0 for column in ("eager", "fastvr", "compile"))
    text = summary.table(tmp_path, 1.0)
    assert "resnet50 training b2" in text
    assert "goal" not in text


def test_what_fails_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken on purpose")

    made = inputs.make
    monkeypatch.setattr(cases, "OPS", ("swiglu", "layer_norm"))
    monkeypatch.setattr(cases, "MODELS", ("vit_b_16", "resnet50"))
    monkeypatch.setattr(gpu_parity, "run", broken)
    monkeypatch.setattr(gpu_tune, "run", lambda session: 0)
    monkeypatch.setattr(
        inputs, "make", lambda case, *args: broken() if case.op == "swiglu" else made(case, *args)
    )
    monkeypatch.setattr(gpu_train, "_row", broken)
    monkeypatch.setattr(
        gpu_bench, "prepare", lambda model, x: broken() if isinstance(model, fastvr.ViT) else model
    )
    truth = gpu_bench.models.truth
    monkeypatch.setattr(
        gpu_bench.models, "truth", lambda pair, x: broken() if pair.name == "resnet50" else truth(pair, x)
    )
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: model)
    monkeypatch.setattr(on_gpu, "interpreted_again", lambda argv: None)
    assert on_gpu.main(["--out", str(tmp_path), "--device", "cpu", "--budget", "600"]) == 1
    bench = _load(tmp_path / "bench.json")
    vit, resnet = bench["models"]["vit_b_16 b2"], bench["models"]["resnet50 b2"]
    assert all("images_per_s" in vit[column] for column in ("eager", "fastvr", "compile"))
    assert "broken on purpose" in vit["prepared"]["error"]
    assert "broken on purpose" in resnet["fastvr"]["error"]
    assert all("broken on purpose" in row["fastvr"]["error"] for row in bench["training"].values())
    swiglu, norm = (bench["ops"][f"{op}[ViT-Ti b2] bfloat16"] for op in ("swiglu", "layer_norm"))
    assert "broken on purpose" in swiglu["fastvr"]["error"]
    assert norm["fastvr"]["p50"] > 0
    said = capsys.readouterr().out
    assert "parity FAILED as a whole: RuntimeError: broken on purpose" in said
    assert "bench (complete)" in said


def test_every_model_of_the_goals_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {
        name: (pair.ours.embed_dim, len(pair.ours.blocks), pair.ours.blocks[0].attn.num_heads)
        for name in ("vit_s_16", "vit_b_16", "vit_l_16")
        for pair in [gpu_bench.models.build(name, torch.bfloat16, "meta")]
    }
    assert shapes == {"vit_s_16": (384, 12, 6), "vit_b_16": (768, 12, 12), "vit_l_16": (1024, 24, 16)}
    monkeypatch.undo()
    wanted = {f"{name} b{batch}" for name in cases.MODELS for batch in gpu_bench.BATCHES}
    wanted |= {f"{name} b{batch}" for name in cases.MORE_MODELS for batch in gpu_bench.BATCHES_MORE}
    assert set(gpu_bench._GOALS) <= wanted
    monkeypatch.setattr(cases, "MORE_MODELS", ("vit_s_16",))
    content: dict[str, Any] = {"models": {}}
    peaks = record.Peaks(1.0, 1.0)
    session = _session(tmp_path)
    assert gpu_bench._models(session, content, lambda: None, peaks, compiling=False, more=True)
    (row,) = content["models"].values()
    assert row["prepared"]["images_per_s"] > 0
    assert "goals" not in row


def test_the_goals_of_inference(tmp_path: Path) -> None:
    def column(ms: float, batch: int) -> dict[str, Any]:
        return {"ms": ms, "latency_ms": {"p50": ms}, "images_per_s": batch / ms * 1e3}

    row: dict[str, Any] = {"eager": column(1.0, 1), "fastvr": column(0.9, 1), "prepared": column(0.2, 1)}
    row["goals"] = gpu_bench.verdicts("resnet50", 1, row)
    held = [(goal["column"], goal["against"], goal["holds"]) for goal in row["goals"]]
    assert held == [("prepared", "eager", False), ("prepared", "ms", False)]
    names = ("eager", "compile", "fastvr", "prepared")
    large = dict(zip(names, (column(ms, 256) for ms in (12.0, 8.5, 6.0, 5.0)), strict=True))
    held = [
        (goal["column"], goal["against"], goal["holds"])
        for goal in gpu_bench.verdicts("resnet50", 256, large)
    ]
    assert held == [
        ("fastvr", "eager", False),
        ("fastvr", "compile", False),
        ("fastvr", "images/s", False),
        ("prepared", "eager", True),
        ("prepared", "compile", True),
        ("prepared", "images/s", True),
    ]
    assert gpu_bench.verdicts("resnet50", 64, large) == []
    assert (
        gpu_bench.verdicts("resnet50", 256, {"eager": column(1.0, 256), "fastvr": {"error": "broken"}}) == []
    )
    header = record.environment(torch.device("cpu")) | {"gpu": "NVIDIA H200"}
    content = {"complete": True, "peaks": {}, "models": {"resnet50 b1": row}, "ops": {}, "training": {}}
    record.save_json(tmp_path / "bench.json", header | content)
    text = summary.table(tmp_path, 1.0)
    assert "MISSED: prepared 5 x eager, goal 8" in text
    assert "MISSED: prepared 0.2 ms, goal 0.18" in text


def test_a_wrong_gradient_fails_and_has_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = gpu_train.gradients

    def wrong(model: Any, *args: Any, mode: str, **kwargs: Any) -> Any:
        found = taken(model, *args, mode="reference", **kwargs)
        return found if mode == "reference" else {**found, "head.bias": found["head.bias"] * 1.1}

    monkeypatch.setattr(gpu_train, "gradients", wrong)
    monkeypatch.setattr(cases, "MODELS", ("vit_b_16",))
    content: dict[str, Any] = {"training": {}}
    assert gpu_train.bench(_session(tmp_path), content, lambda: None, compiling=False)
    (row,) = content["training"].values()
    assert row["fastvr"]["parity"].startswith("differs")
    assert "images_per_s" in row["eager"]
    assert "images_per_s" not in row["fastvr"]


def test_the_goals_of_training(tmp_path: Path) -> None:
    def column(speed: float) -> dict[str, Any]:
        return {"ms": 1.0, "latency_ms": {"p50": 1.0}, "images_per_s": speed, "step_gib": 20.0}

    row: dict[str, Any] = {"eager": column(4000), "fastvr": column(6200), "compile": column(5400)}
    row["goals"] = gpu_train.verdicts("resnet50", row)
    assert [(goal["against"], goal["holds"]) for goal in row["goals"]] == [
        ("eager", True),
        ("compile", False),
        ("images/s", True),
    ]
    assert row["goals"][0]["value"] == pytest.approx(1.55)
    broken = {"eager": column(4000), "fastvr": {"error": "broken"}}
    assert gpu_train.verdicts("resnet50", broken) == []
    header = record.environment(torch.device("cpu")) | {"gpu": "NVIDIA H200"}
    content = {"complete": True, "peaks": {}, "models": {}, "ops": {}, "training": {"resnet50 b256": row}}
    record.save_json(tmp_path / "bench.json", header | content)
    text = summary.table(tmp_path, 1.0)
    assert "MISSED: 1.1481 x compile, goal 1.2" in text
    assert "holds: 6200 images/s, goal 5000" in text
    assert "20.00 GiB a step" in text


def test_the_table_is_one_that_tuning_reads(tmp_path: Path) -> None:
    assert gpu_tune.run(_session(tmp_path)) == 0
    content = _load(tmp_path / "cpu.json")
    assert {"format", "gpu", "architecture", "versions", "commit", "entries", "checksum"} <= set(content)
    assert table.load(tmp_path / "cpu.json", "cpu") is not None
    key = tuning.key("layer_norm", torch.bfloat16, m=tuning.bucket(100), n=192)
    entry = content["entries"][key]
    assert set(entry) == {"impl", "config", "ms", "runner_up_ms", "reference_ms", "complete", "versions"}
    # the interpreter never beats PyTorch
    assert entry["impl"] == "reference"
    assert entry["ms"] == entry["reference_ms"] <= entry["runner_up_ms"]


def test_no_budget_saves_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = on_gpu.main(["--out", str(tmp_path), "--device", "cpu", "--op", "layer_norm", "--budget", "0"])
    assert status == 0
    for name in ("parity.json", "tune.json", "bench.json"):
        assert _load(tmp_path / name)["complete"] is False
    assert capsys.readouterr().out.count("the budget is used up") == 3


def test_a_wrong_kernel_fails_parity_and_cannot_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvr.ops._op import OPS

    op = OPS["layer_norm"]
    right = op.kernel
    monkeypatch.setattr(op, "kernel", lambda *args: right(*args) * 1.02)
    case = cases.SMALL["layer_norm"][0]
    monkeypatch.setattr(gpu_parity, "plan", lambda *args, **kwargs: [Job(case, "float32", "interpreter")])
    assert gpu_parity.run(_session(tmp_path)) == 1
    failure = _load(tmp_path / "parity.json")["failures"][0]
    assert failure["sizes"]["dim"] == 192
    tuner = gpu_tune.Tuner(_session(tmp_path), rep_ms=1)
    taken = timing.device_times

    def only_reference(*args: Any, **kwargs: Any) -> timing.Times:
        assert fastvr.current_backend() == "reference", "timed behind a red gate"
        return taken(*args, **kwargs)

    monkeypatch.setattr(timing, "device_times", only_reference)
    monkeypatch.setattr(gpu_tune.Tuner, "peaks", {"float32": record.Peaks(1.0, 1.0)})
    tuner.tune(case, "float32")
    assert tuner.failures
    assert not any("red gate" in failure["error"] for failure in tuner.failures)
    assert {entry.impl for entry in tuner.entries.values()} == {"reference"}


@pytest.mark.parametrize("few", [False, True])
def test_results_of_few_values_are_held_over_several_draws(
    few: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose kernel rounds once where eager happens to be exact passes then; whose is wrong does not."""
    from fastvr.ops._op import OPS

    op, calls, rounded = OPS["layer_norm"], [], 2.0**-22
    right, reference, factor = op.kernel, op.reference, 1 + rounded

    def kernel(*args: Any) -> torch.Tensor:
        calls.append("kernel")
        return right(*args).double().mul(factor).float()

    def exact(*args: Any) -> torch.Tensor:
        """Eager, without an error in its first draw, which is also counted."""
        y = reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
        if args[0].dtype == torch.float64:
            return y
        calls.append("eager")
        return (y * (1 + (0 if calls.count("eager") <= 2 else 2 * rounded))).float()

    case = cases.SMALL["layer_norm"][0]
    monkeypatch.setattr(gpu_parity, "FEW_VALUES", 10**9 if few else 0)
    monkeypatch.setattr(gpu_parity, "plan", lambda *args, **kwargs: [Job(case, "float32", "interpreter")])
    monkeypatch.setattr(gpu_parity, "_model_checks", lambda session: {})
    with monkeypatch.context() as patch:
        patch.setattr(op, "kernel", kernel)
        patch.setattr(op, "reference", exact)
        assert gpu_parity.run(_session(tmp_path)) == int(not few)
        assert calls.count("kernel") == (gpu_parity.DRAWS if few else 1)
        calls.clear()
        factor = 1.01
        assert gpu_parity.run(_session(tmp_path)) == 1


def test_a_candidate_that_breaks_does_not_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastvr.kernels.layer_norm as kernel

    candidates = kernel.candidate_configs
    broken = {"BLOCK_M": 3, "BLOCK_N": 256, "num_warps": 4, "num_stages": 1}  # no power of two
    monkeypatch.setattr(kernel, "candidate_configs", lambda n, arch: [broken, *candidates(n, arch)])
    monkeypatch.setattr(kernel, "default_config", lambda n, arch: candidates(n, arch)[0])
    session = _session(tmp_path)
    tuner = gpu_tune.Tuner(session, rep_ms=1)
    case = cases.Case.of("layer_norm", "breaks", batch=2, tokens=9, dim=192)
    tuner.tune(case, "float32")
    assert len(tuner.failures) == 1
    assert "'BLOCK_M': 3" in tuner.failures[0]["job"]
    (entry,) = tuner.entries.values()
    assert entry.config["BLOCK_M"] != 3


def test_entries_of_other_sources_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = _session(tmp_path)
    entry = tuning.Entry("triton", None, 1.0, None, None)
    tuner = gpu_tune.Tuner(session, rep_ms=1)
    tuner.entries["k"] = entry
    tuner.save(complete=True)
    assert gpu_tune.Tuner(session, rep_ms=1).entries == {"k": entry}
    monkeypatch.setattr(record, "source_digest", lambda: "other")
    assert gpu_tune.Tuner(session, rep_ms=1).entries == {}


def test_the_plan_begins_with_what_is_wanted_most() -> None:
    plan = gpu_tune.plan(("bfloat16", "float32"), small=False)
    first, last = plan[0], plan[-1]
    assert first[1] == "bfloat16"
    assert "ViT-B" in first[0].label
    assert first[0]["batch"] == 256
    assert last[1] == "float32"


def test_samples_are_seeded() -> None:
    plans = [
        gpu_parity.plan("interpreter", ("float32",), small=True, seed=seed, count=3) for seed in (0, 0, 1)
    ]
    assert plans[0] == plans[1] != plans[2]


def test_the_fresh_table_is_in_force_only_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTVR_TUNING_TABLE", raising=False)
    session = _session(tmp_path)
    monkeypatch.setenv("FASTVR_CACHE_DIR", str(tmp_path / "none"))
    card = tuning.Card("cpu", "interpreter", 1)
    tuner = gpu_tune.Tuner(session, rep_ms=1)
    tuner.entries["a|b|c"] = tuning.Entry("triton", None, 1.0, None, None)
    tuner.save(complete=True)
    with gpu_bench.fresh_table(session):
        assert tuning.measured(card) == tuner.entries
    assert tuning.measured(card) == {}


def test_every_knob_names_its_candidates() -> None:
    import launches

    for op, listed in cases.REAL.items():
        for dtype in (name for name in cases.DTYPES if op in cases.ops(name)):
            for arch in ("sm_90", "gfx942"):
                consulted = launches.consult(listed[0], dtype, arch)
                assert consulted.choices, op
                assert all(knob.candidates for knob in consulted.knobs), op
    names = [
        knob.name for knob in launches.consult(cases.REAL["layernorm_mlp"][0], "bfloat16", "sm_90").knobs
    ]
    assert names == ["layernorm_linear", "linear"]


def test_summary_of_nothing_and_of_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "parity.json").write_text("{")
    assert "files in" in summary.table(tmp_path, 1.0)


def test_an_unknown_op_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--op takes"):
        on_gpu.main(["--out", str(tmp_path), "--device", "cpu", "--op", "nonsense"])


def test_inputs_are_made_by_name() -> None:
    assert set(inputs.make(cases.SMALL["layer_norm"][0], torch.float32, "meta")) == {"x", "weight", "bias"}
    assert "fastvr" in sys.modules


def test_summary_says_where_to_work_next_and_what_is_slower(tmp_path: Path) -> None:
    def layer(p50: float, roofline: float) -> dict[str, Any]:
        return {"p50": p50, "roofline": roofline, "tflops": 300.0, "gbs": 900.0}

    ops = {
        "linear[fc1 b64] bfloat16": {"eager": layer(0.2, 0.5), "fastvr": layer(0.1, 0.9)},
        "attention[ViT-B b64] bfloat16": {"eager": layer(0.1, 0.6), "fastvr": layer(0.2, 0.3)},
        "layer_norm[ViT-B b64] bfloat16": {"eager": layer(0.1, 0.6), "fastvr": {"error": "broken"}},
    }
    header = record.environment(torch.device("cpu")) | {"gpu": "NVIDIA H200"}
    content = header | {"complete": True, "peaks": {}, "models": {}, "ops": ops}
    record.save_json(tmp_path / "bench.json", content)
    text = summary.table(tmp_path, 1.0)
    assert text.index("attention[ViT-B b64]") < text.index("linear[fc1 b64]")
    assert "SLOWER than eager: attention[ViT-B b64] bfloat16 (2.00x its time)" in text
    assert "layer_norm" not in text
