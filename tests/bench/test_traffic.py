"""bench/traffic.py: its JSON, and the budget of launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# launches of a plain and of a prepared call, and bytes of the prepared one
LIMITS = {"vit_b_16": (90, 63, 5.1e9), "resnet50": (56, 47, 3.0e9)}
# of a training step over eager's: FLOPs, bytes
TRAINING = {"vit_b_16": (1.05, 0.65), "resnet50": (1.12, 0.80)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    file = tmp_path_factory.mktemp("traffic") / "traffic.json"
    command = [sys.executable, str(ROOT / "bench" / "traffic.py"), "--json", str(file)]
    # from elsewhere: the script finds the project itself
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_json_has_exactly_its_keys(written: tuple[Any, str]) -> None:
    content, _ = written
    assert list(content) == ["vit_b_16", "resnet50"]
    for columns in content.values():
        assert list(columns) == ["eager", "fastvr", "prepared"]
        for counts in columns.values():
            assert set(counts) == {"launches", "bytes"}
            assert all(isinstance(n, int) and n > 0 for n in counts.values())


def test_launches_and_bytes_are_within_the_budget(written: tuple[Any, str]) -> None:
    content, _ = written
    for name, (plain, prepared, size) in LIMITS.items():
        columns = content[name]
        assert columns["fastvr"]["launches"] <= plain
        assert columns["prepared"]["launches"] <= min(prepared, columns["fastvr"]["launches"])
        assert columns["prepared"]["bytes"] <= size
        assert columns["fastvr"]["bytes"] < columns["eager"]["bytes"]
        assert columns["prepared"]["bytes"] <= columns["fastvr"]["bytes"]


def test_table_names_the_models(written: tuple[Any, str]) -> None:
    _, table = written
    assert "vit_b_16" in table
    assert "launches" in table


def test_a_bad_batch_is_refused() -> None:
    import traffic

    with pytest.raises(SystemExit, match="2"):
        traffic.main(["--batch", "0"])


def test_json_on_standard_output_is_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import traffic

    short = {"vit_b_16": {"eager": {"launches": 1, "bytes": 2}}}
    monkeypatch.setattr(traffic, "counts", lambda batch, arch, train: (short, {}))
    assert traffic.main(["--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == short


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_step_is_within_its_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import cases
    import traffic

    monkeypatch.setattr(cases, "MODELS", (name,))
    short, _ = traffic.counts(64, train=True)
    assert list(short[name]) == ["eager", "fastvr"]
    eager, ours = short[name]["eager"], short[name]["fastvr"]
    flops, size = TRAINING[name]
    assert 0.5 * eager["flops"] < ours["flops"] <= flops * eager["flops"]
    assert ours["bytes"] <= size * eager["bytes"]
    assert eager["launches"] > 0
    if name == "resnet50":
        # three times the forward pass, but for the image's gradient
        assert eager["flops"] == 64 * (3 * 8_178_368_512 - 236_027_904)
        # running statistics move together: launches for each would be a third of all
        assert 0 < ours["launches"] < 450
    else:
        assert 0 < ours["launches"] < eager["launches"]
