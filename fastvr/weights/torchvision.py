"""torchvision's layout of ViT. Query, key and value are packed as timm packs them: only names differ."""

from __future__ import annotations

import re
from collections.abc import Collection

_LAYER = re.compile(r"encoder\.layers\.encoder_layer_(\d+)\.(.+)")
_INSIDE = {
    "ln_1": "norm1",
    "self_attention.in_proj": "attn.qkv",
    "self_attention.out_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
    # files from before torchvision 0.12
    "mlp.linear_1": "mlp.fc1",
    "mlp.linear_2": "mlp.fc2",
}
_OUTSIDE = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj.weight": "patch_embed.proj.weight",
    "conv_proj.bias": "patch_embed.proj.bias",
    "encoder.ln.weight": "norm.weight",
    "encoder.ln.bias": "norm.bias",
    "heads.head.weight": "head.weight",
    "heads.head.bias": "head.bias",
}


def family(keys: Collection[str]) -> str | None:
    """ "ViT" where the keys are of this layout, else None (torchvision's ResNets have timm's keys)."""
    return "ViT" if any(key.startswith("encoder.layers.encoder_layer_0.") for key in keys) else None


def rename(key: str) -> str:
    """fastvr's name for torchvision's ``key``; an unknown key stays as it is."""
    if match := _LAYER.fullmatch(key):
        # in_proj_weight is one word, out_proj.weight two
        module, _, kind = match[2].replace("in_proj_", "in_proj.").rpartition(".")
        if module in _INSIDE:
            return f"blocks.{match[1]}.{_INSIDE[module]}.{kind}"
    return _OUTSIDE.get(key, key)
