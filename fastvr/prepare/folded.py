"""A ViT whose LayerNorms are folded into the matrix products that read them: five launches a layer.

``LN(x) @ W.T + b = rstd * (x @ W'.T - mean * colsum(W')) + b'`` with ``W' = W * ln_weight`` and
``b' = b + W @ ln_bias``: the product reads x as it lies in memory, and mean and rstd of its rows come out of
the epilogue of the launch that wrote x. Only for 16-bit weights: in float32 the difference of the two large
terms costs digits.
"""

from __future__ import annotations

import torch
from torch import nn

from fastvr import backend
from fastvr.models.vit import ViT
from fastvr.nn.attention import Attention
from fastvr.nn.block import Block, LayerScale
from fastvr.nn.mlp import Mlp, fused_name
from fastvr.nn.patch_embed import PatchEmbed
from fastvr.nn.plain import idle, layer_norm, plain, plain_norm
from fastvr.ops.attention import attention, attention_kv
from fastvr.ops.linear_stats import linear_stats
from fastvr.ops.norm_linear import fold_norm, norm_linear
from fastvr.ops.patch_embed_stats import patch_embed_stats


def foldable(model: nn.Module) -> bool:
    """Whether ``model`` is a ViT that nobody changed, pre-norm, in a 16-bit dtype."""
    if not plain(model, ViT) or not idle(model.pos_drop) or model.dynamic_img_size:
        return False
    if not plain(model.norm_pre, nn.Identity):
        return False
    if not plain(model.patch_embed, PatchEmbed) or not model.patch_embed.one_launch():
        return False
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1 or dtypes & {torch.float32, torch.float64}:
        return False
    if not plain(model.blocks, nn.Sequential) or not len(model.blocks):
        return False
    return all(plain(block, Block) and _foldable_block(block) for block in model.blocks)


def _foldable_block(block: Block) -> bool:
    attn, mlp = block.attn, block.mlp
    return (
        block.norm_first
        and plain_norm(block.norm1)
        and plain_norm(block.norm2)
        and all(plain(scale, LayerScale) or plain(scale, nn.Identity) for scale in (block.ls1, block.ls2))
        and plain(attn, Attention)
        and attn.plain_heads()
        and plain(mlp, Mlp)
        and all(plain(linear, nn.Linear) for linear in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
        and all(idle(drop) for drop in (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2))
        and fused_name(mlp.act) is not None
    )


class FoldedLinear(nn.Module):
    """``linear(norm(x))`` for rows whose statistics are known."""

    weight: torch.Tensor
    colsum: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, norm: nn.LayerNorm, linear: nn.Linear, act: str = "none") -> None:
        super().__init__()
        weight, colsum, bias = fold_norm(norm.weight, norm.bias, linear.weight, linear.bias)
        self.register_buffer("weight", weight)
        self.register_buffer("colsum", colsum)
        self.register_buffer("bias", bias)
        self.eps, self.act = norm.eps, act

    def forward(self, x: torch.Tensor, stats: torch.Tensor, outputs: slice = slice(None)) -> torch.Tensor:
        """[..., in_features] to [..., out_features], or to the features that ``outputs`` names."""
        bias = None if self.bias is None else self.bias[outputs]
        weight, colsum = self.weight[outputs], self.colsum[outputs]
        return norm_linear(x, stats, weight, colsum, bias, eps=self.eps, act=self.act)


