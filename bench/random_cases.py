"""Random shapes, from the grid that the project promises to be right on."""

from __future__ import annotations

import random
from typing import Any

from cases import ATTENTION, ATTENTION_KV, AVG_POOL_LINEAR, BLOCK, MAX_POOL, MLP, SWIGLU, Case

# What random cases draw from. Flags and compile-time sizes come as a few fixed kinds, since each combination
# is a binary of its own, which takes a second to compile; sizes that vary at run time span the whole grid.
_Kinds = dict[str, list[dict[str, Any]]]
_HEADS: list[dict[str, Any]] = [
    {"heads": heads, "head_dim": dim}
    for heads, dim in ((3, 64), (12, 64), (2, 32), (3, 40), (2, 72), (2, 80), (1, 96), (2, 128))
]
_HEADS_KV: list[dict[str, Any]] = [
    {"heads": heads, "head_dim": dim, "queries": queries}
    for heads, dim, queries in ((12, 64, 1), (2, 80, 1), (3, 32, 2), (2, 128, 70))
]
_RESIDUAL_BLOCKS: list[dict[str, Any]] = [
    {"planes": 16, "out": 64, "stride": 1, "residual": True},
    {"planes": 72, "out": 96, "stride": 2, "source": 24},
    {"planes": 8, "out": 31, "stride": 1, "source": 31},
]
_KINDS: _Kinds = {
    "linear": [
        {"act": "none"},
        {"act": "gelu", "gamma": True, "residual": True},
        {"act": "relu", "bias": False, "residual": True},
        {"act": "gelu_tanh", "drop_path": True},
        {"act": "quick_gelu"},
        {"act": "gelu", "gamma": True, "dropout": 0.1},
    ],
    "linear_stats": [{"residual": True}, {"act": "gelu", "gamma": True, "bias": False}],
    "norm_linear": [{"act": "gelu"}, {"act": "none", "bias": False}],
    **dict.fromkeys(ATTENTION, _HEADS),
    **dict.fromkeys(ATTENTION_KV, _HEADS_KV),
    "patch_embed": [
        {"channels": 3, "patch": 16},
        {"channels": 3, "patch": 14, "prefix": 5},
        {"channels": 1, "patch": 16, "prefix": 0, "bias": False, "pos": False},
        {"channels": 4, "patch": 8, "prefix": 0},
        {"channels": 3, "patch": 16, "uint8": True},
    ],
    "patch_embed_stats": [
        {"channels": 3, "patch": 16},
        {"channels": 3, "patch": 14, "prefix": 5, "uint8": True, "channels_last": True},
    ],
    "layer_norm": [{}],
    "layer_norm_backward": [{}],
    **{op: [{}] for op in (*SWIGLU, "dropout")},
    "layernorm_mlp": [
        {"act": "gelu", "gamma": True},
        {"act": "relu", "residual": False},
        {"act": "gelu_tanh"},
    ],
    "layernorm_mlp_training": [
        {"act": "gelu", "gamma": True},
        {"act": "relu", "residual": False},
        {"act": "gelu", "dropout": 0.2},
    ],
    **dict.fromkeys(BLOCK, _HEADS),
    "linear_weight_backward": [
        {"norm": True},
        {"norm": False},
        {"norm": False, "bias": False},
        {"norm": False, "drop_path": True},
    ],
    "linear_act_backward": [
        {"act": "gelu"},
        {"act": "gelu_tanh"},
        {"act": "quick_gelu"},
        {"act": "relu", "drop_path": True},
        {"act": "gelu", "dropout": 0.2},
    ],
    "conv_bn_relu": [
        {"channels": c, "out": o, "kernel": k, "stride": s, "padding": p} | rest
        for c, o, k, s, p, rest in (
            (3, 64, 7, 2, 3, {}),
            (3, 64, 7, 2, 3, {"uint8": True}),
            (64, 64, 3, 1, 1, {"residual": True}),
            (64, 31, 3, 2, 1, {"act": "none", "norm": "scale"}),
            (64, 128, 3, 1, 0, {"groups": 32}),
            (64, 128, 1, 2, 0, {"act": "none"}),
            (128, 64, 1, 1, 0, {"residual": True, "norm": "scale"}),
            (31, 64, 1, 1, 1, {"norm": "scale"}),
            (1, 31, 7, 1, 3, {"residual": True}),
        )
    ],
    "conv_bn_relu_backward": [
        {"channels": 64, "out": 64, "kernel": 3, "stride": 1, "padding": 1, "residual": True},
        {"channels": 31, "out": 64, "kernel": 1, "stride": 2, "padding": 0, "act": "none"},
        {"channels": 64, "out": 128, "kernel": 3, "stride": 2, "padding": 1, "groups": 32, "norm": "scale"},
    ],
    "dual_conv_bn_relu": [
        {"channels": c, "channels2": c2, "out": o, "stride": s} | rest
        for c, c2, o, s, rest in (
            (64, 256, 128, 2, {}),
            (64, 64, 256, 1, {}),
            (31, 64, 96, 3, {"act": "none"}),
            (128, 1, 31, 1, {}),
        )
    ],
    "batch_norm_act": [{}, {"residual": True}, {"act": "none"}],
    "batch_norm_act_backward": [{}, {"residual": True}, {"act": "none"}, {"residual": True, "frozen": True}],
    "batch_norm_act_max_pool": [{}],
    "batch_norm_act_max_pool_backward": [{}],
    "residual_block": _RESIDUAL_BLOCKS,
    "residual_block_backward": _RESIDUAL_BLOCKS,
    "bottleneck": [
        {"planes": 64, "out": 256, "stride": 1, "residual": True},
        {"planes": 64, "out": 64, "stride": 2, "source": 64},
        {"planes": 16, "out": 192, "stride": 1},
        {"planes": 128, "out": 128, "stride": 2, "source": 256},
    ],
    "bottleneck_chain": [
        {"planes": 64, "out": 256, "stride": 1, "residual": True, "following": 128},
        {"planes": 32, "out": 64, "stride": 2, "source": 64, "following": 32},
        {"planes": 128, "out": 128, "stride": 1, "following": 128},
    ],
    "conv_bn_relu_max_pool": [
        {"channels": 3, "out": 64, "kernel": 7, "stride": 2, "padding": 3},
        {"channels": 3, "out": 64, "kernel": 7, "stride": 2, "padding": 3, "uint8": True},
        {"channels": 1, "out": 31, "kernel": 3, "stride": 1, "padding": 1},
    ],
    **{op: [{}] for op in MAX_POOL},
    **{op: [{}, {"bias": False}] for op in AVG_POOL_LINEAR},
}  # fmt: skip
_BIG_CONVOLUTIONS = [
    {"channels": 512, "out": 2048, "kernel": 1, "stride": 1, "padding": 0, "residual": True},
    {"channels": 2048, "out": 512, "kernel": 1, "stride": 1, "padding": 0},
    {"channels": 512, "out": 512, "kernel": 3, "stride": 1, "padding": 1},
]


