"""The arguments of a ViT's ops, by case."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from cases import Case
from maker import Builder, Maker, rows

from fastvr.reference.attention import attention_kv_training, attention_training
from fastvr.reference.layer_norm import row_moments
from fastvr.reference.linear_stats import row_stats


def _factors(case: Case, make: Maker) -> dict[str, Any]:
    """What stochastic depth multiplies samples by, where the case has it."""
    if not case.get("drop_path"):
        return {}
    wide = torch.promote_types(make.dtype, torch.float32)
    return {"sample_scale": (make.normal(case["batch"], like=wide) > -1).to(wide) / 0.8}


def _dropped(case: Case, make: Maker, *names: str) -> dict[str, Any]:
    """Rates and seeds by the names' beginnings, where the case has dropout."""
    if not (p := case.get("dropout")):
        return {}
    seeds = {f"{name}seed": torch.tensor([5, 6 + i], device=make.device) for i, name in enumerate(names)}
    return {f"{name}dropout_p": p for name in names} | seeds


def _dropout(case: Case, make: Maker) -> dict[str, Any]:
    rows_of = make.normal(*rows(case), case["dim"]).flatten(0, -2)
    return {"rows": rows_of, "p": 0.1, "seed": torch.tensor([5, 6], device=make.device)}


def _linear(case: Case, make: Maker) -> dict[str, Any]:
    k, n = case["k"], case["n"]
    return {
        "x": make.normal(*rows(case), k),
        "weight": make.normal(n, k, scale=k**-0.5),
        "bias": make.normal(n) if case.get("bias", True) else None,
        "act": case.get("act", "none"),
        "gamma": make.normal(n) if case.get("gamma") else None,
        "residual": make.normal(*rows(case), n) if case.get("residual") else None,
        **_factors(case, make),
        **_dropped(case, make, ""),
    }


def _by_rows(case: Case, make: Maker) -> dict[str, Any]:
    """linear's arguments with one dimension for samples and tokens: statistics have one for both."""
    given = _linear(case, make)
    for name in ("x", "residual"):
        given[name] = None if given[name] is None else given[name].flatten(0, -2)
    return given


def _norm_linear(case: Case, make: Maker) -> dict[str, Any]:
    given = _by_rows(case, make)
    x, weight = given["x"], given["weight"]
    return {
        "x": x,
        "stats": row_stats(x),
        "weight": weight,
        "colsum": weight.float().sum(1),
        "bias": None if given["bias"] is None else given["bias"].float(),
        "act": given["act"],
        "eps": 1e-6,
    }


def _attention(case: Case, make: Maker) -> dict[str, Any]:
    heads = case["heads"]
    return {"qkv": make.normal(*rows(case), 3 * heads * case["head_dim"]), "num_heads": heads}


def _attention_kv(case: Case, make: Maker) -> dict[str, Any]:
    heads, width = case["heads"], case["heads"] * case["head_dim"]
    q, kv = make.normal(case["batch"], case["queries"], width), make.normal(*rows(case), 2 * width)
    return {"q": q, "kv": kv, "num_heads": heads}


def _attention_training(case: Case, make: Maker) -> dict[str, Any]:
    return _attention(case, make) | {"scale": case["head_dim"] ** -0.5} | _dropped(case, make, "")


def _attention_kv_training(case: Case, make: Maker) -> dict[str, Any]:
    return _attention_kv(case, make) | {"scale": case["head_dim"] ** -0.5}


def _attention_backward(case: Case, make: Maker) -> dict[str, Any]:
    given = _attention_training(case, make)
    y, lse = attention_training(**given)
    return {"grad": make.normal(*y.shape), "y": y, "lse": lse, **given}


def _attention_kv_backward(case: Case, make: Maker) -> dict[str, Any]:
    given = _attention_kv_training(case, make)
    y, lse = attention_kv_training(**given)
    rest = {"y": y, "lse": lse, "num_heads": given["num_heads"], "scale": given["scale"]}
    needs = {"needs_q": True, "needs_kv": True}
    return {"grad": make.normal(*y.shape), "q": given["q"], "kv": given["kv"], **rest, **needs}


