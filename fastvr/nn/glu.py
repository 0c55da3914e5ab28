"""The gated perceptron of a transformer block, SwiGLU (Shazeer, 2020)."""

from __future__ import annotations

import torch
from torch import nn

from fastvr.nn.plain import DrawScale, drawn, idle, join, layer_norm, linear, plain
from fastvr.ops.linear import linear as linear_op
from fastvr.ops.swiglu import swiglu


class GluMlp(nn.Module):
    """``fc2(silu(a) * b)`` of ``a, b = fc1(x)``, with timm's names (its ``SwiGLUPacked``).

    Args:
        in_features: width of the tokens.
        hidden_features: width of a and b together, even.
        drop: dropout after each layer.
    """

    def __init__(self, in_features: int, hidden_features: int, *, drop: float = 0.0) -> None:
        super().__init__()
        if hidden_features % 2:
            raise ValueError(f"GluMlp: hidden_features must be even; got {hidden_features}")
        self.fc1: nn.Module = nn.Linear(in_features, hidden_features)
        self.act: nn.Module = nn.SiLU()
        self.drop1: nn.Module = nn.Dropout(drop)
        self.fc2: nn.Module = nn.Linear(hidden_features // 2, in_features)
        self.drop2: nn.Module = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        return self.branch(x)

    def separable(self) -> bool:
        """Whether rows may be computed apart from their sample: nothing inside is observed, replaced or
        dropping."""
        return (
            plain(self, GluMlp)
            and all(plain(fc, nn.Linear) for fc in (self.fc1, self.fc2))
            and plain(self.act, nn.SiLU)
            and idle(self.drop1)
            and idle(self.drop2)
        )

    def branch(
        self,
        x: torch.Tensor,
        norm: nn.Module | None = None,
        gamma: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        drop_path: DrawScale | None = None,
    ) -> torch.Tensor:
        """``residual + drop_path(gamma * mlp(norm(x)))``, in as few launches as the modules' state allows."""
        fc2 = self.fc2
        if norm is not None:
            x = layer_norm(norm, x, for_matmul=plain(self.fc1, nn.Linear))
        x = linear(self.fc1, x)
        if plain(self.act, nn.SiLU):
            x = swiglu(x)
        else:
            gate, value = x.chunk(2, dim=-1)
            x = self.act(gate) * value
        x = self.drop1(x)
        if plain(fc2, nn.Linear) and idle(self.drop2):
            scale = drawn(drop_path, x)
            return linear_op(x, fc2.weight, fc2.bias, gamma=gamma, residual=residual, sample_scale=scale)
        y = self.drop2(linear(fc2, x))
        return join(y, gamma, residual, drawn(drop_path, y))
