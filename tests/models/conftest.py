"""Small models of both kinds, their peers, and weights that leave no value at its initial 0 or 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from randomise import randomise
from torch import nn

import fastvr
from fastvr.models.resnet import ResNet
from fastvr.nn.residual import BasicBlock, Bottleneck

# head_dim 32 is the smallest that the attention kernel takes
TINY_VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}


@pytest.fixture(name="randomise")
def _randomise() -> Callable[..., nn.Module]:
    return randomise


@pytest.fixture
def tiny_vit() -> Callable[..., fastvr.ViT]:
    def make(**overrides: Any) -> fastvr.ViT:
        torch.manual_seed(0)
        return randomise(fastvr.ViT(**{**TINY_VIT, **overrides})).eval()

    return make


@pytest.fixture
def tiny_timm() -> Callable[..., nn.Module]:
    from timm.models.vision_transformer import VisionTransformer

    def make(**overrides: Any) -> nn.Module:
        torch.manual_seed(0)
        return randomise(VisionTransformer(**{**TINY_VIT, **overrides})).eval()

    return make


@pytest.fixture
def tiny_resnet() -> Callable[..., ResNet]:
    def make(block: str = "bottleneck", **overrides: Any) -> ResNet:
        kind = Bottleneck if block == "bottleneck" else BasicBlock
        arguments = {"num_classes": 10, "width": 8, **overrides}
        torch.manual_seed(0)
        return randomise(ResNet(kind, (1, 1, 1, 1), **arguments)).eval()

    return make


@pytest.fixture
def tiny(tiny_vit: Any, tiny_resnet: Any) -> Callable[[str], Any]:
    """A model by kind: "vit", "basic", "bottleneck"; all take [N, 3, 32, 32]."""
    return lambda kind, **overrides: (
        tiny_vit(**overrides) if kind == "vit" else tiny_resnet(kind, **overrides)
    )


@pytest.fixture
def short(tiny: Any) -> Callable[[str], Any]:
    """A model by kind, of one block or one stage: compilers take seconds for each."""

    def make(kind: str) -> Any:
        if kind == "vit":
            return tiny(kind, depth=1)
        model = tiny(kind)
        model.layer2, model.layer3, model.layer4 = nn.Sequential(), nn.Sequential(), nn.Sequential()
        model.fc = randomise(nn.Linear(8 if kind == "basic" else 32, 10))
        return model.eval()

    return make


@pytest.fixture
def images() -> Callable[..., torch.Tensor]:
    def make(n: int = 2, size: int | tuple[int, int] = 32, seed: int = 3) -> torch.Tensor:
        sides = (size, size) if isinstance(size, int) else size
        return torch.randn(n, 3, *sides, generator=torch.Generator().manual_seed(seed))

    return make