def _patch_embed(case: Case, make: Maker) -> dict[str, Any]:
    channels, patch, dim, prefix = case["channels"], case["patch"], case["dim"], case.get("prefix", 1)
    tokens = prefix + (case["height"] // patch) * (case["width"] // patch)
    shape, uint8 = (case["batch"], channels, case["height"], case["width"]), case.get("uint8")
    layout = torch.channels_last if case.get("channels_last") else torch.contiguous_format
    x = make.pixels(*shape) if uint8 else make.normal(*shape)
    weight = make.normal(dim, channels, patch, patch, scale=(channels * patch * patch) ** -0.5)
    return {
        "x": x.to(memory_format=layout),
        "weight": weight.to(memory_format=layout),
        "bias": make.normal(dim) if case.get("bias", True) else None,
        "pos_embed": make.normal(tokens, dim) if case.get("pos", True) else None,
        "prefix_tokens": make.normal(prefix, dim) if prefix else None,
        "mean": make.normal(channels, scale=0.05, shift=0.45, like=torch.float32) if uint8 else None,
        "std": make.normal(channels, scale=0.01, shift=0.25, like=torch.float32) if uint8 else None,
    }


def _layer_norm(case: Case, make: Maker) -> dict[str, Any]:
    dim = case["dim"]
    return {
        "x": make.normal(*rows(case), dim),
        "weight": make.normal(dim, scale=0.5, shift=1.0),
        "bias": make.normal(dim),
    }


def _layer_norm_backward(case: Case, make: Maker) -> dict[str, Any]:
    given = _layer_norm(case, make)
    del given["bias"]
    grad, residual = (make.normal(*given["x"].shape) for _ in range(2))
    return given | {
        "grad": grad,
        "residual": residual,
        "eps": 1e-6,
        "needs_x": True,
        "needs_parameters": True,
    }


def _swiglu(case: Case, make: Maker) -> dict[str, Any]:
    return {"x": make.normal(*rows(case), 2 * case["dim"])}


def _swiglu_backward(case: Case, make: Maker) -> dict[str, Any]:
    return {"grad": make.normal(*rows(case), case["dim"])} | _swiglu(case, make)


def _layernorm_mlp(case: Case, make: Maker) -> dict[str, Any]:
    dim, hidden = case["dim"], case["hidden"]
    return {
        "x": make.normal(*rows(case), dim),
        "ln_weight": make.normal(dim, scale=0.5, shift=1.0),
        "ln_bias": make.normal(dim),
        "fc1_weight": make.normal(hidden, dim, scale=dim**-0.5),
        "fc1_bias": make.normal(hidden),
        "fc2_weight": make.normal(dim, hidden, scale=hidden**-0.5),
        "fc2_bias": make.normal(dim),
        "act": case.get("act", "gelu"),
        "gamma": make.normal(dim) if case.get("gamma") else None,
        "residual": make.normal(*rows(case), dim) if case.get("residual", True) else None,
    }


def _layernorm_mlp_training(case: Case, make: Maker) -> dict[str, Any]:
    return _layernorm_mlp(case, make) | {"eps": 1e-6} | _dropped(case, make, "hidden_", "")


def _layernorm_attention_training(case: Case, make: Maker) -> dict[str, Any]:
    heads, width = case["heads"], case["heads"] * case["head_dim"]
    return {
        "x": make.normal(*rows(case), width),
        "ln_weight": make.normal(width, scale=0.5, shift=1.0),
        "ln_bias": make.normal(width),
        "qkv_weight": make.normal(3 * width, width, scale=width**-0.5),
        "qkv_bias": make.normal(3 * width),
        "proj_weight": make.normal(width, width, scale=width**-0.5),
        "proj_bias": make.normal(width),
        "gamma": None,
        "residual": make.normal(*rows(case), width),
        "num_heads": heads,
        "scale": case["head_dim"] ** -0.5,
        "eps": 1e-6,
        **_dropped(case, make, "", "proj_"),
    }


def _transformer_block_training(case: Case, make: Maker) -> dict[str, Any]:
    width = case["heads"] * case["head_dim"]
    attention = _layernorm_attention_training(case, make)
    sizes = tuple((dict(case.sizes) | {"dim": width, "hidden": 4 * width}).items())
    mlp = _layernorm_mlp(dataclasses.replace(case, sizes=sizes), make) | _dropped(case, make, "hidden_", "")
    halves = {f"attn_{name}": value for name, value in attention.items()}
    halves |= {f"mlp_{name}": value for name, value in mlp.items()}
    return halves | {
        "x": attention["x"].to(torch.promote_types(make.dtype, torch.float32)),
        "num_heads": attention["num_heads"],
        "scale": attention["scale"],
        "mlp_eps": 1e-6,
        "act": "gelu",
    }


def _linear_weight_backward(case: Case, make: Maker) -> dict[str, Any]:
    k, norm = case["k"], case["norm"]
    x = make.normal(*rows(case), k).flatten(0, -2)
    return {
        "grad": make.normal(*rows(case), case["n"]).flatten(0, -2),
        "x": x,
        "ln_weight": make.normal(k, scale=0.5, shift=1.0) if norm else None,
        "ln_bias": make.normal(k) if norm else None,
        "moments": row_moments(x, 1e-6) if norm else None,
        "needs_bias": case.get("bias", True),
        "out_dtype": None,
        **_factors(case, make),
    }


def _linear_act_backward(case: Case, make: Maker) -> dict[str, Any]:
    return {
        "grad": make.normal(*rows(case), case["n"]).flatten(0, -2),
        "weight": make.normal(case["n"], case["k"], scale=case["n"] ** -0.5),
        "hidden": make.normal(*rows(case), case["k"]).flatten(0, -2),
        "act": case.get("act", "gelu"),
        "needs_activated": True,
        **_factors(case, make),
        **_dropped(case, make, ""),
    }


BUILDERS: dict[str, Builder] = {
    "linear": _linear,
    "linear_stats": _by_rows,
    "norm_linear": _norm_linear,
    "attention": _attention,
    "attention_kv": _attention_kv,
    "attention_training": _attention_training,
    "attention_kv_training": _attention_kv_training,
    "attention_backward": _attention_backward,
    "attention_kv_backward": _attention_kv_backward,
    "patch_embed": _patch_embed,
    "patch_embed_stats": _patch_embed,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "dropout": _dropout,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "layernorm_mlp": _layernorm_mlp,
    "layernorm_mlp_training": _layernorm_mlp_training,
    "layernorm_attention_training": _layernorm_attention_training,
    "transformer_block_training": _transformer_block_training,
    "linear_weight_backward": _linear_weight_backward,
    "linear_act_backward": _linear_act_backward,
}
