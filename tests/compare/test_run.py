"""The whole comparison with tiny models, and what becomes of it when a phase goes wrong."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import fastvr
from fastvr.compare import UsageError, interpreted, measure, models, parity, run, table
from fastvr.compare.settings import Settings, write_json
from fastvr.models.preprocessing import Preprocessing

Families = tuple[models.Family, models.Family]
pytest.importorskip("sklearn")


def comparison(families: Families, **settings: Any) -> run.Comparison:
    defaults: dict[str, Any] = {"batches": (2,), "device": "cpu", "train_seconds": 0.0, "quick": True}
    return run.Comparison(Settings(**(defaults | settings)), families=families)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SECONDS", {"cpu": (0.05, 0.05), "cuda": (0.05, 0.05)})
    monkeypatch.setattr(interpreted, "run", lambda crops, tick: {"missing": "left out of this test"})


def shown(result: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    table.show(result, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_everything_is_measured_and_shown(tiny_families: Families, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    job = comparison(tiny_families, json=path, train_seconds=0.2)
    job.run()
    assert job.passed
    result = json.loads(path.read_text())
    assert result == json.loads(json.dumps(job.result))
    assert result["complete"]
    assert result["settings"]["batches"] == [1, 2]
    for model in result["models"].values():
        assert model["parity"]["passed"]
        assert model["parity"]["images"] == 4
        assert model["flops"] > 0
        assert model["traffic"]["fastvr"]["launches"] < model["traffic"]["eager"]["launches"]
        for column in ("eager", "fastvr"):
            batches = model["speed"][column]["batches"]
            assert batches["1"]["p20"] <= batches["1"]["p50"] <= batches["1"]["p80"]
            assert batches["2"]["images_per_s"] == pytest.approx(2e3 / batches["2"]["p50"])
        assert set(model["speed"]["fastvr"]["backend"]) == {"pytorch"}
        assert model["speed"]["fastvr"]["peak_memory"] is None
    assert {"vit", "resnet"} == set(result["digits"]["models"])
    text = shown(result)
    for words in (
        "tiny ViT",
        "latency",
        "images/s, batch 2",
        "parity",
        "No GPU",
        "handwritten",
        "Which suits",
    ):
        assert words in text
    assert "partial" not in text
    assert max(map(len, shown(result, 80).splitlines())) <= 80


@pytest.mark.parametrize("phase", ["_build", "_count", "_check", "_time", "_interpret", "_learn"])
def test_an_interruption_keeps_what_is_there(
    tiny_families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    def interrupted(self: run.Comparison, step: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Comparison, phase, interrupted)
    path = tmp_path / "out.json"
    job = comparison(tiny_families, json=path, train_seconds=0.1)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    result = json.loads(path.read_text())
    assert not result["complete"]
    text = shown(result)
    assert "this table is partial" in text
    assert ("parameters" in text) == (phase != "_build")
    assert ("parity [3]" in text) == (phase not in ("_build", "_count", "_check"))


def test_an_interruption_while_timing_keeps_the_first_model(
    tiny_families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    timed = measure.interleaved

    def interleaved(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2:  # both batch sizes of the first model are done
            raise KeyboardInterrupt
        return timed(*args, **kwargs)

    monkeypatch.setattr(measure, "interleaved", interleaved)
    job = comparison(tiny_families)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    first, second = job.result["models"].values()
    assert set(first["speed"]["fastvr"]["batches"]) == {"1", "2"}
    assert not second["speed"]["fastvr"]["batches"]
    assert "partial" in shown(job.result)


def test_wrong_numbers_fail_and_the_rest_goes_on(
    tiny_families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = parity.verdict

    def wrong(model: Any, eager: nn.Module, x: torch.Tensor, *, mode: str) -> dict[str, Any]:
        broken = model if isinstance(model, fastvr.ViT) else lambda x: model(x) * 1.01
        return verdict(broken, eager, x, mode=mode)

    monkeypatch.setattr(parity, "verdict", wrong)
    job = comparison(tiny_families)
    job.run()
    assert job.result["complete"]
    assert not job.passed
    vit, resnet = job.result["models"].values()
    assert vit["parity"]["passed"]
    assert not resnet["parity"]["passed"]
    text = shown(job.result)
    assert "tiny ResNet: parity FAILED" in text
    assert "breaks parity" in text
    json.dumps(job.result, allow_nan=False)


def test_a_model_that_raises_has_failed() -> None:
    def crash(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    result = parity.verdict(crash, nn.Flatten(), torch.randn(2, 3), mode="auto")
    assert not result["passed"]
    assert "no such kernel" in result["failure"]


def test_a_failing_compiler_costs_one_column(
    tiny_families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: broken)
    job = comparison(tiny_families, compile=True)
    job.run()
    assert job.result["complete"]
    assert any("no C++ compiler" in note for note in job.result["notes"])
    assert "n/a" in shown(job.result)


def test_checkpoints_give_their_weights_and_classes(tiny_families: Families, tmp_path: Path) -> None:
    tuned = tiny_families[0].build(7)
    path = tmp_path / "tuned.pt"
    torch.save(tuned.state_dict(), path)
    model = models.build(tiny_families[0], path, torch.zeros(1), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tuned.parameters(), strict=True))
    assert model.num_classes == 7
    with pytest.raises(UsageError, match=r"tiny ResNet.*tuned\.pt"):
        models.build(tiny_families[1], path, torch.zeros(1), seed=0)
    with pytest.raises(UsageError, match=r"missing\.pt"):
        models.build(tiny_families[0], tmp_path / "missing.pt", torch.zeros(1), seed=0)


def test_a_checkpoint_says_how_its_images_are_prepared(tiny_families: Families, tmp_path: Path) -> None:
    how = Preprocessing(32, 36, (0.1, 0.2, 0.3), (0.3, 0.2, 0.1), "lanczos")
    vit = tiny_families[0].build(7)
    vit.preprocessing = how
    path = fastvr.save_model(vit, tmp_path / "vit.safetensors")
    job = comparison(tiny_families, weights=(path,))
    job.run()
    assert job.passed
    assert job._how(tiny_families[0]) == how
    assert job._how(tiny_families[1]) == tiny_families[1].preprocessing
    # of another size than the model's they are none
    vit.preprocessing = how.at(64)
    fastvr.save_model(vit, path)
    assert models.build(tiny_families[0], path, torch.zeros(1), seed=0).preprocessing is None


def test_random_weights_get_statistics_of_the_photographs(tiny_families: Families) -> None:
    model = models.build(tiny_families[1], None, torch.randn(8, 3, 32, 32), seed=0)
    assert not model.training
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.running_var is not None and not torch.all(norm.running_var == 1) for norm in norms)
    assert all(norm.momentum == 0.1 for norm in norms)


@pytest.mark.parametrize("family", models.FAMILIES, ids=lambda family: family.key)
def test_the_real_families_equal_their_peers(family: models.Family) -> None:
    with torch.device("meta"):
        peer, ours = family.peer(10), family.build(10)
    if peer is None:
        pytest.skip(f"{family.peer_name} is not installed")
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert {name: tensor.shape for name, tensor in peer.state_dict().items()} == shapes


def test_timing_goes_in_turn() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    timings = measure.interleaved(calls, torch.device("cpu"), seconds=60.0, most=4)
    assert order[:2] == ["a", "b"]  # warm-up
    assert sorted(order) == ["a"] * 5 + ["b"] * 5
    assert [set(order[i : i + 2]) for i in range(2, 10, 2)] == [{"a", "b"}] * 4
    assert [timing.rounds for timing in timings.values() if isinstance(timing, measure.Timing)] == [4, 4]


def test_what_does_not_fit_is_said_and_the_other_column_timed() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("no")

    timings = measure.interleaved(
        {"a": too_large, "b": lambda: None}, torch.device("cpu"), seconds=0.0, least=1
    )
    assert timings["a"] == "out of memory"
    assert isinstance(timings["b"], measure.Timing)


def test_percentiles() -> None:
    timing = measure.Timing.of([0.005, 0.001, 0.002, 0.004, 0.003, 0.006])
    assert (timing.p20, timing.p50, timing.p80) == (pytest.approx(2), pytest.approx(3.5), pytest.approx(5))


def test_json_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_random_crops_for_the_interpreter_have_its_size(
    tiny_families: Families, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def capture(crops: torch.Tensor, tick: Any) -> dict[str, Any]:
        seen.append(crops)
        return {"error": "it broke"}

    monkeypatch.setattr(interpreted, "run", capture)
    job = comparison(tiny_families)
    job.run()
    assert seen[0].shape == (2, 3, interpreted.SIZE, interpreted.SIZE)
    assert np.isfinite(seen[0].numpy()).all()
    assert not job.passed
    assert "it broke" in shown(job.result)


def test_a_slow_machine_makes_fewer_rounds_than_asked() -> None:
    timings = measure.interleaved(
        {"a": lambda: time.sleep(0.02)}, torch.device("cpu"), seconds=0.005, least=10
    )
    assert isinstance(timings["a"], measure.Timing)
    assert timings["a"].rounds == 1
