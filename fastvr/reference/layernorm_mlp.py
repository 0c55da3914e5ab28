"""A transformer's MLP with the LayerNorm before it and the residual addition behind it."""

from __future__ import annotations

import torch

from fastvr.reference.layer_norm import layer_norm, row_moments
from fastvr.reference.linear import activate, linear


def layernorm_mlp(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    act: str = "gelu",
    sample_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    normed = layer_norm(x, ln_weight, ln_bias, eps, fc1_weight.dtype)
    hidden = linear(normed, fc1_weight, fc1_bias, act=act)
    return linear(hidden, fc2_weight, fc2_bias, gamma, residual, sample_scale=sample_scale)


def layernorm_mlp_training(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    act: str = "gelu",
    sample_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, what the activation is given, [rows, hidden], and the LayerNorm's ``row_moments``."""
    normed = layer_norm(x, ln_weight, ln_bias, eps, fc1_weight.dtype)
    hidden = linear(normed, fc1_weight, fc1_bias)
    activated = activate(hidden.clone(), act)
    y = linear(activated, fc2_weight, fc2_bias, gamma, residual, sample_scale=sample_scale)
    return y, hidden.reshape(-1, hidden.shape[-1]), row_moments(x, eps)
