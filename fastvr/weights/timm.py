"""timm's layout: fastvr's own names, for ViT and for ResNet (torchvision's ResNets have the same).

The files that DINOv2 and DeiT-III themselves publish have these names too, but for register and mask tokens
and LayerScale, and the two layers of the giant one's MLPs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from fastvr.models.registry import MODELS
from fastvr.nn.mlp import ACTIVATIONS
from fastvr.weights.errors import CheckpointError
from fastvr.weights.names import Slot
from fastvr.weights.read import METADATA_KEY, is_dense

_GAMMA = re.compile(r"(?<=\.)gamma_([12])$")

# timm's arguments of a ViT that its weights do not tell, and fastvr's names for them
_ARGUMENTS = {
    "num_heads": "num_heads",
    "act_layer": "act",
    "global_pool": "global_pool",
    "fc_norm": "fc_norm",
    "final_norm": "final_norm",
    "no_embed_class": "no_embed_class",
}
# those that the weights tell, or that change no number in eval
_SHAPES = {
    "img_size",
    "patch_size",
    "in_chans",
    "num_classes",
    "embed_dim",
    "depth",
    "mlp_ratio",
    "qk_norm",
    "qkv_bias",
    "init_values",
    "class_token",
    "pre_norm",
    "reg_tokens",
    "dynamic_img_size",
    "weight_init",
    "fix_init",
    "drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
}
# the same of a ResNet
_RESNET_SHAPES = {
    "layers",
    "in_chans",
    "num_classes",
    "global_pool",
    "cardinality",
    "base_width",
    "stem_width",
    "stem_type",
    "avg_down",
    "zero_init_last",
    "drop_rate",
    "drop_path_rate",
    "drop_block_rate",
}


def family(keys: Collection[str]) -> str | None:
    """ "ViT" or "ResNet" where the keys are of this layout, else None."""
    # by what no other layout has, so that a missing weight is named as missing
    if any(key.startswith("blocks.0.") for key in keys):
        return "ViT"
    return "ResNet" if any(key.startswith("layer1.0.") for key in keys) else None


def rename(key: str) -> Slot:
    """fastvr's name for timm's ``key``, or for that in the files that DINOv2 and DeiT-III publish."""
    if key == "register_tokens":
        return "reg_token"
    return _GAMMA.sub(r"ls\1.gamma", key).replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


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
    """What the configuration says of a model beside its weights.

    Raises:
        CheckpointError: it is of a model that fastvr does not have.
    """
    if config is None or "architecture" not in config or METADATA_KEY in config:
        return {}
    architecture = config["architecture"]
    if architecture not in MODELS:
        raise CheckpointError(f"config.json: architecture {architecture!r} is none of list_models()")
    arguments = MODELS[architecture].arguments
    written = dict(config.get("model_args") or {})
    if written.get("pos_embed") == "learn":
        del written["pos_embed"]
    taken = _RESNET_SHAPES if family == "ResNet" else _SHAPES | _ARGUMENTS.keys()
    if unknown := sorted(set(written) - taken):
        raise CheckpointError(
            f"config.json: model_args that fastvr's {family} does not have: {', '.join(unknown)}"
        )
    pool = written.get("global_pool", config.get("global_pool"))
    if family == "ResNet":
        if pool not in (None, "", "avg"):
            raise CheckpointError(f"config.json: global_pool must be 'avg' or ''; got {pool!r}")
        return {} if pool is None else {"global_pool": pool}
    found = {
        "act": "gelu",
        "norm_eps": 1e-6,
        "norm_first": True,
        **{name: arguments[name] for name in (*_ARGUMENTS.values(), "norm_eps") if name in arguments},
    }
    if isinstance(pool, str):
        found["global_pool"] = pool
    found |= {_ARGUMENTS[name]: value for name, value in written.items() if name in _ARGUMENTS}
    if arguments.get("act") == "swiglu":
        # of timm's classes, not of its arguments; those have the gate's
        found["act"] = "swiglu"
    elif found["act"] not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: act_layer must be one of {', '.join(ACTIVATIONS)}; got {found['act']!r}"
        )
    return found


def position_into_class_token(state: dict[str, torch.Tensor]) -> None:
    """From DINOv2's form, whose first position is the class token's and whose registers have none, to that of
    ``no_embed_class``: the same sum, made once."""
    cls_token, pos_embed = state.get("cls_token"), state.get("pos_embed")
    if cls_token is None or pos_embed is None or not is_dense(pos_embed) or pos_embed.dim() != 3:
        return  # loading names what is wrong with them
    first, state["pos_embed"] = pos_embed[:, :1], pos_embed[:, 1:]
    both = is_dense(cls_token) and cls_token.is_floating_point() and pos_embed.is_floating_point()
    if both and cls_token.dim() == 3 and cls_token.shape[-1] == first.shape[-1]:
        # in a wide dtype: of a file in half precision the sum is more exact than its terms can hold
        wide = torch.float64 if torch.float64 in (cls_token.dtype, first.dtype) else torch.float32
        state["cls_token"] = cls_token.to(wide) + first.to(wide)
