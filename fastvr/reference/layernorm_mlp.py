"""A transformer's MLP with the LayerNorm before it and the residual addition behind it."""

from __future__ import annotations

import torch

from fastvr.reference.dropout import dropout
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
    hidden_dropout_p: float = 0.0,
    hidden_seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    normed = layer_norm(x, ln_weight, ln_bias, eps, fc1_weight.dtype)
    hidden = linear(normed, fc1_weight, fc1_bias, act=act, dropout_p=hidden_dropout_p, seed=hidden_seed)
    drop = (sample_scale, dropout_p, seed)
    return linear(hidden, fc2_weight, fc2_bias, gamma, residual, "none", *drop)


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
    hidden_dropout_p: float = 0.0,
    hidden_seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, what the activation is given, [rows, hidden], and the LayerNorm's ``row_moments``."""
    normed = layer_norm(x, ln_weight, ln_bias, eps, fc1_weight.dtype)
    hidden = linear(normed, fc1_weight, fc1_bias)
    activated = activate(hidden.clone(), act)
    if hidden_seed is not None:
        activated = dropout(activated, hidden_dropout_p, hidden_seed)
    drop = (sample_scale, dropout_p, seed)
    y = linear(activated, fc2_weight, fc2_bias, gamma, residual, "none", *drop)
    return y, hidden.reshape(-1, hidden.shape[-1]), row_moments(x, eps)
