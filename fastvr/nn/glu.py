"""The gated perceptron of a transformer block, SwiGLU (Shazeer, 2020)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from fastvr.nn.plain import DrawScale, dropped_linear, drops_apart, layer_norm, linear, plain
from fastvr.ops.swiglu import swiglu


class GluMlp(nn.Module):
    """``fc2(silu(a) * b)`` of ``a, b = fc1(x)``, with timm's names (its ``SwiGLUPacked``).

    Args:
        in_features: width of the tokens.
        hidden_features: width of a and b together, even.
        drop: dropout after each layer.
    """

    kernels_drop: ClassVar[bool] = True
    """Whether ``drop2`` may be the kernels', with random numbers of theirs."""

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

    def separable(self, x: torch.Tensor) -> bool:
        """Whether rows may be computed apart from their sample: nothing inside is observed or replaced, nor
        drops by PyTorch's random numbers."""
        return (
            plain(self, GluMlp)
            and all(plain(fc, nn.Linear) for fc in (self.fc1, self.fc2))
            and plain(self.act, nn.SiLU)
            and all(drops_apart(drop, x, by_kernels=self.kernels_drop) for drop in (self.drop1, self.drop2))
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
        if norm is not None:
            x = layer_norm(norm, x, for_matmul=plain(self.fc1, nn.Linear))
        x = linear(self.fc1, x)
        if plain(self.act, nn.SiLU):
            x = swiglu(x)
        else:
            gate, value = x.chunk(2, dim=-1)
            x = self.act(gate) * value
        return dropped_linear(
            self.fc2,
            self.drop2,
            self.drop1(x),
            gamma=gamma,
            residual=residual,
            drop_path=drop_path,
            by_kernels=self.kernels_drop,
        )
