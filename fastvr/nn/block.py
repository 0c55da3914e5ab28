"""A transformer block: attention and MLP, each with norm, LayerScale, stochastic depth and residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvr.nn.attention import Attention
from fastvr.nn.glu import GluMlp
from fastvr.nn.mlp import Mlp
from fastvr.nn.plain import DrawScale, drawn, idle, layer_norm, plain, plain_norm
from fastvr.ops.transformer_block import transformer_block
from fastvr.reference.linear import scale_samples


class LayerScale(nn.Module):
    """``x * gamma``, a learnt scale a channel (Touvron et al., 2021)."""

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training a sample's branch is zero with ``drop_prob``, and
    the others are scaled so that the mean stays. A seed drops the samples that timm's DropPath drops."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scale_samples(x, self.sample_scale(x))

    def sample_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """What x's samples are multiplied by, drawn anew: [x.shape[0]], float32 (float64 for float64); None
        where nothing is dropped."""
        if not self.training or self.drop_prob == 0:
            return None
        keep_prob, dtype = 1 - self.drop_prob, torch.promote_types(x.dtype, torch.float32)
        keep = x.new_empty(x.shape[0], dtype=dtype).bernoulli_(keep_prob)
        return keep.div_(keep_prob) if keep_prob > 0 else keep

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


class Block(nn.Module):
    """A transformer block with timm's names.

    Pre-norm (``norm_first``): ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``. Post-norm:
    ``norm1(x + attn(x))``, then ``norm2(x + mlp(x))``, as ``nn.TransformerEncoderLayer`` has it by default.
    Where nothing inside is observed or replaced, a pre-norm block is six launches, with dropout in training
    too where kernels run.

    Args:
        dim: width of the tokens.
        num_heads: number of heads.
        mlp_ratio: the MLP's hidden width over ``dim``.
        qkv_bias: whether query, key and value have a bias.
        qk_norm: whether queries and keys are normalised, each head by itself.
        init_values: LayerScale's first value; None for no LayerScale.
        proj_drop, attn_drop, drop_path: dropout of the branches, of the attention weights, of whole branches.
        act: the MLP's activation, "gelu", "gelu_tanh", "quick_gelu" or "relu"; "swiglu" for a gated one,
            whose ``mlp_ratio`` counts both halves.
        norm_first: pre-norm or post-norm.
        norm_eps: LayerNorm's eps.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act: str = "gelu",
        norm_first: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1: nn.Module = nn.LayerNorm(dim, eps=norm_eps)
        self.attn: nn.Module = Attention(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_eps=norm_eps,
        )
        self.ls1: nn.Module = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path1: nn.Module = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2: nn.Module = nn.LayerNorm(dim, eps=norm_eps)
        hidden = int(dim * mlp_ratio)
        self.mlp: nn.Module = (
            GluMlp(dim, hidden, drop=proj_drop)
            if act == "swiglu"
            else Mlp(dim, hidden, act=act, drop=proj_drop)
        )
        self.ls2: nn.Module = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path2: nn.Module = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, D] to [B, N, D]."""
        if self.norm_first:
            if (halves := self._halves(x)) is not None:
                for half, drop_path in zip(halves, (self.drop_path1, self.drop_path2), strict=True):
                    half["sample_scale"] = drawn(_draws(drop_path), x)
                return transformer_block(x, *halves)
            x = _branch(self.attn, x, self.norm1, self.ls1, self.drop_path1)
            return _branch(self.mlp, x, self.norm2, self.ls2, self.drop_path2)
        x = layer_norm(self.norm1, _branch(self.attn, x, None, self.ls1, self.drop_path1))
        return layer_norm(self.norm2, _branch(self.mlp, x, None, self.ls2, self.drop_path2))

    def _halves(self, x: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The arguments of both halves but sample_scale, where they may run as one op: nothing inside is
        observed, replaced, or drops by PyTorch's random numbers but whole branches."""
        attn, mlp = self.attn, self.mlp
        if not (
            plain(attn, Attention)
            and plain(mlp, Mlp)
            and all(plain(scale, LayerScale) or plain(scale, nn.Identity) for scale in (self.ls1, self.ls2))
            and all(_known(drop_path) for drop_path in (self.drop_path1, self.drop_path2))
        ):
            return None
        first = attn.fused(self.norm1, _gamma(self.ls1), x)
        second = mlp.fused(self.norm2, _gamma(self.ls2), x)
        return None if first is None or second is None else (first, second)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """``block(x)[:, 0]``, [B, N, D] to [B, D]: where only the class token is read.

        Every token's keys and values are needed, but only this one's query, projection and MLP. Where
        something inside is observed or replaced, attention weights are dropped, or others are by PyTorch's
        random numbers (which would not be the same, but for whole branches), the whole block runs.
        """
        attn, mlp = self.attn, self.mlp
        if not (
            plain(self, Block)
            and isinstance(attn, Attention)
            and isinstance(mlp, (Mlp, GluMlp))
            and attn.separable(x)
            and mlp.separable(x)
            and all(plain_norm(norm) for norm in (self.norm1, self.norm2))
            and all(plain(scale, LayerScale) or plain(scale, nn.Identity) for scale in (self.ls1, self.ls2))
            and all(_known(drop_path) for drop_path in (self.drop_path1, self.drop_path2))
        ):
            y: torch.Tensor = self(x)
            return y[:, 0]
        first, drop_paths = x[:, 0], [_draws(drop_path) for drop_path in (self.drop_path1, self.drop_path2)]
        if self.norm_first:
            x = layer_norm(self.norm1, x, for_matmul=True)
            first = attn.first(x, _gamma(self.ls1), first, drop_paths[0])
            return mlp.branch(first, self.norm2, _gamma(self.ls2), first, drop_paths[1])
        first = layer_norm(self.norm1, attn.first(x, _gamma(self.ls1), first, drop_paths[0]))
        return layer_norm(self.norm2, mlp.branch(first, None, _gamma(self.ls2), first, drop_paths[1]))


def _branch(
    module: nn.Module, x: torch.Tensor, norm: nn.Module | None, scale: nn.Module, drop_path: nn.Module
) -> torch.Tensor:
    """``x + drop_path(scale(module(norm(x))))``."""
    gamma = _gamma(scale)
    scaled = gamma is not None or plain(scale, nn.Identity)
    if scaled and (plain(module, Attention) or plain(module, Mlp) or plain(module, GluMlp)):
        if _known(drop_path):
            return module.branch(x, norm, gamma, x, _draws(drop_path))
        y = module.branch(x, norm, gamma)
    else:
        y = scale(module(x if norm is None else layer_norm(norm, x)))
    dropped: torch.Tensor = drop_path(y)
    return x + dropped


def _gamma(scale: nn.Module) -> torch.Tensor | None:
    return scale.gamma if plain(scale, LayerScale) else None


def _known(drop_path: nn.Module) -> bool:
    """Whether ``drop_path`` multiplies samples or does nothing, and nobody observes it."""
    return plain(drop_path, DropPath) or idle(drop_path)


def _draws(drop_path: nn.Module) -> DrawScale | None:
    return drop_path.sample_scale if isinstance(drop_path, DropPath) else None
