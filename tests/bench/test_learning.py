"""The comparison of learning, on a twentieth of the digits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import learning
import pytest

from fastvr.train import digits

pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("torchvision")


def test_it_reports_every_seed_and_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = digits.load

    def few(*, seed: int) -> digits.Digits:
        found = everything(test_share=0.95, seed=seed)
        return dataclasses.replace(found, test_x=found.test_x[::20], test_y=found.test_y[::20])

    monkeypatch.setattr(digits, "load", few)
    status = learning.main(["--epochs", "1", "--seeds", "2", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["models"]) == {"vit", "resnet"}
    for model in found["models"].values():
        assert [run["seed"] for run in model["runs"]] == [0, 1]
        difference = model["mean"]["fastvr"] - model["mean"]["eager"]
        assert model["passed"] == (abs(difference) <= 0.01)
    assert status == (0 if all(model["passed"] for model in found["models"].values()) else 1)
    assert capsys.readouterr().out.count("mean    fastvr") == 2
