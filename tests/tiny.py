"""Arguments of a small ViT, by timm's and fastvr's names alike."""

from __future__ import annotations

from typing import Any

TINY_VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}
