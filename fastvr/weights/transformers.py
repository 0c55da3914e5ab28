"""transformers' layout of ViT, DeiT and DINOv2 (with registers too), as saved and as its models hold it.

Query, key and value are separate, and are joined.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from fastvr.weights.errors import CheckpointError
from fastvr.weights.names import Names, Slot
from fastvr.weights.timm import position_into_class_token

_ATTENTION: dict[str, Slot] = {
    "attention.attention.query": ("attn.qkv", 0),
    "attention.attention.key": ("attn.qkv", 1),
    "attention.attention.value": ("attn.qkv", 2),
    "attention.output.dense": "attn.proj",
    # in memory, from transformers 5 on
    "attention.q_proj": ("attn.qkv", 0),
    "attention.k_proj": ("attn.qkv", 1),
    "attention.v_proj": ("attn.qkv", 2),
    "attention.o_proj": "attn.proj",
}
_OUTSIDE: dict[str, Slot] = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
}
_VIT = Names(
    block="encoder.layer.{}.",
    inside={
        **_ATTENTION,
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    outside={
        **_OUTSIDE,
        "embeddings.distillation_token": "dist_token",
        "cls_classifier": "head",
        "distillation_classifier": "head_dist",
    },
)
_DINOV2 = Names(
    block="encoder.layer.{}.",
    inside={
        **_ATTENTION,
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    },
    outside={**_OUTSIDE, "embeddings.register_tokens": "reg_token"},
)
# the MLPs of DINOv2's giant
_SWIGLU = Names(
    block="encoder.layer.{}.",
    inside={
        "mlp.weights_in": "mlp.fc1",
        "mlp.weights_out": "mlp.fc2",
        # in memory, from transformers 5 on
        "mlp.gate_proj": ("mlp.fc1", 0),
        "mlp.up_proj": ("mlp.fc1", 1),
        "mlp.down_proj": "mlp.fc2",
    },
    outside={},
)
_PREFIX = re.compile(r"(vit|deit|dinov2|dinov2_with_registers)\.")
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
"""What transformers calls an activation, and what it is called here."""
MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers")


def family(keys: Collection[str]) -> str | None:
    """ "ViT" where the keys are of this layout, else None."""
    marks = ("embeddings.patch_embeddings.", ".layernorm_before.", ".layer_scale1.lambda1")
    return "ViT" if any(mark in key for key in keys for mark in marks) else None


def rename(key: str) -> Slot:
    """fastvr's name for transformers' ``key``; an unknown key stays as it is."""
    inner = re.sub(r"^layers\.", "encoder.layer.", _PREFIX.sub("", key, count=1))
    return _VIT.rename(inner) or _DINOV2.rename(inner) or _SWIGLU.rename(inner) or key


def export(name: str, model_type: str, with_head: bool, gated: bool = False) -> tuple[str, ...] | None:
    """The keys that transformers saves for fastvr's ``name``; None where it has none.

    Args:
        name: fastvr's name.
        model_type: one of :data:`MODEL_TYPES`.
        with_head: whether it is a classifier, whose backbone has a prefix.
        gated: whether its MLPs are SwiGLU.
    """
    names = _DINOV2 if model_type.startswith("dinov2") else _VIT
    keys = (_SWIGLU.export(name) if gated else None) or names.export(name)
    if keys is None or not with_head or name.startswith("head"):
        return keys
    return tuple(f"{model_type}.{key}" for key in keys)


def unused(key: str) -> bool:
    """Whether the model's function does not need ``key``: the pooler that no classifier reads, and the token
    that hides patches in pretraining."""
    inner = _PREFIX.sub("", key, count=1)
    return inner.startswith("pooler.") or inner == "embeddings.mask_token"


def finish(state: dict[str, torch.Tensor], keys: Collection[str]) -> None:
    """What has another form than in fastvr, put into fastvr's."""
    if "reg_token" in state:
        position_into_class_token(state)
    if "dist_token" in state and "head_dist.weight" not in state:
        # a DeiT whose classifier reads the class token alone: the other one is a register
        state["reg_token"] = state.pop("dist_token")


def stated(family: str, config: Mapping[str, Any] | None, keys: Collection[str]) -> dict[str, Any]:
    """What the configuration says of a model beside its weights, or what transformers takes without one.

    Raises:
        CheckpointError: the configuration asks for what fastvr's ViT does not compute.
    """
    dinov2 = any(".layer_scale1." in key or key.startswith("layer_scale1.") for key in keys)
    gated = any(mark in key for key in keys for mark in (".mlp.weights_in.", ".mlp.gate_proj."))
    if config is None:
        return {
            "act": "swiglu" if gated else "gelu",
            "norm_eps": 1e-6 if dinov2 else 1e-12,
            "norm_first": True,
        }
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json: model_type must be one of {', '.join(MODEL_TYPES)}; got {model_type!r}"
        )
    act = config.get("hidden_act", "gelu")
    if act not in ACTIVATIONS:
        raise CheckpointError(f"config.json: hidden_act must be one of {', '.join(ACTIVATIONS)}; got {act!r}")
    found: dict[str, Any] = {
        "act": "swiglu" if gated else ACTIVATIONS[act],
        "norm_eps": float(config.get("layer_norm_eps", 1e-6 if dinov2 else 1e-12)),
        "norm_first": True,
    }
    return found | sizes(config)


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Heads and image size, where the configuration says them."""
    found: dict[str, Any] = {}
    if "num_attention_heads" in config:
        found["num_heads"] = config["num_attention_heads"]
    if "image_size" in config:
        size = config["image_size"]
        found["img_size"] = tuple(size) if isinstance(size, list) else (size, size)
    return found
