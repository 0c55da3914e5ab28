"""The same learning: 32 steps beside timm's ViT and torchvision's ResNet, the same weights, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import learning
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastvr
from fastvr.train import digits

pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("torchvision")

# SGD for the ResNet, as it is trained. The interpreter takes small models: not of 4 channels, for which
# PyTorch's own strided 1x1 convolution, on a CPU in channels_last, writes out of bounds in its backward.
# Where a BatchNorm has four values, only small steps are not chaotic (eager beside itself, from weights
# changed by 1e-7: 3e-6, else 0.2).
RESNET = {"optimizer": "sgd", "lr": 0.02}
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], dict[str, Any]]] = {
    "vit-auto": (learning.vit_pair, {"batch_size": 32}),
    "resnet-auto": (learning.resnet_pair, {"batch_size": 16, **RESNET}),
    "vit-triton": (
        lambda: learning.vit_pair(patch_size=4, embed_dim=32, depth=1, num_heads=1),
        {"batch_size": 8},
    ),
    "resnet-triton": (lambda: learning.resnet_pair(width=8), {"batch_size": 4, **RESNET, "lr": 0.002}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_32_steps_have_eagers_losses(case: str, device: torch.device) -> None:
    (pair, how), (kind, _, backend) = CASES[case], case.partition("-")
    data = digits.load().to(device)
    x = F.interpolate(data.train_x, scale_factor=1 if kind == "vit" else 4)
    ours, theirs = (model.to(device) for model in pair())
    with fastvr.use_backend(backend):
        actual = learning.learn(ours, x, data.train_y, steps=32, seed=0, **how)
    expected = learning.learn(theirs, x, data.train_y, steps=32, seed=0, **how)
    assert backend == "triton" or expected[-4:].mean() < expected[:4].mean()
    assert ((actual - expected).abs() <= 1e-3 * expected).all(), (actual / expected - 1).abs().max()
