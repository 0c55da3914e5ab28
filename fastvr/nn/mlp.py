"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from fastvr.nn.plain import (
    DrawScale,
    drawn,
    drop_rate,
    dropped_linear,
    drops_apart,
    layer_norm,
    linear,
    plain,
    plain_norm,
)
from fastvr.ops.layernorm_mlp import layernorm_mlp, trains


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

    kernels_drop: ClassVar[bool] = True
    """Whether ``drop1`` and ``drop2`` may be the kernels', with random numbers of theirs."""

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

    def separable(self, x: torch.Tensor) -> bool:
        """Whether rows may be computed apart from their sample: nothing inside is observed or replaced, nor
        drops by PyTorch's random numbers."""
        return (
            plain(self, Mlp)
            and plain(self.fc1, nn.Linear)
            and plain(self.fc2, nn.Linear)
            and fused_name(self.act) is not None
            and all(drops_apart(drop, x, by_kernels=self.kernels_drop) for drop in (self.drop1, self.drop2))
        )

    def fused(self, norm: nn.Module, gamma: torch.Tensor | None, x: torch.Tensor) -> dict[str, Any] | None:
        """The arguments of :func:`layernorm_mlp` but x, residual and sample_scale, or None where a module
        inside is observed, replaced, or drops by PyTorch's random numbers."""
        fc1, fc2, act = self.fc1, self.fc2, fused_name(self.act)
        rates = [drop_rate(drop, by_kernels=self.kernels_drop) for drop in (self.drop1, self.drop2)]
        if (
            act is None
            or None in rates
            or not (plain_norm(norm) and plain(fc1, nn.Linear) and plain(fc2, nn.Linear))
        ):
            return None
        found = {
            "ln_weight": norm.weight,
            "ln_bias": norm.bias,
            "fc1_weight": fc1.weight,
            "fc1_bias": fc1.bias,
            "fc2_weight": fc2.weight,
            "fc2_bias": fc2.bias,
            "eps": norm.eps,
            "act": act,
            "gamma": gamma,
            "hidden_dropout_p": rates[0],
            "dropout_p": rates[1],
        }
        return found if rates == [0, 0] or trains(x, **found) else None

    def branch(
        self,
        x: torch.Tensor,
        norm: nn.Module | None = None,
        gamma: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        drop_path: DrawScale | None = None,
    ) -> torch.Tensor:
        """``residual + drop_path(gamma * mlp(norm(x)))``, in as few launches as the modules' state allows."""
        if norm is not None and (fused := self.fused(norm, gamma, x)) is not None:
            return layernorm_mlp(x, **fused, residual=residual, sample_scale=drawn(drop_path, x))
        fc1, act, by_kernels = self.fc1, fused_name(self.act), self.kernels_drop
        if norm is not None:
            x = layer_norm(norm, x, for_matmul=plain(fc1, nn.Linear))
        if act is not None and plain(fc1, nn.Linear):
            x = dropped_linear(fc1, self.drop1, x, act=act, by_kernels=by_kernels)
        else:
            x = self.drop1(self.act(linear(fc1, x)))
        return dropped_linear(
            self.fc2,
            self.drop2,
            x,
            gamma=gamma,
            residual=residual,
            drop_path=drop_path,
            by_kernels=by_kernels,
        )


def fused_name(act: nn.Module) -> str | None:
    """What ops call this activation, or None where they do not have it."""
    if plain(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    if plain(act, QuickGELU):
        return "quick_gelu"
    return "relu" if plain(act, nn.ReLU) else None
