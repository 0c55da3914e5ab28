"""bench/memory.py: what it counts, against what can be counted by hand, and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import memory
import pytest
import torch
from torch import nn

META = torch.device("meta")


def _saved(model: nn.Module, *shape: int) -> int:
    return memory.saved_bytes(model.to(META), torch.empty(shape, device=META))


def test_every_storage_counts_once_and_parameters_do_not() -> None:
    # x for the first weight's gradient, the rectified map for the ReLU's and the second weight's
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert _saved(model, 5, 8) == 4 * (5 * 8 + 5 * 16)
    # a frozen weight needs no x
    model[0].requires_grad_(False)
    assert _saved(model, 5, 8) == 4 * 5 * 16


def test_a_view_keeps_its_whole_storage() -> None:
    class Half(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x[:, :8])

    assert _saved(Half(8, 4), 5, 16) == 4 * 5 * 16


def test_nothing_to_differentiate_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="nothing would be differentiated"):
        _saved(nn.Linear(8, 4).requires_grad_(False), 5, 8)


def test_json_and_the_budget(tmp_path: Path, capsys) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "memory.json"
    assert memory.main(["--batch", "64", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert list(found) == ["vit_b_16", "vit_b_16 autocast", "resnet50", "resnet50 autocast"]
    for name, row in found.items():
        assert set(row) == {"eager", "fastvr"}
        assert 0 < row["fastvr"] <= (0.60 if "vit" in name else 0.65) * row["eager"]
    assert "vit_b_16" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        memory.main(["--batch", "0"])
