"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastvr.nn.plain import DrawScale, drawn, idle, join, layer_norm, linear, plain, plain_norm
from fastvr.ops.layernorm_mlp import layernorm_mlp
from fastvr.ops.linear import linear as linear_op


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 * x)``, the activation of OpenAI's CLIP (Hendrycks and Gimpel, 2016)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
}


class Mlp(nn.Module):
    """``fc2(act(fc1(x)))`` with timm's names.

    Args:
        in_features: width of the tokens.
        hidden_features: width between the two layers.
        act: "gelu" (exact, by erf), "gelu_tanh", "quick_gelu" or "relu".
        drop: dropout after each layer.
    """

    def __init__(
        self, in_features: int, hidden_features: int, *, act: str = "gelu", drop: float = 0.0
    ) -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"Mlp: act must be one of {', '.join(map(repr, ACTIVATIONS))}; got {act!r}")
        self.fc1: nn.Module = nn.Linear(in_features, hidden_features)
        self.act: nn.Module = ACTIVATIONS[act]()
        self.drop1: nn.Module = nn.Dropout(drop)
        self.fc2: nn.Module = nn.Linear(hidden_features, in_features)
        self.drop2: nn.Module = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        return self.branch(x)

    def separable(self) -> bool:
        """Whether rows may be computed apart from their sample: nothing inside is observed, replaced or
        dropping."""
        return (
            plain(self, Mlp)
            and plain(self.fc1, nn.Linear)
            and plain(self.fc2, nn.Linear)
            and fused_name(self.act) is not None
            and idle(self.drop1)
            and idle(self.drop2)
        )

    def fused(self, norm: nn.Module, gamma: torch.Tensor | None) -> dict[str, Any] | None:
        """The arguments of :func:`layernorm_mlp` but x and residual, or None where a module inside is
        observed, replaced or dropping."""
        fc1, fc2, act = self.fc1, self.fc2, fused_name(self.act)
        if (
            act is None
            or not (idle(self.drop1) and idle(self.drop2))
            or not (plain_norm(norm) and plain(fc1, nn.Linear) and plain(fc2, nn.Linear))
        ):
            return None
        return {
            "ln_weight": norm.weight,
            "ln_bias": norm.bias,
            "fc1_weight": fc1.weight,
            "fc1_bias": fc1.bias,
            "fc2_weight": fc2.weight,
            "fc2_bias": fc2.bias,
            "eps": norm.eps,
            "act": act,
            "gamma": gamma,
        }

    def branch(
        self,
        x: torch.Tensor,
        norm: nn.Module | None = None,
        gamma: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        drop_path: DrawScale | None = None,
    ) -> torch.Tensor:
        """``residual + drop_path(gamma * mlp(norm(x)))``, in as few launches as the modules' state allows."""
        if norm is not None and (fused := self.fused(norm, gamma)) is not None:
            return layernorm_mlp(x, **fused, residual=residual, sample_scale=drawn(drop_path, x))
        fc1, fc2, act = self.fc1, self.fc2, fused_name(self.act)
        if norm is not None:
            x = layer_norm(norm, x, for_matmul=plain(fc1, nn.Linear))
        if act is not None and plain(fc1, nn.Linear):
            x = linear_op(x, fc1.weight, fc1.bias, act=act)
        else:
            x = self.act(linear(fc1, x))
        x = self.drop1(x)
        if plain(fc2, nn.Linear) and idle(self.drop2):
            scale = drawn(drop_path, x)
            return linear_op(x, fc2.weight, fc2.bias, gamma=gamma, residual=residual, sample_scale=scale)
        y = self.drop2(linear(fc2, x))
        return join(y, gamma, residual, drawn(drop_path, y))


def fused_name(act: nn.Module) -> str | None:
    """What ops call this activation, or None where they do not have it."""
    if plain(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    if plain(act, QuickGELU):
        return "quick_gelu"
    return "relu" if plain(act, nn.ReLU) else None
