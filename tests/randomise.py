"""Weights that leave no value at its initial 0 or 1, for any model."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

_Model = TypeVar("_Model", bound=nn.Module)


def randomise(model: _Model, seed: int = 1) -> _Model:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.4, 0.9, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
            elif not isinstance(module, nn.Conv2d):
                for parameter in module.parameters(recurse=False):
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model
