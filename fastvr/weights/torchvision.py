"""torchvision's layout of ViT. Query, key and value are packed as timm packs them: only names differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from fastvr.weights.names import Names, Slot

_NAMES = Names(
    block="encoder.layers.encoder_layer_{}.",
    inside={
        "ln_1": "norm1",
        "self_attention.in_proj": "attn.qkv",
        "self_attention.out_proj": "attn.proj",
        "ln_2": "norm2",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
        # files from before torchvision 0.12
        "mlp.linear_1": "mlp.fc1",
        "mlp.linear_2": "mlp.fc2",
    },
    outside={
        "class_token": "cls_token",
        "encoder.pos_embedding": "pos_embed",
        "conv_proj": "patch_embed.proj",
        "encoder.ln": "norm",
        "heads.head": "head",
    },
)


def family(keys: Collection[str]) -> str | None:
    """ "ViT" where the keys are of this layout, else None (torchvision's ResNets have timm's keys)."""
    return "ViT" if any(key.startswith("encoder.layers.encoder_layer_0.") for key in keys) else None


def rename(key: str) -> Slot:
    """fastvr's name for torchvision's ``key``; an unknown key stays as it is."""
    # in_proj_weight is one word, out_proj.weight two
    return _NAMES.rename(key.replace(".in_proj_", ".in_proj.")) or key


def export(name: str) -> tuple[str, ...] | None:
    """torchvision's keys for fastvr's ``name``; None where it has none."""
    keys = _NAMES.export(name)
    return keys and tuple(key.replace(".in_proj.", ".in_proj_") for key in keys)


def unused(key: str) -> bool:
    """Whether the model's function does not need ``key``."""
    return False


def finish(state: dict[str, torch.Tensor], keys: Collection[str]) -> None:
    """Nothing in this layout has another form than in fastvr."""


def stated(family: str, config: Mapping[str, Any] | None, keys: Collection[str]) -> dict[str, Any]:
    """What the layout says of a model beside its weights."""
    return {"act": "gelu", "norm_eps": 1e-6, "norm_first": True}
