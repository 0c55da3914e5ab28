"""torchvision's Vision Transformers and ResNets."""

from __future__ import annotations

import torch
from torch import nn

from fastvr.accelerate.blocks import FastMlp, fusable, residual_branch
from fastvr.accelerate.maps import MAPS, run_blocks, takes_map
from fastvr.accelerate.swap import Accelerated, takes
from fastvr.nn.head import classify_map
from fastvr.nn.stem import stem


class MLPBlock(FastMlp):
    """A sequence of Linear, activation, Dropout, Linear, Dropout."""

    part_names = ("0", "3")

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        return (
            None if len(list(module.children())) == 5 else "it has not the five layers of a transformer's MLP"
        )

    fc1 = property(lambda self: self[0])
    act = property(lambda self: fusable(self[1]))
    drop1 = property(lambda self: self[2])
    fc2 = property(lambda self: self[3])
    drop2 = property(lambda self: self[4])


class EncoderBlock(Accelerated):
    runs = "layer_norm, its attention, layernorm_mlp; each with the residual"
    part_names = ("ln_1", "ln_2")

    ln_1: nn.Module
    self_attention: nn.Module
    dropout: nn.Module
    ln_2: nn.Module
    mlp: nn.Module

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not takes(input, getattr(self.ln_1, "weight", None), norm=True) or input.dim() != 3:
            y: torch.Tensor = self.own_forward(input)
            return y
        x = residual_branch(
            input,
            self.ln_1,
            self.self_attention,
            None,
            self.dropout,
            lambda y: self.self_attention(y, y, y, need_weights=False)[0],
        )
        return residual_branch(x, self.ln_2, self.mlp, None, None)


class ResNet(Accelerated):
    """Also ResNeXt and Wide ResNet."""

    runs = "conv_bn_relu_max_pool, the stages (bottleneck_chain), avg_pool_linear"
    part_names = ("conv1", "bn1", "relu", "maxpool", "avgpool", "fc")

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    avgpool: nn.Module
    fc: nn.Module

    @classmethod
    def note(cls, module: nn.Module) -> str | None:
        return MAPS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not takes_map(x, self.conv1):
            y: torch.Tensor = self.own_forward(x)
            return y
        x = stem(self.conv1, self.bn1, self.relu, self.maxpool, x, None, None, x.dtype)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = run_blocks(stage, x)
        return classify_map(self.avgpool, self.fc, x)
