"""timm's and torchvision's ResNets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def _torchvision(kind: str = "Bottleneck", **overrides: Any) -> nn.Module:
    from torchvision.models import resnet

    torch.manual_seed(0)
    return resnet.ResNet(getattr(resnet, kind), [1, 2, 1, 1], num_classes=10, **overrides)


def _timm(kind: str = "Bottleneck", **overrides: Any) -> nn.Module:
    from timm.models import resnet

    torch.manual_seed(0)
    sizes = {"channels": (8, 16, 16, 16), "stem_width": 8, "num_classes": 10}
    return resnet.ResNet(getattr(resnet, kind), (1, 1, 1, 1), **{**sizes, **overrides})


@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("make", [_timm, _torchvision], ids=["timm", "torchvision"])
def test_parity_and_launches(make, kind, hold, images) -> None:
    _, ran = hold(make(kind), images)
    assert ran["conv_bn_relu_max_pool", "reference"] == 1
    assert ran["avg_pool_linear", "reference"] == (make is _torchvision)
    assert ran["conv_bn_relu", "reference"] > 8
