"""Attention pooling (Lee et al., 2019; SigLIP, Zhai et al., 2023): a learnt query reads all patches."""

from __future__ import annotations

import torch
from torch import nn

from fastvr.nn.mlp import Mlp
from fastvr.nn.plain import layer_norm, linear, plain
from fastvr.ops.attention import attention_kv


class AttentionPoolLatent(nn.Module):
    """One vector of all tokens, ``y + mlp(norm(y))`` of what a learnt query attends to, with timm's names.

    Args:
        dim: width of the tokens, a multiple of ``num_heads``.
        num_heads: number of heads.
        mlp_ratio: the MLP's hidden width over ``dim``.
        act: the MLP's activation, as :class:`fastvr.nn.mlp.Mlp` has them.
        norm_eps: LayerNorm's eps.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, *, act: str = "gelu", norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"AttentionPoolLatent: num_heads must divide dim, which is {dim}; got {num_heads}"
            )
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q: nn.Module = nn.Linear(dim, dim)
        self.kv: nn.Module = nn.Linear(dim, 2 * dim)
        self.proj: nn.Module = nn.Linear(dim, dim)
        self.norm: nn.Module = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp: nn.Module = Mlp(dim, int(dim * mlp_ratio), act=act)
        # timm's: normal, cut at two deviations
        std = float(dim) ** -0.5
        nn.init.trunc_normal_(self.latent, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, D] to [B, D], in six launches where nothing inside is observed or replaced."""
        y, mlp = self.attended(x), self.mlp
        if plain(mlp, Mlp):
            return mlp.branch(y, self.norm, residual=y)
        z: torch.Tensor = mlp(layer_norm(self.norm, y))
        return y + z

    def attended(self, x: torch.Tensor) -> torch.Tensor:
        """What comes before norm and MLP, [B, N, D] to [B, D]."""
        # the query is the same for every sample
        q = linear(self.q, self.latent)
        kv = linear(self.kv, x)
        y = attention_kv(q.expand(x.shape[0], -1, -1), kv, self.num_heads, scale=self.scale)
        return linear(self.proj, y[:, 0])
