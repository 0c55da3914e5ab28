"""transformers' layout of CLIP's and SigLIP's vision towers: alone, with a classifier, or with their
text tower, which is left.

Query, key and value are separate, and are joined; those of SigLIP's attention pooling are packed, and the
query is taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from fastvr.models.vit import ViT
from fastvr.weights.configs import HIDDEN_ACTS
from fastvr.weights.describe import has_last_norm
from fastvr.weights.errors import CheckpointError
from fastvr.weights.names import Names, Slot
from fastvr.weights.read import is_dense
from fastvr.weights.transformers import ACTIVATIONS, sizes

_NAMES = Names(
    block="encoder.layers.{}.",
    inside={
        "self_attn.q_proj": ("attn.qkv", 0),
        "self_attn.k_proj": ("attn.qkv", 1),
        "self_attn.v_proj": ("attn.qkv", 2),
        "self_attn.out_proj": "attn.proj",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    outside={
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "pre_layrnorm": "norm_pre",
        "post_layernorm": "norm",
        "visual_projection": "head",
        "classifier": "head",
        "head.probe": "attn_pool.latent",
        "head.attention.in_proj_weight": "attn_pool.in_proj.weight",
        "head.attention.in_proj_bias": "attn_pool.in_proj.bias",
        "head.attention.out_proj": "attn_pool.proj",
        "head.layernorm": "attn_pool.norm",
        "head.mlp.fc1": "attn_pool.mlp.fc1",
        "head.mlp.fc2": "attn_pool.mlp.fc2",
    },
)
_PREFIX = "vision_model."
_TEXT = re.compile(r"text_model\.|text_projection\.|logit_(scale|bias)$|.*\bposition_ids$")
MODEL_TYPES = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")


def family(keys: Collection[str]) -> str | None:
    """ "ViT" where the keys are of this layout, else None."""
    marks = ("embeddings.patch_embedding.", ".layer_norm1.")
    return "ViT" if any(mark in key for key in keys for mark in marks) else None


def rename(key: str) -> Slot:
    """fastvr's name for transformers' ``key``; an unknown key stays as it is."""
    return _NAMES.rename(key.removeprefix(_PREFIX)) or key


def export(name: str, projected: bool) -> tuple[str, ...] | None:
    """The keys that transformers saves for ``name``, one of fastvr's or of :func:`written`; None where it has
    none. ``projected``: whether the tower is a part of a model with a projection behind it."""
    keys = _NAMES.export(name)
    if keys is None or not projected or name == "head.weight":
        return keys
    return tuple(_PREFIX + key for key in keys)


def unused(key: str) -> bool:
    """Whether the vision tower's function does not need ``key``."""
    return _TEXT.match(key) is not None


def finish(state: dict[str, torch.Tensor], keys: Collection[str]) -> None:
    """What has another form than in fastvr, put into fastvr's."""
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"][None, None]
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][None]
    if "visual_projection.weight" in keys and state["head.weight"].numel() and state["head.weight"].dim():
        state["head.bias"] = torch.zeros(len(state["head.weight"]))
    if "classifier.weight" in keys:
        # it reads the patches' mean, CLIP's before the last norm
        beside = ("attn_pool.", "norm.") if "norm_pre.weight" in state else ("attn_pool.",)
        for name in [name for name in state if name.startswith(beside)]:
            del state[name]
    for kind in ("weight", "bias"):
        name = f"attn_pool.in_proj.{kind}"
        if name in state and is_dense(state[name]) and state[name].dim():
            packed = state.pop(name)
            width = len(packed) // 3
            state[f"attn_pool.q.{kind}"], state[f"attn_pool.kv.{kind}"] = packed[:width], packed[width:]


