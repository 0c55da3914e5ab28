"""Feature maps: convolutions with BatchNorm and activation, and the residual blocks made of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from fastvr.accelerate.swap import Accelerated, takes
from fastvr.nn.conv_bn_relu import conv_bn_relu
from fastvr.nn.plain import idle, plain
from fastvr.nn.residual import BasicBlock, Bottleneck, run_stage

MAPS = "feature maps come out channels_last; .to(memory_format=torch.channels_last) lets more be fused"


def takes_map(x: object, conv: nn.Module) -> bool:
    """Whether ops may compute with the map ``x`` and what ``conv`` holds."""
    return takes(x, getattr(conv, "weight", None)) and isinstance(x, torch.Tensor) and x.dim() == 4


def conv_bn_act(conv: nn.Module, bn: nn.Module, act: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    """``act(bn(conv(x)))``, as :func:`fastvr.nn.conv_bn_relu.conv_bn_relu`; an activation other than ReLU is
    called behind it."""
    if act is None or idle(act):
        return conv_bn_relu(conv, bn, None, x)
    if plain(act, nn.ReLU):
        return conv_bn_relu(conv, bn, act, x)
    y: torch.Tensor = act(conv_bn_relu(conv, bn, None, x))
    return y


def run_blocks(stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``stage(x)``; as :func:`fastvr.nn.residual.run_stage` has it where all blocks are torchvision's but for
    their names."""
    simple = all(isinstance(block, _FastBlock) and block.simple() for block in stage.children())
    if simple:
        return run_stage(stage, x)
    y: torch.Tensor = stage(x)
    return y


class _FastBlock:
    def simple(self) -> bool:
        """Whether the block is torchvision's but for its names."""
        return True


class FastBasicBlock(_FastBlock, Accelerated, BasicBlock):
    """Also torchvision's, whose names these are; other libraries' say where they have them."""

    runs = "conv_bn_relu, conv_bn_relu with the residual"
    part_names: ClassVar[tuple[str, ...]] = ("conv1", "bn1", "conv2", "bn2", "downsample")
    _fastvr_accelerates = BasicBlock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if takes_map(x, self.conv1):
            return super().forward(x)
        y: torch.Tensor = self.own_forward(x)
        return y


class FastBottleneck(_FastBlock, Accelerated, Bottleneck):
    """Also torchvision's, whose names these are; other libraries' say where they have them."""

    runs = "conv_bn_relu, then bottleneck (or conv_bn_relu, dual_conv_bn_relu)"
    part_names: ClassVar[tuple[str, ...]] = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample")
    _fastvr_accelerates = Bottleneck

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if takes_map(x, self.conv1):
            return super().forward(x)
        y: torch.Tensor = self.own_forward(x)
        return y
