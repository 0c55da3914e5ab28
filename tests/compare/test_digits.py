from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastvr.compare import digits
from fastvr.train import accuracy, fit
from fastvr.train import digits as data

pytest.importorskip("sklearn")


def test_the_split_is_fixed_and_even() -> None:
    first, second, other = data.load(seed=0), data.load(seed=0), data.load(seed=1)
    assert torch.equal(first.test_x, second.test_x)
    assert not torch.equal(first.test_x, other.test_x)
    assert len(first.train_x) + len(first.test_x) == 1797
    assert (first.test_y.bincount() - 45).abs().max() <= 2
    rows = {tuple(x.flatten().tolist()) for x in first.train_x}
    assert not rows & {tuple(x.flatten().tolist()) for x in first.test_x}


def test_fewer_labels_keep_every_class() -> None:
    everything = data.load()
    few = everything.fewer_labels(0.1)
    assert few.train_y.bincount().min() >= 13
    assert len(few.train_x) == pytest.approx(0.1 * len(everything.train_x), rel=0.03)
    assert torch.equal(few.test_x, everything.test_x)


def test_fit_learns_until_the_time_is_over() -> None:
    split = data.load()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = accuracy(model, split.test_x, split.test_y)
    shares: list[float] = []
    result = fit(model, split.train_x, split.train_y, seconds=1.0, lr=1e-2, step=shares.append)
    assert accuracy(model, split.test_x, split.test_y) > max(0.8, before)
    assert not model.training
    assert result.steps == len(shares)
    assert shares == sorted(shares)
    assert result.epochs == pytest.approx(result.steps * 64 / len(split.train_x))
    assert result.seconds >= 1.0


@pytest.mark.parametrize(("samples", "seconds"), [(0, 1.0), (4, 0.0)])
def test_fit_needs_samples_and_time(samples: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="fit: needs samples"):
        fit(nn.Linear(2, 2), torch.zeros(samples, 2), torch.zeros(samples).long(), seconds=seconds)


def test_fit_says_when_the_loss_is_lost() -> None:
    with pytest.raises(FloatingPointError, match="nan"):
        fit(nn.Linear(2, 2), torch.full((8, 2), torch.nan), torch.zeros(8).long(), seconds=0.01)


def test_both_kinds_on_all_labels_and_on_few() -> None:
    found: dict[str, Any] = {}
    done: list[float] = []
    digits.compare(
        seconds=0.4, device=torch.device("cpu"), seed=0, found=found, step=lambda share, _: done.append(share)
    )
    assert found["train"] + found["test"] == 1797
    assert set(found["models"]) == {"vit", "resnet"}
    for model in found["models"].values():
        assert model["few"]["samples"] < model["all"]["samples"] == found["train"]
        assert 0 <= model["few"]["accuracy"] <= 1
    sizes = [model["parameters"] for model in found["models"].values()]
    assert max(sizes) < 1.1 * min(sizes)
    assert done == sorted(done)
    assert done[-1] <= 1
