"""Result files: whole or untouched, and never without what was measured on what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import record
import torch


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    record.save_json(path, {"old": 1})
    with pytest.raises(TypeError):
        record.save_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_environment_names_what_a_result_needs() -> None:
    found = record.environment(torch.device("cpu"))
    assert found["gpu"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"]
    assert len(found["sources"]) == 12
    assert found["commit"]


def test_floor_is_the_larger_of_arithmetic_and_bytes() -> None:
    peaks = record.Peaks(tflops=2.0, gbs=4.0)
    assert peaks.floor_ms(flops=10**9, moved=0) == pytest.approx(0.5)
    assert peaks.floor_ms(flops=10**9, moved=4 * 10**6) == pytest.approx(1.0)


def test_achieved_rates() -> None:
    assert record.achieved(flops=3 * 10**9, moved=5 * 10**6, ms=1.0) == {"tflops": 3.0, "gbs": 5.0}


def test_peaks_of_this_machine_are_positive() -> None:
    peaks = record.measure_peaks(torch.device("cpu"), torch.float32)
    assert peaks.tflops > 0
    assert peaks.gbs > 0
