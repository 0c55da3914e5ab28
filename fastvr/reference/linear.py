"""y = residual + gamma * act(x @ weight.T + bias)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")


def activate(x: torch.Tensor, act: str) -> torch.Tensor:
    """The activations that ops fuse: "none", "relu", "gelu" (exact, by erf), "gelu_tanh"."""
    if act == "relu":
        return F.relu(x)
    if act == "gelu":
        return F.gelu(x)
    if act == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return x


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    act: str = "none",
) -> torch.Tensor:
    y = activate(F.linear(x, weight, bias), act)
    if gamma is not None:
        y = y * gamma
    return y if residual is None else residual + y