class FoldedBlock(nn.Module):
    """A pre-norm block that takes and gives (tokens, their rows' statistics)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        assert isinstance(attn, Attention)
        assert isinstance(mlp, Mlp)
        act = fused_name(mlp.act)
        assert act is not None
        self.num_heads, self.scale = attn.num_heads, attn.scale
        self.qkv = FoldedLinear(block.norm1, attn.qkv)  # type: ignore[arg-type]
        self.proj, self.ls1 = attn.proj, block.ls1
        self.fc1 = FoldedLinear(block.norm2, mlp.fc1, act)  # type: ignore[arg-type]
        self.fc2, self.ls2 = mlp.fc2, block.ls2

    def forward(self, x: torch.Tensor, stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, N, D] and its statistics to the same after the block."""
        y = attention(self.qkv(x, stats), self.num_heads, scale=self.scale)
        return self._rest(y, x)

    def class_token(self, x: torch.Tensor, stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What :meth:`forward` gives for the first token alone, [B, D]."""
        tokens, width = x.shape[1:]
        first = x[:, 0]
        q = self.qkv(first, stats[::tokens], slice(0, width))
        kv = self.qkv(x, stats, slice(width, None))
        y = attention_kv(q[:, None], kv, self.num_heads, scale=self.scale)
        return self._rest(y[:, 0], first)

    def _rest(self, y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, stats = _add(self.proj, self.ls1, y, x)
        return _add(self.fc2, self.ls2, self.fc1(x, stats), x)


def _add(
    linear: nn.Module, scale: nn.Module, y: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + gamma * linear(y)`` and its statistics."""
    assert isinstance(linear, nn.Linear)
    gamma = scale.gamma if isinstance(scale, LayerScale) else None
    return linear_stats(y, linear.weight, linear.bias, gamma=gamma, residual=x)


class FoldedViT(nn.Module):
    """What a :func:`foldable` ViT computes, [B, in_chans, height, width] to logits. It takes the
    model's parts over."""

    pos_embed: torch.Tensor
    prefix_tokens: torch.Tensor | None

    def __init__(self, model: ViT) -> None:
        super().__init__()
        blocks = [block for block in model.blocks.children() if isinstance(block, Block)]
        self.blocks = nn.ModuleList(FoldedBlock(block) for block in blocks)
        pos_embed, prefix = model.embedding()
        self.register_buffer("pos_embed", pos_embed)
        self.register_buffer("prefix_tokens", prefix)
        one_launch = (
            model.global_pool == "token"
            and plain_norm(model.norm)
            and plain(model.fc_norm, nn.Identity)
            and idle(model.head_drop)
            and plain(model.head, nn.Linear)
        )
        self.head = FoldedLinear(model.norm, model.head) if one_launch else None  # type: ignore[arg-type]
        # for what is done once: the check of an image, pooling, a head that is not folded
        self.model = model
        model.blocks = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        model = self.model
        mean, std = model.image_moments(x, model.check_image(x))
        proj = model.patch_embed.proj
        x, stats = patch_embed_stats(
            x,
            proj.weight,  # type: ignore[arg-type, union-attr]
            proj.bias,  # type: ignore[arg-type, union-attr]
            pos_embed=self.pos_embed,
            prefix_tokens=self.prefix_tokens,
            mean=mean,
            std=std,
        )
        token = model.global_pool == "token"
        whole = len(self.blocks) - token
        for block in self.blocks[:whole]:
            x, stats = block(x, stats)
        if not token:
            return model.forward_head(layer_norm(model.norm, x))
        x, stats = self.blocks[whole].class_token(x, stats)  # type: ignore[operator]
        if self.head is not None:
            logits: torch.Tensor = self.head(x, stats)
            return logits
        return model.forward_head(layer_norm(model.norm, x[:, None]))


def folded_if_faster(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """``model``, or where it pays the same folded: always with the kernels forced, by the table otherwise."""
    mode = backend.current_backend()
    if mode == "reference" or not foldable(model) or backend.unavailable(example.device):
        return model
    assert isinstance(model, ViT)
    if mode == "auto" and not _measured_faster(model, example):
        return model
    return FoldedViT(model)


def _measured_faster(model: ViT, example: torch.Tensor) -> bool:
    """Whether the launches of the folded model take less time by the table than those of the plain one."""
    from fastvr.tuner.calls import known_ms, meta_copy

    folded = FoldedViT(meta_copy(model))  # type: ignore[arg-type]
    ours, theirs = known_ms(folded, example, example.device), known_ms(model, example, example.device)
    return ours is not None and theirs is not None and ours < theirs
