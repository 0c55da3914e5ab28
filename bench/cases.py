"""The shapes that are measured, as data: a small list for a CPU and a real one for a GPU, per op.

Real shapes are the layers of ViT-S/B/L (patch 16) and ResNet-50 at 224 px; ``at_batch`` gives any of them
another batch. Random ones are in random_cases.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

REAL_BATCH = 64
MODELS: tuple[str, ...] = ("vit_b_16", "resnet50")
MORE_MODELS: tuple[str, ...] = ("vit_s_16", "vit_l_16")  # benchmarked alone, at the largest batch
DTYPES = ("float32", "float16", "bfloat16")
# what a model's layers are tuned and measured at
BATCHES = (1, 64, 256)
# a count of batch sizes that specialise differently if anything does: 1, odd, multiples of 16
TEN_BATCHES = (1, 2, 3, 5, 8, 16, 17, 32, 64, 100)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op: ``sizes`` are what ``inputs.make`` builds its arguments from."""

    op: str
    label: str
    sizes: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(op: str, label: str, **sizes: Any) -> Case:
        return Case(op, label, tuple(sizes.items()))

    def __getitem__(self, name: str) -> Any:
        return dict(self.sizes)[name]

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.sizes).get(name, default)

    def at_batch(self, batch: int) -> Case:
        return dataclasses.replace(self, sizes=tuple((dict(self.sizes) | {"batch": batch}).items()))

    def __str__(self) -> str:
        return f"{self.op}[{self.label} b{self['batch']}]"


ATTENTION = ("attention", "attention_training", "attention_backward")
BLOCK = ("layernorm_attention_training", "transformer_block_training")
SWIGLU = ("swiglu", "swiglu_backward")
MLP = ("layernorm_mlp", "layernorm_mlp_training")
MAX_POOL = ("max_pool", "max_pool_training", "max_pool_backward")
AVG_POOL_LINEAR = ("avg_pool_linear", "avg_pool_linear_training", "avg_pool_linear_backward")
ATTENTION_KV = ("attention_kv", "attention_kv_training", "attention_kv_backward")


