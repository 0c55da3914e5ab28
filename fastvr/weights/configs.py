"""The configurations that other libraries read beside weights, for the models of ours that they have."""

from __future__ import annotations

from typing import Any

from fastvr.models._model import Model
from fastvr.models.resnet import ResNet
from fastvr.models.vit import ViT
from fastvr.models.vit_distilled import DistilledViT
from fastvr.weights.describe import has_last_norm, mlp_ratio, resnet_arguments

HIDDEN_ACTS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
"""What an activation is called here, and what transformers calls it."""


def timm_arguments(model: Model, described: dict[str, Any]) -> dict[str, Any]:
    """What timm's model classes take to build the same model, as JSON can hold it.

    Raises:
        ValueError: timm has no such model.
    """
    if isinstance(model, ResNet):
        options = resnet_arguments(model.state_dict())
        if options["width"] != 64:
            raise ValueError(f"save_model: timm's ResNets have width=64; got {options['width']}")
        arguments: dict[str, Any] = {"layers": list(options["layers"])}
        if (options.get("groups", 1), options.get("width_per_group", 64)) != (1, 64):
            arguments |= {"cardinality": options["groups"], "base_width": options["width_per_group"]}
        if options["stem_width"] is not None:
            arguments |= {"stem_width": options["stem_width"], "stem_type": "deep"}
        return arguments | ({"avg_down": True} if options["avg_down"] else {})
    assert isinstance(model, ViT)
    if not described["norm_first"]:
        raise ValueError("save_model: timm's ViT is pre-norm; got a post-norm model")
    state = model.state_dict()
    width = model.embed_dim
    arguments = {
        "img_size": list(model.img_size),
        "patch_size": list(model.patch_size),
        "in_chans": model.in_chans,
        "embed_dim": width,
        "depth": len(list(model.blocks.children())),
        "num_heads": described["num_heads"],
        "mlp_ratio": mlp_ratio(state["blocks.0.mlp.fc1.weight"].shape[0], width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "no_embed_class": model.no_embed_class,
    }
    # SwiGLU is a class there, which the architecture says
    if "blocks.0.attn.q_norm.weight" in state:
        arguments["qk_norm"] = True
    if described["act"] not in ("gelu", "swiglu"):
        arguments["act_layer"] = described["act"]
    if isinstance(model, DistilledViT):
        return arguments
    return arguments | {
        "pre_norm": "norm_pre.weight" in state,
        "class_token": model.has_class_token,
        "reg_tokens": model.num_reg_tokens,
        "global_pool": model.global_pool,
        "fc_norm": described["fc_norm"],
        **({} if has_last_norm(model) else {"final_norm": False}),
    }


def timm_config(model: Model, described: dict[str, Any]) -> dict[str, Any]:
    arguments = timm_arguments(model, described)
    if isinstance(model, ResNet):
        # the nearest name; timm puts the arguments over what it says
        architecture = "resnet50" if "layer1.0.conv3.weight" in model.state_dict() else "resnet18"
        classifier, pool = "fc", "avg"
    else:
        assert isinstance(model, ViT)
        distilled = isinstance(model, DistilledViT)
        architecture = "deit_base_distilled_patch16_224" if distilled else "vit_base_patch16_224"
        eps = 1e-6
        if described["act"] == "swiglu":
            architecture = "vit_giant_patch14_dinov2"
        elif arguments.get("pre_norm"):
            architecture, eps = "vit_base_patch16_clip_224", 1e-5
        _check_eps("timm", described, eps)
        classifier, pool = ["head", "head_dist"] if distilled else "head", model.global_pool  # type: ignore[assignment]
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {"num_classes": model.num_classes, "classifier": classifier},
    }


def check_torchvision(model: Model, described: dict[str, Any]) -> None:
    problems = []
    if isinstance(model, ResNet):
        options = resnet_arguments(model.state_dict())
        unlike = {"width": 64, "stem_width": None, "avg_down": False}
        problems += [f"{name}={options[name]!r}" for name, value in unlike.items() if options[name] != value]
    else:
        assert isinstance(model, ViT)
        _check_eps("torchvision", described, 1e-6)
        if type(model) is not ViT or model.num_reg_tokens or not model.has_class_token:
            problems.append("other tokens than the class token")
        if "blocks.0.ls1.gamma" in model.state_dict():
            problems.append("LayerScale")
        if "blocks.0.attn.q_norm.weight" in model.state_dict() or not has_last_norm(model):
            problems.append("norms of queries and keys, or no last norm")
        expected = {"act": "gelu", "norm_first": True, "global_pool": "token", "fc_norm": False}
        different = [name for name, value in expected.items() if described[name] != value]
        problems += [f"{name}={described[name]!r}" for name in different]
        if model.no_embed_class or "blocks.0.attn.qkv.bias" not in model.state_dict():
            problems.append("no position of the class token, or no bias of query, key and value")
        if not model.num_classes:
            problems.append("no head")
    if problems:
        raise ValueError(f"save_model: torchvision has no model with {', '.join(problems)}")


