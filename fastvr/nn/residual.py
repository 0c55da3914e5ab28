"""The residual blocks of ResNet (He et al., 2016), v1.5: the stride is on the 3x3 convolution."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, TypeGuard

import torch
from torch import nn

from fastvr import backend
from fastvr.nn.conv_bn_relu import batch_norm, conv_bn_relu, dual_conv_bn_relu, plain_conv, pointwise
from fastvr.nn.plain import plain
from fastvr.nn.residual_training import train_block
from fastvr.nn.running_statistics import Moves
from fastvr.ops.bottleneck import Shortcut
from fastvr.ops.bottleneck import bottleneck as bottleneck_op
from fastvr.ops.bottleneck import bottleneck_chain as bottleneck_chain_op
from fastvr.ops.conv_bn_relu import BatchNorm


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, with torchvision's names.

    Args:
        inplanes: channels that come in.
        planes: channels inside; ``planes * expansion`` go out.
        stride: of the first convolution.
        downsample: what the residual passes through, a 1x1 convolution and a BatchNorm, or None.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1: nn.Module = conv3x3(inplanes, planes, stride)
        self.bn1: nn.Module = nn.BatchNorm2d(planes)
        self.relu: nn.Module = nn.ReLU(inplace=True)
        self.conv2: nn.Module = conv3x3(planes, planes)
        self.bn2: nn.Module = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inplanes, H, W] to [N, planes, H / stride, W / stride]."""
        return self.run(x)

    def run(self, x: torch.Tensor, moves: Moves | None = None) -> torch.Tensor:
        """As :meth:`forward`; ``moves`` may take those of the running statistics, for the caller to apply."""
        branch = ((self.conv1, self.bn1), (self.conv2, self.bn2))
        fused = train_block(branch, self.relu, self.downsample, x, moves)
        if fused is not None:
            return fused
        if moves is not None:
            # somebody may look from the modules that are called now
            moves.apply()
        y = conv_bn_relu(self.conv1, self.bn1, self.relu, x)
        return conv_bn_relu(self.conv2, self.bn2, self.relu, y, residual=_identity(self.downsample, x))

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, with torchvision's names; arguments as :class:`BasicBlock`, and

    Args:
        groups: of the 3x3 convolution (ResNeXt).
        width_per_group: channels of each group over ``planes / 64`` (Wide ResNet, ResNeXt).
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__()
        width = int(planes * (width_per_group / 64)) * groups
        self.conv1: nn.Module = conv1x1(inplanes, width)
        self.bn1: nn.Module = nn.BatchNorm2d(width)
        self.conv2: nn.Module = conv3x3(width, width, stride, groups)
        self.bn2: nn.Module = nn.BatchNorm2d(width)
        self.conv3: nn.Module = conv1x1(width, planes * self.expansion)
        self.bn3: nn.Module = nn.BatchNorm2d(planes * self.expansion)
        self.relu: nn.Module = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inplanes, H, W] to [N, 4 * planes, H / stride, W / stride]."""
        return self.run(x)

    def run(self, x: torch.Tensor, moves: Moves | None = None) -> torch.Tensor:
        """As :meth:`forward`; ``moves`` may take those of the running statistics, for the caller to apply."""
        branch = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        fused = train_block(branch, self.relu, self.downsample, x, moves)
        if fused is not None:
            return fused
        if moves is not None:
            # somebody may look from the modules that are called now
            moves.apply()
        return self.finish(conv_bn_relu(self.conv1, self.bn1, self.relu, x), x)[0]

    def finish(
        self, y: torch.Tensor, x: torch.Tensor, following: Bottleneck | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The block's result from what its first convolution made, ``y``, of its input ``x``.

        With it what the first convolution of the block ``following`` makes of the result, where both are one
        computation, else None.
        """
        block = self._fused(y, x)
        if block is not None:
            if following is not None and (first := _first(following)) is not None:
                return bottleneck_chain_op(**block, weight1=first[0], bn1=first[1])
            return bottleneck_op(**block), None
        y = conv_bn_relu(self.conv2, self.bn2, self.relu, y)
        shortcut = self.downsample
        if shortcut is not None and _conv_and_norm(shortcut):
            y = dual_conv_bn_relu(self.conv3, self.bn3, self.relu, y, shortcut[0], shortcut[1], x)
        else:
            y = conv_bn_relu(self.conv3, self.bn3, self.relu, y, residual=_identity(shortcut, x))
        return y, None

    def _fused(self, y: torch.Tensor, x: torch.Tensor) -> dict[str, Any] | None:
        """The arguments of the bottleneck op, or None where a module in it is not what the op computes."""
        # where no kernel can run its parts do, and checking the arguments twice would cost more than it tells
        if not backend.kernels_possible(x.device):
            return None
        conv2, conv3 = self.conv2, self.conv3
        bn2, bn3 = batch_norm(self.bn2), batch_norm(self.bn3)
        if (
            bn2 is None
            or bn3 is None
            or not (plain(self.relu, nn.ReLU) and plain_conv(conv2) and pointwise(conv3))
            or conv3.stride != (1, 1)
            or conv2.bias is not None
            or conv2.padding != (1, 1)
            or tuple(conv2.weight.shape) != (conv3.in_channels, conv3.in_channels, 3, 3)
        ):
            return None
        block = {"x": y, "weight2": conv2.weight, "bn2": bn2, "weight3": conv3.weight, "bn3": bn3}
        block["stride"] = conv2.stride
        downsample = self.downsample
        if downsample is not None and _conv_and_norm(downsample):
            bn = batch_norm(downsample[1])
            if bn is not None and pointwise(downsample[0]):
                shortcut = Shortcut(x, downsample[0].weight, bn, downsample[0].stride)
                return block | {"shortcut": shortcut}
        return block | {"residual": _identity(downsample, x)}

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3


