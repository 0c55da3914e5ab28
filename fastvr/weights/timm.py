"""timm's layout: fastvr's own names, for ViT and for ResNet (torchvision's ResNets have the same)."""

from __future__ import annotations

from collections.abc import Collection


def family(keys: Collection[str]) -> str | None:
    """ "ViT" or "ResNet" where the keys are of this layout, else None."""
    # by what no other layout has, so that a missing weight is named as missing
    if any(key.startswith("blocks.0.") for key in keys):
        return "ViT"
    return "ResNet" if any(key.startswith("layer1.0.") for key in keys) else None


def rename(key: str) -> str:
    """fastvr's name for timm's ``key``."""
    return key
