"""A transformer's attention with the LayerNorm before it, both projections and the residual addition."""

from __future__ import annotations

import torch

from fastvr.reference.attention import attention, attention_training
from fastvr.reference.layer_norm import layer_norm, row_moments
from fastvr.reference.linear import linear


def layernorm_attention(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    num_heads: int,
    scale: float,
    eps: float,
    sample_scale: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    proj_dropout_p: float = 0.0,
    proj_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    normed = layer_norm(x, ln_weight, ln_bias, eps, qkv_weight.dtype)
    attended = attention(linear(normed, qkv_weight, qkv_bias), num_heads, scale, dropout_p, seed)
    drop = (sample_scale, proj_dropout_p, proj_seed)
    return linear(attended, proj_weight, proj_bias, gamma, residual, "none", *drop)


def layernorm_attention_training(
    x: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor | None,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    num_heads: int,
    scale: float,
    eps: float,
    sample_scale: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    proj_dropout_p: float = 0.0,
    proj_seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result, qkv, what attention gives with its log-sum-exp, and the LayerNorm's ``row_moments``."""
    qkv = linear(layer_norm(x, ln_weight, ln_bias, eps, qkv_weight.dtype), qkv_weight, qkv_bias)
    attended, lse = attention_training(qkv, num_heads, scale, dropout_p, seed)
    drop = (sample_scale, proj_dropout_p, proj_seed)
    y = linear(attended, proj_weight, proj_bias, gamma, residual, "none", *drop)
    return y, qkv, attended.contiguous(), lse, row_moments(x, eps)
