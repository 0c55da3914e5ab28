"""Which checkpoint is for which model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastvr.compare import UsageError, models


@pytest.fixture
def checkpoints(tiny_families: tuple[models.Family, models.Family], tmp_path: Path) -> list[Path]:
    paths = []
    for family in tiny_families:
        paths.append(tmp_path / f"{family.key}.pt")
        torch.save({"state_dict": family.build(10).state_dict()}, paths[-1])
    return paths


def test_each_checkpoint_finds_its_model(tiny_families, checkpoints):
    vit, resnet = checkpoints
    assert models.by_family((resnet, vit), tiny_families) == {"vit": vit, "resnet": resnet}
    assert models.by_family((resnet,), tiny_families) == {"resnet": resnet}
    assert models.by_family((), tiny_families) == {}


def test_two_for_one_model_and_one_for_none(tiny_families, checkpoints, tmp_path):
    with pytest.raises(UsageError, match=r"vit\.pt and .*vit\.pt are for the same model"):
        models.by_family((checkpoints[0], checkpoints[0]), tiny_families)
    foreign = tmp_path / "foreign.pt"
    torch.save({"some.weight": torch.zeros(3)}, foreign)
    with pytest.raises(UsageError, match=r"foreign\.pt is a checkpoint of neither tiny ViT nor tiny ResNet"):
        models.by_family((foreign,), tiny_families)
