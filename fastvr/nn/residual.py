"""The residual blocks of ResNet (He et al., 2016), v1.5: the stride is on the 3x3 convolution."""

from __future__ import annotations

from typing import ClassVar, TypeGuard

import torch
from torch import nn

from fastvr.nn.conv_bn_relu import conv_bn_relu, dual_conv_bn_relu
from fastvr.nn.plain import plain


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
        y = conv_bn_relu(self.conv1, self.bn1, self.relu, x)
        return conv_bn_relu(self.conv2, self.bn2, self.relu, y, residual=_identity(self.downsample, x))

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, with torchvision's names; arguments as :class:`BasicBlock`."""

    expansion: ClassVar[int] = 4

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1: nn.Module = conv1x1(inplanes, planes)
        self.bn1: nn.Module = nn.BatchNorm2d(planes)
        self.conv2: nn.Module = conv3x3(planes, planes, stride)
        self.bn2: nn.Module = nn.BatchNorm2d(planes)
        self.conv3: nn.Module = conv1x1(planes, planes * self.expansion)
        self.bn3: nn.Module = nn.BatchNorm2d(planes * self.expansion)
        self.relu: nn.Module = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inplanes, H, W] to [N, 4 * planes, H / stride, W / stride]."""
        y = conv_bn_relu(self.conv1, self.bn1, self.relu, x)
        y = conv_bn_relu(self.conv2, self.bn2, self.relu, y)
        shortcut = self.downsample
        if shortcut is not None and _conv_and_norm(shortcut):
            return dual_conv_bn_relu(self.conv3, self.bn3, self.relu, y, shortcut[0], shortcut[1], x)
        return conv_bn_relu(self.conv3, self.bn3, self.relu, y, residual=_identity(shortcut, x))

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)


def _identity(downsample: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    if downsample is None:
        return x
    if _conv_and_norm(downsample):
        return conv_bn_relu(downsample[0], downsample[1], None, x)
    y: torch.Tensor = downsample(x)
    return y


def _conv_and_norm(downsample: nn.Module) -> TypeGuard[nn.Sequential]:
    return plain(downsample, nn.Sequential) and len(downsample) == 2
