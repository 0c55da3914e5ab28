"""timm's layout: fastvr's own names, for ViT and for ResNet (torchvision's ResNets have the same).

The files that DINOv2 itself publishes have these names too, but for register and mask tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from fastvr.weights.names import Slot


def family(keys: Collection[str]) -> str | None:
    """ "ViT" or "ResNet" where the keys are of this layout, else None."""
    # by what no other layout has, so that a missing weight is named as missing
    if any(key.startswith("blocks.0.") for key in keys):
        return "ViT"
    return "ResNet" if any(key.startswith("layer1.0.") for key in keys) else None


def rename(key: str) -> Slot:
    """fastvr's name for timm's ``key``."""
    return "reg_token" if key == "register_tokens" else key


def export(name: str) -> tuple[str, ...] | None:
    """timm's keys for fastvr's ``name``."""
    return (name,)


def unused(key: str) -> bool:
    """Whether the model's function does not need ``key``."""
    return key == "mask_token"


def finish(state: dict[str, torch.Tensor], keys: Collection[str]) -> None:
    """What has another form than in fastvr, put into fastvr's."""
    if "register_tokens" in keys:
        position_into_class_token(state)


def stated(family: str, config: Mapping[str, Any] | None, keys: Collection[str]) -> dict[str, Any]:
    """What the layout says of a model beside its weights."""
    return {}


def position_into_class_token(state: dict[str, torch.Tensor]) -> None:
    """From DINOv2's form, whose first position is the class token's and whose registers have none, to that of
    ``no_embed_class``: the same sum, made once."""
    cls_token, pos_embed = state.get("cls_token"), state.get("pos_embed")
    if cls_token is not None and pos_embed is not None and pos_embed.dim() == cls_token.dim() == 3:
        state["cls_token"] = cls_token + pos_embed[:, :1]
        state["pos_embed"] = pos_embed[:, 1:]
