"""The layout of the ViT that many tutorials print: a convolution, a class token, learned positions and a
plain ``nn.TransformerEncoder``.

Its weights make a post-norm ViT with ReLU. Attention runs over the tokens of an image, as in every ViT; where
the module was built without ``batch_first=True`` and fed with [B, N, D], it ran over the batch instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from fastvr.weights.names import Names, Slot

_NAMES = Names(
    block="transformer_encoder.layers.{}.",
    inside={
        "norm1": "norm1",
        "self_attn.in_proj": "attn.qkv",
        "self_attn.out_proj": "attn.proj",
        "norm2": "norm2",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
    },
    outside={
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed.proj": "patch_embed.proj",
        "norm": "norm",
        "head": "head",
    },
)


def family(keys: Collection[str]) -> str | None:
    """ "ViT" where the keys are of this layout, else None."""
    return "ViT" if any(key.startswith("transformer_encoder.layers.") for key in keys) else None


def rename(key: str) -> Slot:
    """fastvr's name for ``key``; an unknown key stays as it is."""
    # the convolution may be the module itself
    key = re.sub(r"^patch_embed\.(weight|bias)$", r"patch_embed.proj.\1", key)
    return _NAMES.rename(key.replace(".in_proj_", ".in_proj.")) or key


def export(name: str) -> tuple[str, ...] | None:
    """The keys for fastvr's ``name``; None where there are none."""
    keys = _NAMES.export(name)
    return keys and tuple(key.replace(".in_proj.", ".in_proj_") for key in keys)


def unused(key: str) -> bool:
    """Whether the model's function does not need ``key``."""
    return False


def finish(state: dict[str, torch.Tensor], keys: Collection[str]) -> None:
    """Nothing in this layout has another form than in fastvr."""


def stated(family: str, config: Mapping[str, Any] | None, keys: Collection[str]) -> dict[str, Any]:
    """What ``nn.TransformerEncoderLayer`` does unless told otherwise."""
    return {"act": "relu", "norm_eps": 1e-5, "norm_first": False}