def _vit(name: str, dim: int, batch: int = REAL_BATCH, tokens: int = 197) -> dict[str, list[Case]]:
    size: dict[str, Any] = {"batch": batch, "tokens": tokens}
    image = {"batch": batch, "channels": 3, "height": 224, "width": 224, "patch": 16, "dim": dim}
    return {
        "linear": [
            Case.of("linear", f"{name} qkv", **size, k=dim, n=3 * dim),
            Case.of("linear", f"{name} proj", **size, k=dim, n=dim, residual=True),
            Case.of("linear", f"{name} fc1", **size, k=dim, n=4 * dim, act="gelu"),
            Case.of("linear", f"{name} fc2", **size, k=4 * dim, n=dim, gamma=True, residual=True),
            Case.of("linear", f"{name} proj drop path", **size, k=dim, n=dim, residual=True, drop_path=True),
            Case.of("linear", f"{name} proj dropout", **size, k=dim, n=dim, residual=True, dropout=0.1),
            Case.of("linear", f"{name} head", batch=batch, tokens=None, k=dim, n=1000),
        ],
        "dropout": [Case.of("dropout", name, **size, dim=dim)],
        "linear_stats": [
            Case.of("linear_stats", f"{name} proj", **size, k=dim, n=dim, residual=True),
            Case.of("linear_stats", f"{name} fc2", **size, k=4 * dim, n=dim, gamma=True, residual=True),
        ],
        "norm_linear": [
            Case.of("norm_linear", f"{name} fc1", **size, k=dim, n=4 * dim, act="gelu"),
            Case.of("norm_linear", f"{name} qkv", **size, k=dim, n=3 * dim),
        ],
        **{op: [Case.of(op, name, **size, heads=dim // 64, head_dim=64)] for op in ATTENTION[:1]},
        **{
            op: [
                Case.of(op, name, **size, heads=dim // 64, head_dim=64),
                Case.of(op, f"{name} dropout", **size, heads=dim // 64, head_dim=64, dropout=0.1),
            ]
            for op in ATTENTION[1:]
        },
        **{
            op: [Case.of(op, f"{name} class token", **size, queries=1, heads=dim // 64, head_dim=64)]
            for op in ATTENTION_KV
        },
        "patch_embed": [
            Case.of("patch_embed", name, **image),
            Case.of("patch_embed", f"{name} uint8", **image, uint8=True),
        ],
        "patch_embed_stats": [
            Case.of("patch_embed_stats", name, **image),
            Case.of("patch_embed_stats", f"{name} uint8", **image, uint8=True, channels_last=True),
        ],
        "layer_norm": [Case.of("layer_norm", name, **size, dim=dim)],
        "layer_norm_backward": [Case.of("layer_norm_backward", name, **size, dim=dim)],
        **{op: [Case.of(op, name, **size, dim=8 * dim // 3)] for op in SWIGLU},
        "layernorm_mlp": [Case.of("layernorm_mlp", name, **size, dim=dim, hidden=4 * dim)],
        "layernorm_mlp_training": [
            Case.of("layernorm_mlp_training", name, **size, dim=dim, hidden=4 * dim),
            Case.of(
                "layernorm_mlp_training", f"{name} dropout", **size, dim=dim, hidden=4 * dim, dropout=0.1
            ),
        ],
        **{
            op: [
                Case.of(op, name, **size, heads=dim // 64, head_dim=64),
                Case.of(op, f"{name} dropout", **size, heads=dim // 64, head_dim=64, dropout=0.1),
            ]
            for op in BLOCK
        },
        "linear_weight_backward": [
            Case.of("linear_weight_backward", f"{name} {layer}", **size, k=k, n=n, norm=norm)
            for layer, k, n, norm in (
                ("qkv", dim, 3 * dim, True),
                ("proj", dim, dim, False),
                ("fc1", dim, 4 * dim, True),
                ("fc2", 4 * dim, dim, False),
            )
        ]
        + [
            Case.of(
                "linear_weight_backward",
                f"{name} fc2 drop path",
                **size,
                k=4 * dim,
                n=dim,
                norm=False,
                drop_path=True,
            )
        ],
        "linear_act_backward": [
            Case.of("linear_act_backward", f"{name} fc2", **size, k=4 * dim, n=dim),
            Case.of("linear_act_backward", f"{name} fc2 drop path", **size, k=4 * dim, n=dim, drop_path=True),
            Case.of("linear_act_backward", f"{name} fc2 dropout", **size, k=4 * dim, n=dim, dropout=0.1),
        ],
    }


def _resnet50(batch: int = REAL_BATCH) -> dict[str, list[Case]]:
    """Every distinct convolution of ResNet-50 v1.5 once, in the order of the network."""

    def conv(c: int, o: int, kernel: int, size: int, *, stride: int = 1, **rest: Any) -> Case:
        label = f"{c}->{o} {kernel}x{kernel}/{stride} {size}px"
        label += " +res" if rest.get("residual") else " uint8" if rest.get("uint8") else ""
        return Case.of(
            "conv_bn_relu", label, batch=batch, channels=c, out=o, kernel=kernel, stride=stride,
            padding=kernel // 2, height=size, width=size, **rest,
        )  # fmt: skip

    def dual(c: int, c2: int, o: int, size: int, *, stride: int) -> Case:
        return Case.of(
            "dual_conv_bn_relu", f"{c}+{c2}->{o} /{stride} {size}px", batch=batch, channels=c, channels2=c2,
            out=o, stride=stride, height=size, width=size,
        )  # fmt: skip

    def block(op: str, width: int, o: int, size: int, **rest: Any) -> Case:
        first = f" /{rest['stride']} {rest['source']}" if "source" in rest else " +res"
        return Case.of(
            op, f"{width}->{o} {size}px{first}", batch=batch, planes=width, out=o, height=size, width=size,
            **{"stride": 1, "residual": "source" not in rest} | rest,
        )  # fmt: skip

    def norm(c: int, size: int, **rest: Any) -> tuple[list[Case], list[Case]]:
        label = f"{c} {size}px" + (" +res" if rest.get("residual") else "")
        sizes = {"batch": batch, "channels": c, "height": size, "width": size, **rest}
        both = (Case.of(op, label, **sizes) for op in ("batch_norm_act", "batch_norm_act_backward"))
        forward, backward = ([case] for case in both)
        return forward, backward

    convs, duals, blocks = [conv(3, 64, 7, 224, stride=2), conv(3, 64, 7, 224, stride=2, uint8=True)], [], []
    trained: list[Any] = []
    # each map that a BatchNorm in training takes, by its size and what follows it
    norms, norm_gradients = norm(64, 112)
    channels, size = 64, 56
    for stage, width in enumerate((64, 128, 256, 512)):
        stride, wide = 1 if stage == 0 else 2, 4 * width
        inner = size // stride
        convs += [
            conv(channels, width, 1, size),
            conv(width, width, 3, size, stride=stride),
            conv(channels, wide, 1, size, stride=stride, act="none"),
            conv(width, wide, 1, inner, residual=True),
            conv(wide, width, 1, inner),
        ]
        if stride == 2:
            convs.append(conv(width, width, 3, inner))
        taken = [
            norm(width, inner),
            norm(wide, inner, residual=True),
            norm(wide, inner, act="none"),
            *([norm(width, size)] if stride == 2 else []),
        ]
        for forward, backward in taken:
            norms += forward
            norm_gradients += backward
        duals.append(dual(width, channels, wide, inner, stride=stride))
        trained += [(width, wide, inner, {"source": channels, "stride": stride}), (width, wide, inner, {})]
        if width <= 128:
            blocks += [(width, wide, inner, {"source": channels, "stride": stride}), (width, wide, inner, {})]
        channels, size = wide, inner
    norm_gradients.append(
        Case.of(
            "batch_norm_act_backward",
            "256 56px +res frozen",
            batch=batch,
            channels=256,
            height=56,
            width=56,
            residual=True,
            frozen=True,
        )
    )
    frozen = [case for case in convs if (case["height"], case["out"]) in ((56, 64), (56, 256), (7, 512))]
    return {
        "conv_bn_relu": convs,
        "conv_bn_relu_backward": [dataclasses.replace(case, op="conv_bn_relu_backward") for case in frozen],
        "dual_conv_bn_relu": duals,
        "batch_norm_act": norms,
        "batch_norm_act_backward": norm_gradients,
        **{
            op: [Case.of(op, "64 112px", batch=batch, channels=64, height=112, width=112)]
            for op in ("batch_norm_act_max_pool", "batch_norm_act_max_pool_backward")
        },
        "residual_block": [block("residual_block", *sizes, **rest) for *sizes, rest in trained],
        "residual_block_backward": [
            block("residual_block_backward", *sizes, **rest) for *sizes, rest in trained
        ],
        "bottleneck": [block("bottleneck", *sizes, **rest) for *sizes, rest in blocks],
        "bottleneck_chain": [
            block("bottleneck_chain", *sizes, **rest, following=sizes[0]) for *sizes, rest in blocks
        ],
        "conv_bn_relu_max_pool": [
            Case.of(
                "conv_bn_relu_max_pool",
                label,
                batch=batch,
                channels=3,
                out=64,
                kernel=7,
                stride=2,
                padding=3,
                height=224,
                width=224,
                **rest,
            )
            for label, rest in (("stem", {}), ("stem uint8", {"uint8": True}))
        ],
        **{op: [Case.of(op, "stem", batch=batch, channels=64, height=112, width=112)] for op in MAX_POOL},
        **{
            op: [Case.of(op, "head", batch=batch, channels=2048, height=7, width=7, n=1000)]
            for op in AVG_POOL_LINEAR
        },
    }


def _merged(parts: Iterable[dict[str, list[Case]]]) -> dict[str, list[Case]]:
    merged: dict[str, list[Case]] = {}
    for part in parts:
        for op, cases in part.items():
            merged.setdefault(op, []).extend(cases)
    return merged


REAL = _merged([_vit("ViT-B", 768), _vit("ViT-S", 384), _vit("ViT-L", 1024), _resnet50()])

SMALL: dict[str, list[Case]] = {
    "linear": [
        Case.of("linear", "fc1", batch=2, tokens=50, k=192, n=768, act="gelu"),
        Case.of("linear", "fc2", batch=2, tokens=50, k=768, n=192, gamma=True, residual=True),
        Case.of("linear", "head", batch=2, tokens=None, k=192, n=100),
    ],
    "dropout": [Case.of("dropout", "ViT-Ti", batch=2, tokens=50, dim=192)],
    "linear_stats": [Case.of("linear_stats", "proj", batch=2, tokens=50, k=192, n=192, residual=True)],
    "norm_linear": [Case.of("norm_linear", "fc1", batch=2, tokens=50, k=192, n=768, act="gelu")],
    **{op: [Case.of(op, "ViT-Ti", batch=2, tokens=50, heads=3, head_dim=64)] for op in ATTENTION},
    **{
        op: [Case.of(op, "class token", batch=2, tokens=50, queries=1, heads=3, head_dim=64)]
        for op in ATTENTION_KV
    },
    "patch_embed": [
        Case.of("patch_embed", "ViT-Ti", batch=2, channels=3, height=112, width=112, patch=16, dim=192)
    ],
    "patch_embed_stats": [
        Case.of(
            "patch_embed_stats", "ViT-Ti uint8", batch=2, channels=3, height=112, width=112, patch=16,
            dim=192, uint8=True,
        )
    ],
    "layer_norm": [Case.of("layer_norm", "ViT-Ti", batch=2, tokens=50, dim=192)],
    "layer_norm_backward": [Case.of("layer_norm_backward", "ViT-Ti", batch=2, tokens=50, dim=192)],
    **{op: [Case.of(op, "ViT-Ti", batch=2, tokens=50, dim=512)] for op in SWIGLU},
    **{op: [Case.of(op, "ViT-Ti", batch=2, tokens=50, dim=192, hidden=768)] for op in MLP},
    **{op: [Case.of(op, "ViT-Ti", batch=2, tokens=50, heads=3, head_dim=64)] for op in BLOCK},
    "linear_weight_backward": [
        Case.of("linear_weight_backward", "qkv", batch=2, tokens=50, k=192, n=576, norm=True)
    ],
    "linear_act_backward": [Case.of("linear_act_backward", "fc2", batch=2, tokens=50, k=768, n=192)],
    "conv_bn_relu": [
        Case.of(
            "conv_bn_relu", "3x3 +res", batch=2, channels=64, out=64, kernel=3, stride=1, padding=1,
            height=14, width=14, residual=True,
        ),
        Case.of(
            "conv_bn_relu", "stem", batch=2, channels=3, out=64, kernel=7, stride=2, padding=3,
            height=64, width=64,
        ),
    ],
    "conv_bn_relu_backward": [
        Case.of(
            "conv_bn_relu_backward", "3x3 +res", batch=2, channels=64, out=64, kernel=3, stride=1, padding=1,
            height=14, width=14, residual=True,
        ),
    ],
    "dual_conv_bn_relu": [
        Case.of(
            "dual_conv_bn_relu", "/2", batch=2, channels=32, channels2=64, out=128, stride=2,
            height=7, width=7,
        ),
    ],
    "batch_norm_act": [
        Case.of("batch_norm_act", "+res", batch=2, channels=64, height=14, width=14, residual=True),
    ],
    "batch_norm_act_backward": [
        Case.of("batch_norm_act_backward", "+res", batch=2, channels=64, height=14, width=14, residual=True),
        Case.of("batch_norm_act_backward", "frozen", batch=2, channels=64, height=14, width=14, frozen=True),
    ],
    **{
        op: [Case.of(op, "stem", batch=2, channels=16, height=14, width=14)]
        for op in ("batch_norm_act_max_pool", "batch_norm_act_max_pool_backward")
    },
    "residual_block": [
        Case.of(
            "residual_block", "+res", batch=2, planes=16, out=64, stride=1, residual=True, height=7, width=7,
        ),
    ],
    "residual_block_backward": [
        Case.of(
            "residual_block_backward", "+res", batch=2, planes=16, out=64, stride=1, residual=True,
            height=7, width=7,
        ),
    ],
    "bottleneck": [
        Case.of(
            "bottleneck", "/2", batch=2, planes=32, out=128, stride=2, source=64, height=7, width=7,
        ),
    ],
    "bottleneck_chain": [
        Case.of(
            "bottleneck_chain", "+res", batch=2, planes=64, out=128, stride=1, residual=True, following=64,
            height=7, width=7,
        ),
    ],
    "conv_bn_relu_max_pool": [
        Case.of(
            "conv_bn_relu_max_pool", "stem", batch=2, channels=3, out=64, kernel=7, stride=2, padding=3,
            height=32, width=32,
        ),
    ],
    **{op: [Case.of(op, "stem", batch=2, channels=64, height=28, width=28)] for op in MAX_POOL},
    **{op: [Case.of(op, "head", batch=2, channels=512, height=7, width=7, n=100)] for op in AVG_POOL_LINEAR},
}  # fmt: skip

OPS = tuple(SMALL)


def ops(dtype: str) -> tuple[str, ...]:
    """The ops with a kernel for ``dtype``: a LayerNorm is folded into 16-bit weights only."""
    return tuple(op for op in OPS if op != "norm_linear" or dtype != "float32")


def cases(op: str, *, real: bool) -> list[Case]:
    return (REAL if real else SMALL)[op]