def _check_eps(library: str, described: dict[str, Any], eps: float) -> None:
    if described["norm_eps"] != eps:
        raise ValueError(
            f"save_model: {library}'s LayerNorms have eps {eps}, the model's have {described['norm_eps']}: "
            f"load it with norm_eps={eps} where that much of another function will do"
        )


def transformers_vit(model: ViT, described: dict[str, Any]) -> dict[str, Any]:
    state = model.state_dict()
    scaled, registers = "blocks.0.ls1.gamma" in state, model.num_reg_tokens
    distilled = isinstance(model, DistilledViT)
    problems = [
        f"{name}={described[name]!r}"
        for name, value in {"norm_first": True, "global_pool": "token", "fc_norm": False}.items()
        if described[name] != value
    ]
    if not model.has_class_token:
        problems.append("no class token")
    if "blocks.0.attn.q_norm.weight" in state or not has_last_norm(model):
        problems.append("norms of queries and keys, or no last norm")
    if scaled:
        kind, prefix = ("dinov2_with_registers", "Dinov2WithRegisters") if registers else ("dinov2", "Dinov2")
        if model.num_classes or distilled:
            problems.append("LayerScale and a head on the class token (reset_classifier(0) takes it off)")
        if model.no_embed_class != bool(registers):
            problems.append(f"LayerScale, {registers} registers and no_embed_class={model.no_embed_class}")
    elif distilled or registers:
        kind, prefix = "deit", "DeiT"
        if registers > 1 or model.no_embed_class:
            problems.append("registers, but no LayerScale")
    else:
        kind, prefix = "vit", "ViT"
        if model.no_embed_class:
            problems.append("no position of the class token")
    if model.img_size[0] != model.img_size[1] or model.patch_size[0] != model.patch_size[1]:
        problems.append("oblong images or patches")
    hidden, width = state["blocks.0.mlp.fc1.weight"].shape
    gated = described["act"] == "swiglu"
    # of SwiGLU's hidden width each half has two thirds, as a multiple of 8
    ratio = round(hidden * (3 / 4 if gated else 1) / width)
    given = 2 * ((width * ratio * 2 // 3 + 7) // 8 * 8) if gated else width * ratio
    if scaled and given != hidden:
        problems.append(f"LayerScale and MLPs {hidden} wide, which no whole mlp_ratio gives")
    elif gated and not scaled:
        problems.append("SwiGLU, but no LayerScale")
    if problems:
        raise ValueError(f"save_model: transformers has no model with {'; '.join(problems)}")
    task = "ForImageClassificationWithTeacher" if distilled else "ForImageClassification"
    config = {
        "architectures": [prefix + (task if model.num_classes else "Model")],
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": len(list(model.blocks.children())),
        "num_attention_heads": described["num_heads"],
        # SwiGLU has one of its own
        "hidden_act": "gelu" if gated else HIDDEN_ACTS[described["act"]],
        "layer_norm_eps": described["norm_eps"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": model.img_size[0],
        "patch_size": model.patch_size[0],
        "num_channels": model.in_chans,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        **_labels(model.num_classes),
    }
    if not scaled:
        return config | {"intermediate_size": hidden}
    return config | {
        "mlp_ratio": ratio,
        "use_swiglu_ffn": gated,
        "num_register_tokens": registers,
        "use_mask_token": False,
    }


def transformers_resnet(model: ResNet) -> dict[str, Any]:
    options = resnet_arguments(model.state_dict())
    expected = {"groups": 1, "width_per_group": 64, "stem_width": None, "avg_down": False}
    different = [name for name, value in expected.items() if options.get(name, value) != value]
    if problems := [f"{name}={options[name]!r}" for name in different]:
        raise ValueError(f"save_model: transformers has no ResNet with {', '.join(problems)}")
    expansion, width = options["block"].expansion, options["width"]
    return {
        "architectures": ["ResNetForImageClassification" if model.num_classes else "ResNetModel"],
        "model_type": "resnet",
        "layer_type": "bottleneck" if expansion == 4 else "basic",
        "depths": list(options["layers"]),
        "embedding_size": width,
        "hidden_sizes": [width * expansion * 2**stage for stage in range(4)],
        "hidden_act": "relu",
        "num_channels": model.in_chans,
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        **_labels(model.num_classes),
    }


def _labels(num_classes: int) -> dict[str, Any]:
    names = {str(index): f"LABEL_{index}" for index in range(num_classes)}
    if not names:
        return {}
    return {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}
