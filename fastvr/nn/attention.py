"""Multi-head self-attention (Vaswani et al., 2017) with packed query, key and value."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from fastvr.nn.plain import (
    DrawScale,
    drawn,
    drop_rate,
    dropped_linear,
    drops_apart,
    idle,
    layer_norm,
    linear,
    plain,
    plain_norm,
)
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

    kernels_drop: ClassVar[bool] = True
    """Whether ``proj_drop`` may be the kernels', with random numbers of theirs."""

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
        return self._project(self._attend(linear(self.qkv, x)), gamma, residual, drop_path)

    def _project(
        self,
        y: torch.Tensor,
        gamma: torch.Tensor | None,
        residual: torch.Tensor | None,
        drop_path: DrawScale | None,
    ) -> torch.Tensor:
        return dropped_linear(
            self.proj,
            self.proj_drop,
            y,
            gamma=gamma,
            residual=residual,
            drop_path=drop_path,
            by_kernels=self.kernels_drop,
        )

    def fused(self, norm: nn.Module, gamma: torch.Tensor | None, x: torch.Tensor) -> dict[str, Any] | None:
        """The arguments of :func:`layernorm_attention` but x, residual and sample_scale, or None where a
        module is observed, replaced, or drops by PyTorch's random numbers."""
        to_qkv, proj, dropout_p = self.qkv, self.proj, drop_rate(self.attn_drop)
        proj_dropout_p = drop_rate(self.proj_drop, by_kernels=self.kernels_drop)
        if not (plain_norm(norm) and self._known()) or dropout_p is None or proj_dropout_p is None:
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
            "proj_dropout_p": proj_dropout_p,
        }
        return found if dropout_p == proj_dropout_p == 0 or trains(x, **found) else None

    def separable(self, x: torch.Tensor) -> bool:
        """Whether :meth:`first` gives what a call would: nothing inside is observed or replaced, nor drops by
        PyTorch's random numbers."""
        drop = self.proj_drop
        return self._known() and idle(self.attn_drop) and drops_apart(drop, x, by_kernels=self.kernels_drop)

    def _known(self) -> bool:
        """Whether nothing but dropout is observed or replaced."""
        return (
            plain(self, Attention)
            and plain(self.qkv, nn.Linear)
            and plain(self.proj, nn.Linear)
            and self.plain_heads()
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
        qkv = self.qkv
        assert plain(qkv, nn.Linear)
        dim = qkv.in_features
        # split, and not slices: their gradients would each be padded to the whole
        q_weight, kv_weight = qkv.weight.split([dim, 2 * dim])
        q_bias, kv_bias = (None, None) if qkv.bias is None else qkv.bias.split([dim, 2 * dim])
        # of rows, not of samples with one: PyTorch would add the bias in a launch of its own
        q = linear_op(x[:, 0], q_weight, q_bias)[:, None]
        y = attention_kv(q, linear_op(x, kv_weight, kv_bias), self.num_heads, scale=self.scale)
        return self._project(y[:, 0], gamma, residual, drop_path)

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """[B, N, 3 * D] to [B, N, D]."""
        dropout_p = drop_rate(self.attn_drop)
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
