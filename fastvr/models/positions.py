"""Sizes of images and patches, and learned position embeddings for another grid of them."""

from __future__ import annotations

from numbers import Integral

import torch
import torch.nn.functional as F


def image_and_patch(
    img_size: int | tuple[int, int], patch_size: int | tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Both as (height, width).

    Raises:
        ValueError: a size that is none, or images smaller than a patch.
    """
    image, patch = _pair("img_size", img_size), _pair("patch_size", patch_size)
    if image[0] < patch[0] or image[1] < patch[1]:
        raise ValueError(f"ViT: img_size must be at least patch_size {patch}; got {image}")
    return image, patch


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or not all(isinstance(side, Integral) and int(side) > 0 for side in both):
        raise ValueError(f"ViT: {name} must be one or two positive integers; got {value!r}")
    return both


def resample(
    pos_embed: torch.Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix_tokens: int
) -> torch.Tensor:
    """Positions of another grid, as timm makes them: bicubic with antialiasing, in float32.

    Args:
        pos_embed: [1, num_prefix_tokens + old[0] * old[1], D], floating.
        old, new: (rows, columns) of patches.
        num_prefix_tokens: positions in front that belong to no patch; they stay as they are.

    Returns:
        [1, num_prefix_tokens + new[0] * new[1], D], in ``pos_embed``'s dtype.
    """
    if old == new:
        return pos_embed
    prefix, patches = pos_embed.tensor_split([num_prefix_tokens], dim=1)
    wide = torch.promote_types(pos_embed.dtype, torch.float32)
    grid = patches.to(wide).unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
