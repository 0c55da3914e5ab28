"""y = residual + gamma * act(x @ weight.T + bias)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh")
GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def overwritable(y: torch.Tensor) -> bool:
    """Whether ``y``, which is nobody else's, may be written over; what exporters trace is functional."""
    return type(y) is torch.Tensor


def activate(x: torch.Tensor, act: str) -> torch.Tensor:
    """The activations that ops fuse: "none", "relu", "gelu" (exact, by erf), "gelu_tanh".

    x is nobody else's, and without gradients the result takes its place: on a CPU fresh memory costs more
    than the activation.
    """
    inplace = overwritable(x) and not torch.is_grad_enabled()
    if act == "relu":
        return F.relu(x, inplace=inplace)
    if act in GELU:
        gelu = torch.ops.aten.gelu_ if inplace else F.gelu
        return gelu(x, approximate=GELU[act])
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
    if residual is None:
        return y
    # y is nobody else's either
    if torch.is_grad_enabled() or y.dtype != residual.dtype or not overwritable(y):
        return residual + y
    return y.add_(residual)