def stated(family: str, config: Mapping[str, Any] | None, keys: Collection[str]) -> dict[str, Any]:
    """What the configuration says of the tower beside its weights, or what transformers takes without one.

    Raises:
        CheckpointError: the configuration asks for what fastvr's ViT does not compute.
    """
    clip = any(key.endswith("pre_layrnorm.weight") for key in keys)
    classifier = "classifier.weight" in keys
    found: dict[str, Any] = {
        "act": "quick_gelu" if clip else "gelu_tanh",
        "norm_eps": 1e-5 if clip else 1e-6,
        "norm_first": True,
    }
    if not clip:
        probe = any(key.endswith("head.probe") for key in keys)
        found |= {"global_pool": "avg" if classifier else "map" if probe else "", "fc_norm": False}
    elif classifier:
        found |= {"global_pool": "avg", "fc_norm": False, "final_norm": False}
    if config is None:
        return found
    if (model_type := config.get("model_type")) not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json: model_type must be one of {', '.join(MODEL_TYPES)}; got {model_type!r}"
        )
    tower = config.get("vision_config", config)
    act = tower.get("hidden_act", "quick_gelu" if clip else "gelu_pytorch_tanh")
    if act not in ACTIVATIONS:
        raise CheckpointError(f"config.json: hidden_act must be one of {', '.join(ACTIVATIONS)}; got {act!r}")
    eps = float(tower.get("layer_norm_eps", found["norm_eps"]))
    return found | {"act": ACTIVATIONS[act], "norm_eps": eps} | sizes(tower)


def holds(model: ViT) -> bool:
    """Whether ``model`` is such a tower, by what no other layout of transformers has."""
    return "norm_pre.weight" in model.state_dict() or model.global_pool == "map"


def config(model: ViT, described: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers reads beside the weights.

    Raises:
        ValueError: transformers has no such tower.
    """
    state = model.state_dict()
    clip = "norm_pre.weight" in state
    expected: dict[str, Any] = {
        "norm_first": True,
        "global_pool": "token" if clip else "map",
        "fc_norm": False,
        # of no token there is no position either way
        **({"no_embed_class": False} if clip else {}),
    }
    problems = [f"{name}={described[name]!r}" for name in expected if described[name] != expected[name]]
    if model.has_class_token != clip or model.num_reg_tokens:
        problems.append("no class token" if clip else "other tokens than the patches")
    if "blocks.0.ls1.gamma" in state or "blocks.0.attn.qkv.bias" not in state:
        problems.append("LayerScale, or no bias of query, key and value")
    if "blocks.0.attn.q_norm.weight" in state or not has_last_norm(model):
        problems.append("norms of queries and keys, or no last norm")
    if model.num_classes and (not clip or bool(state["head.bias"].any())):
        problems.append("a head (reset_classifier(0) takes it off)" if not clip else "a bias in its head")
    if model.img_size[0] != model.img_size[1] or model.patch_size[0] != model.patch_size[1]:
        problems.append("oblong images or patches")
    if problems:
        kind = "CLIP" if clip else "SigLIP"
        raise ValueError(f"save_model: transformers has no {kind} tower with {'; '.join(problems)}")
    hidden, width = state["blocks.0.mlp.fc1.weight"].shape
    architecture = "SiglipVisionModel"
    if clip:
        architecture = "CLIPVisionModelWithProjection" if model.num_classes else "CLIPVisionModel"
    return {
        "architectures": [architecture],
        "model_type": "clip_vision_model" if clip else "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": len(list(model.blocks.children())),
        "num_attention_heads": described["num_heads"],
        "hidden_act": HIDDEN_ACTS[described["act"]],
        "layer_norm_eps": described["norm_eps"],
        "attention_dropout": 0.0,
        "image_size": model.img_size[0],
        "patch_size": model.patch_size[0],
        "num_channels": model.in_chans,
        **({"projection_dim": model.num_classes} if model.num_classes else {}),
    }


def written(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fastvr's weights of a tower that :func:`config` took, in transformers' form."""
    state = dict(state)
    state.pop("head.bias", None)
    for kind in ("weight", "bias"):
        if (q := state.pop(f"attn_pool.q.{kind}", None)) is not None:
            state[f"attn_pool.in_proj.{kind}"] = torch.cat([q, state.pop(f"attn_pool.kv.{kind}")])
    if "cls_token" in state:
        state["cls_token"] = state["cls_token"][0, 0]
    state["pos_embed"] = state["pos_embed"][0]
    return state
