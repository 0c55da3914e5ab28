"""Vision Transformers (Dosovitskiy et al., 2021) with timm's names and methods."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastvr.models._arguments import check_integers, check_numbers, check_rates
from fastvr.models._model import check_image
from fastvr.models._other_names import VIT_ABSENT, VIT_NAMES
from fastvr.models.positions import image_and_patch, resample
from fastvr.models.vit_features import ViTFeatures
from fastvr.nn.attention_pool import AttentionPoolLatent
from fastvr.nn.block import Block
from fastvr.nn.head import classify_tokens, pool_tokens
from fastvr.nn.mlp import ACTIVATIONS
from fastvr.nn.patch_embed import PatchEmbed, add_tokens
from fastvr.nn.plain import layer_norm, plain, plain_norm
from fastvr.reference.image import normalize

_POOLS = ("token", "avg", "map", "")


class ViT(ViTFeatures):
    """A Vision Transformer; the state-dict keys are those of timm's ``VisionTransformer``.

    ``norm_first=False, act="relu", norm_eps=1e-5`` is the kind that a plain ``nn.TransformerEncoder`` makes.

    Args:
        img_size: height and width of the images, one number or a pair.
        patch_size: height and width of a patch. What is left of ``img_size`` to the right and below is not
            read (SigLIP's 384 pixels in patches of 14).
        in_chans: channels of the images.
        num_classes: logits; 0 for none (the head is an identity).
        embed_dim: width of the tokens, a multiple of ``num_heads``.
        depth: number of blocks.
        num_heads: heads of each attention.
        mlp_ratio: the MLP's hidden width over ``embed_dim``; with "swiglu" that of both halves together.
        qkv_bias: whether query, key and value have a bias.
        qk_norm: whether queries and keys are normalised, each head by itself.
        init_values: first value of LayerScale; None for no LayerScale.
        global_pool: what the head reads: the class token ("token"), the mean of the patches ("avg"), what a
            learnt query reads of the patches ("map", SigLIP), or every token ("").
        class_token: whether there is one.
        reg_tokens: number of register tokens (Darcet et al., 2024).
        no_embed_class: whether positions are for patches only.
        fc_norm: whether the last norm follows the pooling instead of preceding it; None: where that is "avg".
        final_norm: whether there is a last norm at all.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, of the embedded
            tokens, of the blocks' branches, of the attention weights.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        norm_first: pre-norm or post-norm blocks.
        act: "gelu" (exact, by erf), "gelu_tanh", "quick_gelu" (``x * sigmoid(1.702 * x)``), "relu", or
            "swiglu" for a gated MLP (DINOv2's giant).
        norm_eps: LayerNorm's eps.
        pre_norm: a norm of the embedded tokens, whose convolution then has no bias (CLIP).
        dynamic_img_size: take images of every size that ``patch_size`` divides, with the positions resampled.

    Raises:
        ValueError: values that do not fit together; the message names the argument.
    """

    other_names, absent = VIT_NAMES, VIT_ABSENT

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        global_pool: str = "token",
        class_token: bool = True,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        fc_norm: bool | None = None,
        final_norm: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_first: bool = True,
        act: str = "gelu",
        norm_eps: float = 1e-6,
        pre_norm: bool = False,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        image, patch = image_and_patch(img_size, patch_size)
        check_integers("ViT", in_chans=(in_chans, 1), num_classes=(num_classes, 0), depth=(depth, 0))
        check_integers("ViT", embed_dim=(embed_dim, 1), num_heads=(num_heads, 1), reg_tokens=(reg_tokens, 0))
        check_numbers("ViT", norm_eps=norm_eps, mlp_ratio=mlp_ratio)
        check_rates("ViT", drop_rate=drop_rate, pos_drop_rate=pos_drop_rate, proj_drop_rate=proj_drop_rate)
        check_rates("ViT", attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        if embed_dim % num_heads:
            raise ValueError(f"ViT: embed_dim must be a multiple of num_heads {num_heads}; got {embed_dim}")
        if int(embed_dim * mlp_ratio) < 1:
            raise ValueError(f"ViT: mlp_ratio must leave embed_dim {embed_dim} some width; got {mlp_ratio}")
        if init_values is not None and not isinstance(init_values, Real):
            raise ValueError(f"ViT: init_values must be a number or None; got {init_values!r}")
        _check_pool(global_pool, class_token)
        if act != "swiglu" and act not in ACTIVATIONS:
            names = ", ".join(map(repr, (*ACTIVATIONS, "swiglu")))
            raise ValueError(f"ViT: act must be one of {names}; got {act!r}")
        if global_pool == "map" and act == "swiglu":
            raise ValueError("ViT: act must be that of a plain MLP with global_pool='map'; got 'swiglu'")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.has_class_token = class_token
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.no_embed_class = no_embed_class
        self.dynamic_img_size = dynamic_img_size

        self.patch_embed: nn.Module = PatchEmbed(image, patch, in_chans, embed_dim, bias=not pre_norm)
        self.img_size, self.patch_size = image, patch
        self.grid_size: tuple[int, int] = self.patch_embed.grid_size
        tokens = self.patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim))
        self.pos_drop: nn.Module = nn.Dropout(pos_drop_rate)
        self.norm_pre: nn.Module = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()
        self.blocks: nn.Module = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                    act=act,
                    norm_first=norm_first,
                    norm_eps=norm_eps,
                )
                for i in range(depth)
            )
        )
        after_pool = global_pool == "avg" if fc_norm is None else fc_norm
        before_pool, after_pool = final_norm and not after_pool, final_norm and after_pool
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=norm_eps) if before_pool else nn.Identity()
        self.attn_pool: nn.Module | None = None
        if global_pool == "map":
            self.attn_pool = AttentionPoolLatent(embed_dim, num_heads, mlp_ratio, act=act, norm_eps=norm_eps)
        self.fc_norm: nn.Module = nn.LayerNorm(embed_dim, eps=norm_eps) if after_pool else nn.Identity()
        self.head_drop: nn.Module = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        # timm's: the convolution and the norms keep PyTorch's own
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images.

        With ``global_pool="token"`` the last block computes for the class token alone, also in training,
        unless something inside it is observed, replaced or dropping (where kernels drop, attention weights).

        Args:
            x: [B, in_chans, height, width], in the weights' dtype and on their device, or uint8 after
                :meth:`normalize_images`; of ``img_size``, or with ``dynamic_img_size`` of any multiple of
                ``patch_size``.

        Returns:
            [B, num_classes]; with ``global_pool=""`` [B, tokens, num_classes].

        Raises:
            ValueError: x's rank, size, dtype or device.
        """
        if self.global_pool == "token" and (plain_norm(self.norm) or plain(self.norm, nn.Identity)):
            # what the last block and the norm make of the other tokens would be thrown away
            x = self._encode_class_token(x)
            return self._classify(layer_norm(self.norm, x, for_matmul=plain(self.head, nn.Linear)))
        return self.forward_head(layer_norm(self.norm, self._encode(x)))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens after the last norm, [B, tokens, embed_dim]; ``x`` as for :meth:`forward`."""
        return layer_norm(self.norm, self._encode(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits of what :meth:`forward_features` gave; with ``pre_logits`` the features before the head."""
        return self._classify(self._pool(x), pre_logits)

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes`` (0: an identity); ``global_pool`` None leaves the pooling.

        The last norm stays where it was built, before or after the pooling.
        """
        if num_classes < 0:
            raise ValueError(f"ViT: num_classes must be at least 0; got {num_classes}")
        if global_pool is not None:
            _check_pool(global_pool, self.has_class_token)
            if global_pool == "map" and self.attn_pool is None:
                raise ValueError(
                    "ViT: global_pool must be 'map' from the start to have its weights; got 'map'"
                )
            if global_pool != "map":
                self.attn_pool = None
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.pos_embed
        if num_classes:
            self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            init_linear(self.head)
        else:
            self.head = nn.Identity()
        self.head.train(self.training)
        self.changed()

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Take images of another size, or cut them into other patches; timm's method.

        Positions are resampled (bicubic, antialiased, in float32), the embedding's weight by the
        pseudo-inverse of such a resize. Both are then new parameters, of which no optimiser knows.

        Args:
            img_size, patch_size: one number or (height, width); None leaves it.

        Raises:
            ValueError: sizes that do not fit; the model stays as it was.
        """
        image, patch = image_and_patch(
            self.img_size if img_size is None else img_size,
            self.patch_size if patch_size is None else patch_size,
        )
        embed = self.patch_embed
        if not isinstance(embed, PatchEmbed):
            kind = type(embed).__name__
            raise ValueError(f"ViT: patch_embed must be a PatchEmbed to take another size; got {kind}")
        embed.set_input_size(image, patch)
        if embed.grid_size != self.grid_size:
            embedded = 0 if self.no_embed_class else self.num_prefix_tokens
            positions = resample(self.pos_embed.detach(), self.grid_size, embed.grid_size, embedded)
            self.pos_embed = nn.Parameter(positions, requires_grad=self.pos_embed.requires_grad)
        self.img_size, self.patch_size, self.grid_size = image, patch, embed.grid_size
        if self.preprocessing is not None and image[0] == image[1]:
            self.preprocessing = self.preprocessing.at(image[0])
        self.changed()

    def check_image(self, x: torch.Tensor) -> torch.dtype:
        """Raise a ValueError where ``x`` is no image for this model; the dtype that it is embedded in."""
        embed = self.patch_embed
        size: tuple[int, int] = self.img_size
        if self.dynamic_img_size and isinstance(x, torch.Tensor) and x.dim() == 4 and x.numel():
            size = (x.shape[2], x.shape[3])
            if any(side % patch for side, patch in zip(size, self.patch_size, strict=True)):
                raise ValueError(f"ViT: x must be a multiple of patch_size {self.patch_size}; got {size}")
        return check_image(self, x, size, getattr(embed, "proj", embed))

    def prefix_parameters(self) -> list[nn.Parameter]:
        """The tokens in front of the patches, each [1, n, embed_dim], in their order."""
        return [token for token in (self.cls_token, self.reg_token) if token is not None]

    def embedding(self, grid: tuple[int, int] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(positions [1, tokens, embed_dim], prefix tokens [P, embed_dim] or None), as ``patch_embed`` adds
        and prepends them; ``grid`` (rows, columns) of patches, None that of ``img_size``."""
        given = [token.view(-1, self.embed_dim) for token in self.prefix_parameters()]
        prefix = None if not given else given[0] if len(given) == 1 else torch.cat(given)
        pos_embed: torch.Tensor = self.pos_embed
        if grid is not None:
            embedded = 0 if self.no_embed_class else self.num_prefix_tokens
            pos_embed = resample(pos_embed, self.grid_size, grid, embedded)
        if self.no_embed_class and self.num_prefix_tokens:
            pos_embed = F.pad(pos_embed, (0, 0, self.num_prefix_tokens, 0))
        return pos_embed, prefix

    def _grid(self, x: torch.Tensor) -> tuple[int, int]:
        """(rows, columns) of the patches of images ``x``."""
        if not self.dynamic_img_size:
            return self.grid_size
        return x.shape[2] // self.patch_size[0], x.shape[3] // self.patch_size[1]

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        embed = self.patch_embed
        dtype = self.check_image(x)
        moments = self.image_moments(x, dtype)
        pos_embed, prefix = self.embedding(self._grid(x))
        if plain(embed, PatchEmbed):
            x = embed.tokens(x, pos_embed, prefix, *moments, dtype)
        else:
            x = add_tokens(embed(normalize(x, *moments, dtype)), pos_embed, prefix)
        return layer_norm(self.norm_pre, self.pos_drop(x))

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(self._embed(x))

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.grad_checkpointing and plain(self.blocks, nn.Sequential)):
            y: torch.Tensor = self.blocks(x)
            return y
        for block in self.blocks:
            x = self.run_block(block, x, block)
        return x

    def _encode_class_token(self, x: torch.Tensor) -> torch.Tensor:
        """``_encode(x)[:, 0]``."""
        x = self._embed(x)
        blocks = list(self.blocks.children()) if plain(self.blocks, nn.Sequential) else []
        if not blocks or not plain(blocks[-1], Block):
            return self._run(x)[:, 0]
        for block in blocks[:-1]:
            x = self.run_block(block, x, block)
        return self.run_block(blocks[-1].first, x, blocks[-1])

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        if self.attn_pool is None:
            return pool_tokens(x, self.global_pool, self.num_prefix_tokens)
        pooled: torch.Tensor = self.attn_pool(x[:, self.num_prefix_tokens :])
        return pooled

    def _classify(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.head_drop(layer_norm(self.fc_norm, x))
        return x if pre_logits else classify_tokens(self.head, x)


def _check_pool(global_pool: str, class_token: bool) -> None:
    if global_pool not in _POOLS:
        raise ValueError(f"ViT: global_pool must be 'token', 'avg', 'map' or ''; got {global_pool!r}")
    if global_pool == "token" and not class_token:
        raise ValueError("ViT: global_pool must be 'avg', 'map' or '' without a class token; got 'token'")


def init_linear(module: nn.Linear) -> None:
    nn.init.trunc_normal_(module.weight, std=0.02)
    # the stub says Parameter, but bias=False leaves None
    bias: torch.Tensor | None = module.bias
    if bias is not None:
        nn.init.zeros_(bias)


# one configuration under its short name; the registry has those of timm's names
PRESETS: dict[str, dict[str, int]] = {
    "vit_tiny": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_huge": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}


def _preset(name: str, overrides: dict[str, Any]) -> ViT:
    return ViT(**{**PRESETS[name], **overrides})


def vit_tiny(**overrides: Any) -> ViT:
    """ViT-Ti/16 at 224 pixels: width 192, 12 blocks, 3 heads. ``overrides`` as :class:`ViT` takes them."""
    return _preset("vit_tiny", overrides)


def vit_small(**overrides: Any) -> ViT:
    """ViT-S/16 at 224 pixels: width 384, 12 blocks, 6 heads."""
    return _preset("vit_small", overrides)


def vit_base(**overrides: Any) -> ViT:
    """ViT-B/16 at 224 pixels: width 768, 12 blocks, 12 heads."""
    return _preset("vit_base", overrides)


def vit_large(**overrides: Any) -> ViT:
    """ViT-L/16 at 224 pixels: width 1024, 24 blocks, 16 heads."""
    return _preset("vit_large", overrides)


def vit_huge(**overrides: Any) -> ViT:
    """ViT-H/14 at 224 pixels: width 1280, 32 blocks, 16 heads."""
    return _preset("vit_huge", overrides)
