"""The benchmark beside ONNX Runtime and OpenVINO, on tiny models, with whatever is installed."""

from __future__ import annotations

import json
from pathlib import Path

import bench_cpu_peers as bench
import pytest
import torch

from fastvr.ops.cpu import mkldnn

TINY = ["--small", "--batch", "2", "--threads", "1", "--rounds", "2", "--seconds", "0"]


def test_every_column_is_measured_and_checked(tmp_path: Path, capsys) -> None:
    threads = torch.get_num_threads()
    path = tmp_path / "peers.json"
    status = bench.main([*TINY, "--json", str(path)])
    assert torch.get_num_threads() == threads
    found = json.loads(path.read_text())
    assert found["environment"]["torch"] == torch.__version__
    dtypes = ["float32", *(["bfloat16"] if mkldnn.supports(torch.bfloat16) else [])]
    pairs = [(result["model"], result["dtype"]) for result in found["models"]]
    assert pairs == [(model, dtype) for model in ("vit_b_16", "resnet50") for dtype in dtypes]
    goals = [goal for result in found["models"] for goal in result["goals"]]
    assert status == (0 if all(goal["holds"] for goal in goals) else 1)
    shown = capsys.readouterr().out
    for result in found["models"]:
        assert {bench.PLAIN, bench.PREPARED} < set(result["columns"])
        assert result["rounds"] >= 2
        for name, row in result["columns"].items():
            assert name in shown
            assert 0 < row["fastest_ms_per_image"] <= row["ms_per_image"]
            # the same function; a peer's error is its own affair
            assert row["error"] < (2 if name in (bench.PLAIN, bench.PREPARED) else 100)
        for reason in result["left_out"]:
            assert f"left out: {reason}" in shown
        named = {column.split()[0] for column in result["columns"]}
        assert ("ONNX" in named) != any(reason.startswith(bench.ONNX) for reason in result["left_out"])


def test_what_is_not_installed_is_named(monkeypatch, capsys) -> None:
    missing = {"onnxruntime", "openvino"}
    find = bench.importlib.util.find_spec
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    bench.main([*TINY, "--models", "vit_b_16"])
    shown = capsys.readouterr().out
    assert "left out: ONNX Runtime: onnxruntime" in shown
    assert "left out: OpenVINO: openvino" in shown


def test_onnx_runtime_is_asked_for_float32_alone(monkeypatch) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: object())
    assert bench.left_out(bench.ONNX, torch.float32) is None
    assert bench.left_out(bench.ONNX, torch.bfloat16) == "ONNX Runtime: it has no bfloat16 on a CPU"
    assert bench.left_out(bench.OPENVINO, torch.bfloat16) is None


def _column(name: str, peer: str | None = None) -> bench.Column:
    return bench.Column(name, lambda: torch.zeros(1), peer)


def test_goals_are_medians_of_ratios_to_the_fastest_of_a_peer() -> None:
    found = [
        _column("a", bench.EAGER),
        _column("b", bench.EAGER),
        _column("o", bench.OPENVINO),
        _column(bench.PLAIN),
        _column(bench.PREPARED),
    ]
    times = {"a": 3.0, "b": 2.0, "o": 1.0, bench.PLAIN: 2.2, bench.PREPARED: 1.1}
    # a busy moment that met all alike
    taken = [times, {name: 9 * t for name, t in times.items()}, times]
    goals = {(g["column"], g["peer"]): g for g in bench.verdicts(found, taken)}
    assert set(goals) == {(bench.PLAIN, "b"), (bench.PREPARED, "b"), (bench.PREPARED, "o")}
    assert goals[bench.PLAIN, "b"]["ratio"] == pytest.approx(1.1)
    assert not goals[bench.PLAIN, "b"]["holds"]
    assert goals[bench.PREPARED, "o"]["holds"]
    assert goals[bench.PREPARED, "b"]["holds"]


@pytest.mark.parametrize("wrong", [["--batch", "0"], ["--threads", "-1"], ["--models", "alexnet"]])
def test_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(wrong)
