"""What a model's weights do not say of it, as arguments of ViT; written beside them and read again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastvr.models._model import Model
from fastvr.models.vit import ViT
from fastvr.nn.attention import Attention
from fastvr.nn.block import Block
from fastvr.nn.glu import GluMlp
from fastvr.nn.mlp import Mlp, fused_name
from fastvr.nn.residual import BasicBlock, Bottleneck
from fastvr.weights.errors import CheckpointError

_KINDS: dict[str, type | tuple[type, ...]] = {
    "img_size": (list, tuple),
    "num_heads": int,
    "act": str,
    "norm_eps": float,
    "norm_first": bool,
    "global_pool": str,
    "fc_norm": bool,
    "final_norm": bool,
    "no_embed_class": bool,
}


def describe(model: Model) -> dict[str, Any]:
    """The arguments that the shapes of ``model``'s weights do not tell; {} for a ResNet.

    Raises:
        ValueError: somebody put other modules into the model.
    """
    if not isinstance(model, ViT):
        return {}
    blocks = list(model.blocks.children())
    if not blocks or not isinstance(blocks[0], Block):
        raise ValueError("save_model: model must have blocks of its own kind; got others, or none")
    block = blocks[0]
    attn, mlp, norm = block.attn, block.mlp, block.norm1
    if not (
        isinstance(attn, Attention) and isinstance(mlp, (Mlp, GluMlp)) and isinstance(norm, nn.LayerNorm)
    ):
        raise ValueError("save_model: model must have attention, MLP and norms of its own kind; got others")
    act = activation(mlp)
    if act is None:
        kind = type(mlp.act).__name__
        raise ValueError(f"save_model: model must have a plain activation in its MLPs; got {kind}")
    return {
        "img_size": list(model.img_size),
        "num_heads": attn.num_heads,
        "act": act,
        "norm_eps": norm.eps,
        "norm_first": block.norm_first,
        "global_pool": model.global_pool,
        "fc_norm": isinstance(model.fc_norm, nn.LayerNorm),
        "no_embed_class": model.no_embed_class,
        **({} if has_last_norm(model) else {"final_norm": False}),
    }


def has_last_norm(model: ViT) -> bool:
    """Whether a norm comes before or behind the pooling."""
    return any(isinstance(norm, nn.LayerNorm) for norm in (model.norm, model.fc_norm))


def activation(mlp: Mlp | GluMlp) -> str | None:
    """``act`` of a ViT that has ``mlp``; None where somebody put another activation there."""
    if isinstance(mlp, GluMlp):
        return "swiglu" if isinstance(mlp.act, nn.SiLU) else None
    return fused_name(mlp.act)


def read_description(written: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`describe` wrote, or another library's configuration came to, checked.

    Raises:
        CheckpointError: it is something else.
    """
    found = dict(written)
    for name, value in found.items():
        right = name in _KINDS and isinstance(value, _KINDS[name])
        # a bool is an int to Python, not to whoever reads the file
        right = right and (_KINDS[name] is bool or not isinstance(value, bool))
        if right and name == "img_size":
            right = len(value) == 2 and all(type(side) is int and side > 0 for side in value)
        if not right or (name == "num_heads" and value < 1):
            raise CheckpointError(f"the configuration says {name}={value!r}, which is no such argument")
    if "img_size" in found:
        found["img_size"] = tuple(found["img_size"])
    return found


def resnet_arguments(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of :class:`ResNet` that the shapes of its weights tell, under fastvr's names."""
    blocks = [tuple(map(int, found)) for key in state for found in re.findall(r"^layer(\d)\.(\d+)\.", key)]
    bottleneck = "layer1.0.conv3.weight" in state
    width = state["bn1.weight"].shape[0]
    stem = state.get("conv1.0.weight")
    first = state["conv1.weight"] if stem is None else stem
    head = state.get("fc.weight")
    arguments: dict[str, Any] = {
        "block": Bottleneck if bottleneck else BasicBlock,
        # by how many there are: of a number that is none of them, loading says that it is too many
        "layers": tuple(len({block for at, block in blocks if at == stage}) for stage in (1, 2, 3, 4)),
        "num_classes": 0 if head is None else head.shape[0],
        "in_chans": first.shape[1],
        "width": width,
        "stem_width": None if stem is None else stem.shape[0],
        # a pool has no weights, but pushes the convolution to the second place
        "avg_down": "layer2.0.downsample.2.weight" in state,
    }
    if bottleneck:
        inside, in_group = state["layer1.0.conv2.weight"].shape[:2]
        arguments["groups"] = inside // in_group
        arguments["width_per_group"] = in_group * 64 // width
    return arguments


def mlp_ratio(hidden: int, width: int) -> float:
    """The MLP's ratio of which ``int(width * ratio)`` is ``hidden``."""
    if hidden % width == 0:
        return hidden // width
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