def run_stage(stage: nn.Module, x: torch.Tensor, moves: Moves | None = None) -> torch.Tensor:
    """``stage(x)``.

    In inference a bottleneck computes the first convolution of the next one, where nobody observes or
    replaced either, and hands it on: one launch, whose input is not read back. In training the running
    statistics of all blocks move together; ``moves`` takes them along, for the caller to apply.
    """
    if not plain(stage, nn.Sequential):
        if moves is not None:
            moves.apply()
        y: torch.Tensor = stage(x)
        return y
    if torch.is_grad_enabled():
        pending = Moves() if moves is None else moves
        for block in stage:
            if plain(block, Bottleneck) or plain(block, BasicBlock):
                x = block.run(x, pending)
            else:
                pending.apply()
                x = block(x)
        if moves is None:
            pending.apply()
        return x
    carried: torch.Tensor | None = None
    for block, following in itertools.pairwise((*stage, None)):
        if not plain(block, Bottleneck):
            x, carried = block(x), None
            continue
        if carried is None:
            carried = conv_bn_relu(block.conv1, block.bn1, block.relu, x)
        after = following if following is not None and plain(following, Bottleneck) else None
        x, carried = block.finish(carried, x, after)
    return x


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_planes, out_planes, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False
    )


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)


def _identity(downsample: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    if downsample is None:
        return x
    if _conv_and_norm(downsample):
        return conv_bn_relu(downsample[0], downsample[1], None, x)
    if plain(downsample, nn.Sequential) and len(downsample) == 3:
        # ResNet-D's: the pool or an identity first
        return conv_bn_relu(downsample[1], downsample[2], None, downsample[0](x))
    y: torch.Tensor = downsample(x)
    return y


def _conv_and_norm(downsample: nn.Module) -> TypeGuard[nn.Sequential]:
    return plain(downsample, nn.Sequential) and len(downsample) == 2


def _first(block: Bottleneck) -> tuple[torch.Tensor, BatchNorm] | None:
    """Weight and BatchNorm of the first convolution, where the chain's op computes it."""
    conv1, bn1 = block.conv1, batch_norm(block.bn1)
    if bn1 is None or not pointwise(conv1) or conv1.stride != (1, 1) or not plain(block.relu, nn.ReLU):
        return None
    return conv1.weight, bn1
