"""A ViT's tokens between its blocks, and its parameters in groups, by timm's methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastvr.models._model import Model
from fastvr.models.features import check_output_fmt, take_indices
from fastvr.nn.plain import layer_norm


class ViTFeatures(Model):
    """What :class:`ViT` gives besides logits."""

    default_out_indices: int | tuple[int, ...] = 3
    _first_conv = "patch_embed.proj"
    _classifier: str | tuple[str, ...] = "head"

    blocks: nn.Module
    norm: nn.Module
    fc_norm: nn.Module
    embed_dim: int
    patch_size: tuple[int, int]
    num_prefix_tokens: int
    reset_classifier: Callable[..., None]
    _embed: Callable[[torch.Tensor], torch.Tensor]
    _grid: Callable[[torch.Tensor], tuple[int, int]]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Of every block its channels, stride and name, as timm's ``FeatureInfo`` takes them."""
        count = len(list(self.blocks.children()))
        reduction = max(self.patch_size)
        return [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": reduction} for i in range(count)
        ]

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """What :meth:`forward_features` gives, and tokens after chosen blocks; timm's method.

        Args:
            x: as for :meth:`forward`.
            indices: the last n blocks, the blocks with these indices, or (None) all.
            return_prefix_tokens: pairs of patches and prefix tokens, where there are any.
            norm: put every intermediate through the last norm.
            stop_early: run no block behind the last of ``indices``; the features are then of that one.
            output_fmt: "NCHW": [B, embed_dim, rows, columns]; "NLC": [B, patches, embed_dim].
            intermediates_only: without the features.
            output_dict: a dictionary of ``image_intermediates``, ``image_intermediates_prefix`` and
                ``image_features`` instead.
            attn_mask, is_causal: None and False, since attention is not masked here.

        Returns:
            (features [B, tokens, embed_dim], intermediates in the order of the blocks), or the intermediates
            alone, or the dictionary.

        Raises:
            ValueError: an argument that does not fit; the message names it.
        """
        blocks = list(self.blocks.children())
        taken = take_indices("ViT", "indices", indices, len(blocks))
        check_output_fmt("ViT", output_fmt, ("NCHW", "NLC"))
        if attn_mask is not None:
            raise ValueError("ViT: attn_mask must be None: attention is not masked here")
        if is_causal:
            raise ValueError("ViT: is_causal must be False: attention is not masked here")
        tokens = []
        y = self._embed(x)
        # nobody reads what comes later, but in training it may draw random numbers
        stop_early = stop_early or (intermediates_only and not self.training)
        for i, block in enumerate(blocks[: max(taken) + 1] if stop_early else blocks):
            y = self.run_block(block, y, block)
            if i in taken:
                tokens.append(layer_norm(self.norm, y) if norm else y)
        split = [y.tensor_split([self.num_prefix_tokens], dim=1) for y in tokens]
        prefixes: list[torch.Tensor] = [prefix for prefix, _ in split]
        patches: list[Any] = [patch for _, patch in split]
        if output_fmt == "NCHW":
            grid = self._grid(x)
            patches = [one.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for one in patches]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else result | {"image_features": layer_norm(self.norm, y)}
        if with_prefix:
            patches = list(zip(patches, prefixes, strict=True))
        return patches if intermediates_only else (layer_norm(self.norm, y), patches)

    def get_intermediate_layers(
        self,
        x: torch.Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> list[Any]:
        """Tokens after chosen blocks, as timm and DINOv2 give them.

        Args:
            x: as for :meth:`forward`.
            n: the last ``n`` blocks, or the blocks with these indices.
            reshape: [B, embed_dim, rows, columns] instead of [B, patches, embed_dim].
            return_prefix_tokens: pairs of patches and prefix tokens, where there are any.
            norm: put every result through the last norm.
            attn_mask: None, since attention is not masked here.

        Raises:
            ValueError: an argument that does not fit; the message names it.
        """
        taken = take_indices("ViT", "n", n, len(list(self.blocks.children())))
        layers: list[Any] = self.forward_intermediates(
            x,
            taken,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )
        return layers

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take off what :meth:`forward_intermediates` does not need for ``indices``; timm's method.

        Args:
            indices: as there.
            prune_norm: the last norm too.
            prune_head: the head, the pooling and the norm behind it too.

        Returns:
            The indices, counted from the first block.

        Raises:
            ValueError: there are no such blocks; the model stays as it was.
        """
        blocks = list(self.blocks.children())
        taken = take_indices("ViT", "indices", indices, len(blocks))
        kept = nn.Sequential(*blocks[: max(taken) + 1])
        # without its blocks, of which some may be frozen
        kept.training = self.blocks.training
        self.blocks = kept
        if prune_norm:
            self.norm = nn.Identity().train(self.training)
        if prune_head:
            self.fc_norm = nn.Identity().train(self.training)
            self.reset_classifier(0, "")
        self.changed()
        return taken

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that optimisers leave without weight decay."""
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for layer-wise learning rates, as timm's optimisers read it:
        the embedding, each block (the last norm with the last one), the head. ``coarse`` changes nothing."""
        return {
            "stem": r"^(?:cls_token|reg_token|dist_token|pos_embed|patch_embed|norm_pre)",
            # timm's number for "with the one before"
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }
