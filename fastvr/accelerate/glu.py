"""Gated MLPs of all libraries: SwiGLU, its gate and value in one linear layer or in two."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from fastvr.accelerate.blocks import LinearLayers, fusable, joined, ordinary_linear, own_or_fused_branch
from fastvr.accelerate.swap import takes
from fastvr.nn.glu import GluMlp
from fastvr.nn.plain import DrawScale, drawn, idle, join, layer_norm, plain
from fastvr.ops.linear import linear
from fastvr.ops.swiglu import swiglu


class FastGlu(LinearLayers, GluMlp):
    """SwiGLU with one linear layer for gate and value, and fastvr's (timm's) names."""

    _fastvr_accelerates = GluMlp
    runs = "linear, swiglu, linear (in a block: with LayerScale and residual)"
    # in training its dropout's random numbers stay PyTorch's
    kernels_drop = False
    part_names = ("fc1", "fc2")
    required = ("fc1", "act", "drop1", "fc2", "drop2")

    def separate(self) -> bool:
        """Whether only the library's own forward, or a call of what was put in place, computes what it is."""
        return not ordinary_linear(self.fc1, self.fc2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not takes(x, getattr(self.fc1, "weight", None)) or self.separate():
            y: torch.Tensor = self.own_forward(x)
            return y
        return super().branch(x)

    branch = own_or_fused_branch


class SplitGlu(LinearLayers):
    """SwiGLU with linear layers of their own for gate and value; a family says what they are called."""

    runs = "linear (the two weights joined), swiglu, linear (in a block: with LayerScale and residual)"
    names: ClassVar[tuple[str, str, str]]
    """Of gate, value and output."""
    act_name: ClassVar[str]
    drop_names: ClassVar[tuple[str, ...]] = ()

    def parts(self) -> list[nn.Module]:
        return list(self._linears())

    def _linears(self) -> tuple[Any, Any, Any]:
        gate, value, output = (getattr(self, name) for name in type(self).names)
        return gate, value, output

    def separate(self) -> bool:
        """Whether only the library's own forward, or a call of what was put in place, computes what it is."""
        return (
            not ordinary_linear(*self._linears())
            or not plain(fusable(getattr(self, type(self).act_name)), nn.SiLU)
            or not all(idle(getattr(self, name)) for name in type(self).drop_names)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not takes(x, getattr(self._linears()[0], "weight", None)) or self.separate():
            y: torch.Tensor = self.own_forward(x)
            return y
        return self.branch(x)

    def branch(
        self,
        x: torch.Tensor,
        norm: nn.Module | None = None,
        gamma: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        drop_path: DrawScale | None = None,
    ) -> torch.Tensor:
        """``residual + drop_path(gamma * mlp(norm(x)))``."""
        if self.separate():
            y = self.own_forward(x if norm is None else layer_norm(norm, x))
            return join(y, gamma, residual, drawn(drop_path, y))
        gate, value, output = self._linears()
        if norm is not None:
            x = layer_norm(norm, x, for_matmul=True)
        x = swiglu(linear(x, *joined(gate, value)))
        scale = drawn(drop_path, x)
        return linear(x, output.weight, output.bias, gamma=gamma, residual=residual, sample_scale=scale)
