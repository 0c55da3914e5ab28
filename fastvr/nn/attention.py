"""Multi-head self-attention (Vaswani et al., 2017) with packed query, key and value."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvr.nn.plain import DrawScale, drawn, idle, join, layer_norm, linear, plain, plain_norm
from fastvr.ops.attention import attention, attention_kv
from fastvr.ops.layernorm_attention import layernorm_attention, trains
from fastvr.ops.linear import linear as linear_op


class Attention(nn.Module):
    """Self-attention with timm's names.

    Args:
        dim: width of the tokens, a multiple of ``num_heads``.
        num_heads: number of heads.
        qkv_bias: whether query, key and value have a bias.
        qk_norm: whether queries and keys are normalised, each head by itself (Dehghani et al., 2023).
        attn_drop: dropout of the attention weights. A hook on this module sees them, [B, heads, N, N].
        proj_drop: dropout of the result.
        norm_eps: eps of the norms of queries and keys.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"Attention: num_heads must divide dim, which is {dim}; got {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv: nn.Module = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.LayerNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.attn_drop: nn.Module = nn.Dropout(attn_drop)
        self.proj: nn.Module = nn.Linear(dim, dim)
        self.proj_drop: nn.Module = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, D] to [B, N, D]."""
        return self.branch(x)

    def branch(
        self,
        x: torch.Tensor,
        norm: nn.Module | None = None,
        gamma: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        drop_path: DrawScale | None = None,
    ) -> torch.Tensor:
        """``residual + drop_path(gamma * attention(norm(x)))``, in as few launches as the modules' state
        allows."""
        if norm is not None and (fused := self.fused(norm, gamma, x)) is not None:
            return layernorm_attention(x, **fused, residual=residual, sample_scale=drawn(drop_path, x))
        if norm is not None:
            x = layer_norm(norm, x, for_matmul=plain(self.qkv, nn.Linear))
        y, proj = self._attend(linear(self.qkv, x)), self.proj
        if plain(proj, nn.Linear) and idle(self.proj_drop):
            scale = drawn(drop_path, y)
            return linear_op(y, proj.weight, proj.bias, gamma=gamma, residual=residual, sample_scale=scale)
        y = self.proj_drop(linear(proj, y))
        return join(y, gamma, residual, drawn(drop_path, y))

    def fused(self, norm: nn.Module, gamma: torch.Tensor | None, x: torch.Tensor) -> dict[str, Any] | None:
        """The arguments of :func:`layernorm_attention` but x, residual and sample_scale, or None where a
        module is observed, replaced, or drops by PyTorch's random numbers."""
        to_qkv, proj, dropout_p = self.qkv, self.proj, self._dropout_p()
        if not (plain_norm(norm) and self._known()) or dropout_p is None:
            return None
        assert plain(to_qkv, nn.Linear)
        assert plain(proj, nn.Linear)
        found = {
            "ln_weight": norm.weight,
            "ln_bias": norm.bias,
            "qkv_weight": to_qkv.weight,
            "qkv_bias": to_qkv.bias,
            "proj_weight": proj.weight,
            "proj_bias": proj.bias,
            "num_heads": self.num_heads,
            "scale": self.scale,
            "eps": norm.eps,
            "gamma": gamma,
            "dropout_p": dropout_p,
        }
        return found if dropout_p == 0 or trains(x, **found) else None

    def separable(self) -> bool:
        """Whether :meth:`first` gives what a call would: nothing inside is observed, replaced or dropping."""
        return self._known() and idle(self.attn_drop)

    def _known(self) -> bool:
        """Whether nothing but ``attn_drop`` is observed, replaced or dropping."""
        return (
            plain(self, Attention)
            and plain(self.qkv, nn.Linear)
            and plain(self.proj, nn.Linear)
            and self.plain_heads()
            and idle(self.proj_drop)
        )

    def plain_heads(self) -> bool:
        """Whether nothing normalises, nor observes, queries and keys."""
        return plain(self.q_norm, nn.Identity) and plain(self.k_norm, nn.Identity)

    def first(
        self,
        x: torch.Tensor,
        gamma: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        drop_path: DrawScale | None = None,
    ) -> torch.Tensor:
        """``residual + drop_path(gamma * attention(x))`` of each sample's first token alone: [B, N, D]
        to [B, D]."""
        qkv, proj = self.qkv, self.proj
        assert plain(qkv, nn.Linear)
        assert plain(proj, nn.Linear)
        dim = proj.in_features
        # split, and not slices: their gradients would each be padded to the whole
        q_weight, kv_weight = qkv.weight.split([dim, 2 * dim])
        q_bias, kv_bias = (None, None) if qkv.bias is None else qkv.bias.split([dim, 2 * dim])
        # of rows, not of samples with one: PyTorch would add the bias in a launch of its own
        q = linear_op(x[:, 0], q_weight, q_bias)[:, None]
        y = attention_kv(q, linear_op(x, kv_weight, kv_bias), self.num_heads, scale=self.scale)
        scale = drawn(drop_path, x)
        return linear_op(y[:, 0], proj.weight, proj.bias, gamma=gamma, residual=residual, sample_scale=scale)

    def _dropout_p(self) -> float | None:
        """With which probability attention weights are dropped, or None where somebody wants to see them."""
        if plain(self.attn_drop, nn.Dropout):
            return self.attn_drop.p if self.attn_drop.training else 0.0
        return 0.0 if idle(self.attn_drop) else None

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """[B, N, 3 * D] to [B, N, D]."""
        dropout_p = self._dropout_p()
        if self.plain_heads() and dropout_p is not None:
            return attention(qkv, self.num_heads, scale=self.scale, dropout_p=dropout_p)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k = (layer_norm(norm, x, for_matmul=True) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        if dropout_p is None:
            return self._observed(*(x.transpose(1, 2) for x in (q, k, v)))
        if dropout_p == 0:
            kv = torch.cat([k.flatten(2), v.flatten(2)], dim=-1)
            return attention_kv(q.flatten(2), kv, self.num_heads, scale=self.scale)
        qkv = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1)
        return attention(qkv, self.num_heads, scale=self.scale, dropout_p=dropout_p)

    def _observed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention whose weights are read by a hook or a module in ``attn_drop``'s place; of
        [B, heads, N, head_dim] each."""
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        y: torch.Tensor = self.attn_drop(weights) @ v
        return y.transpose(1, 2).flatten(2)