def random_case(op: str, rng: random.Random, *, small: bool) -> Case:
    """A case of ``op`` from the promised grid; ``small`` keeps it fit for the interpreter."""

    def pick(*values: Any, large: tuple[Any, ...] = ()) -> Any:
        return rng.choice(values if small else values + large)

    if op not in _KINDS:
        raise ValueError(f"no random shapes are known for the op {op!r}")
    extra = _BIG_CONVOLUTIONS if op == "conv_bn_relu" and not small else []
    drawn = {"batch": pick(1, 2, 3, large=(7, 33))} | rng.choice(_KINDS[op] + extra)
    tokens = pick(1, 5, 17, 50, large=(49, 196, 197, 201, 257, 577, 1025, 1370))
    width = pick(1, 31, 96, 192, large=(384, 768, 1023, 1280, 1500))
    if op in ("linear", "linear_stats", "norm_linear", "linear_weight_backward", "linear_act_backward"):
        drawn |= {"tokens": pick(None, tokens), "k": width, "n": pick(1, 31, 192, 257, large=(1500,))}
    elif op in (*ATTENTION, *ATTENTION_KV, *BLOCK):
        drawn |= {"tokens": tokens}
    elif op in ("patch_embed", "patch_embed_stats"):
        rows, columns = pick(1, 2, 3, large=(7, 14)), pick(1, 2, 3, large=(5, 14))
        drawn |= {"height": rows * drawn["patch"], "width": columns * drawn["patch"], "dim": max(width, 8)}
    elif op in ("layer_norm", "layer_norm_backward", "dropout", *SWIGLU):
        drawn |= {"tokens": tokens, "dim": width}
    elif op in MLP:
        drawn |= {"tokens": tokens, "dim": width, "hidden": pick(1, 48, 128, large=(31, 768, 1536))}
    elif "conv_bn_relu" in op or "bottleneck" in op or "residual_block" in op:
        drawn |= {"height": pick(7, 14, large=(31, 56)), "width": pick(7, 14, large=(28,))}
    elif op in ("batch_norm_act", "batch_norm_act_backward"):
        drawn |= {"channels": pick(1, 31, 64, 130, large=(512, 2048))}
        drawn |= {"height": pick(7, 14, 31), "width": pick(7, 14, large=(56,))}
    elif "max_pool" in op:
        drawn |= {"channels": pick(1, 31, 64), "height": pick(7, 14, 31), "width": pick(7, 14, 56)}
    else:
        drawn |= {"channels": pick(1, 31, 512, large=(2048,)), "height": pick(1, 7, 14), "width": pick(1, 7)}
        drawn |= {"n": pick(1, 10, 1000)}
    return Case.of(op, f"random {rng.randrange(10**6):06d}", **drawn)
