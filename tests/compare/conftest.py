"""Families of tiny models, so that a whole comparison takes a second or two."""

from __future__ import annotations

import pytest
import torch

import fastvr
from fastvr.compare import models
from fastvr.models.preprocessing import Preprocessing
from fastvr.nn.residual import BasicBlock

HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def tiny_families() -> tuple[models.Family, models.Family]:
    return (
        models.Family(
            key="vit",
            title="tiny ViT",
            build=lambda num_classes: fastvr.ViT(
                img_size=32, patch_size=8, num_classes=num_classes, embed_dim=32, depth=1, num_heads=1
            ),
            peer=lambda num_classes: None,
            peer_name="",
            preprocessing=Preprocessing(32, 40, HALF, HALF, interpolation="bicubic"),
            marks=("patch_embed.proj.weight",),
        ),
        models.Family(
            key="resnet",
            title="tiny ResNet",
            build=lambda num_classes: fastvr.ResNet(BasicBlock, (1, 1, 1, 1), num_classes, width=8),
            peer=lambda num_classes: None,
            peer_name="",
            preprocessing=Preprocessing(32, 40, HALF, HALF),
            marks=("layer1.0.conv1.weight",),
            memory_format=torch.channels_last,
        ),
    )
