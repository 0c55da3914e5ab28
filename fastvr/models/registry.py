"""Models by name: timm's names, one table a family."""

from __future__ import annotations

import difflib
import fnmatch
import re
from typing import Any, NamedTuple

from fastvr.models._model import Model
from fastvr.models.resnet import PRESETS as RESNET_PRESETS
from fastvr.models.resnet import ResNet
from fastvr.models.vit import PRESETS as VIT_PRESETS
from fastvr.models.vit import ViT
from fastvr.models.vit_distilled import DistilledViT
from fastvr.nn.residual import BasicBlock, Bottleneck


class Entry(NamedTuple):
    """How a model is made."""

    model: type[Model]
    arguments: dict[str, Any]
    tag: str | None = None
    """The weights that timm takes by default; :func:`repository` says where the hub has them."""


_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_MEDIUM = {"embed_dim": 512, "depth": 12, "num_heads": 8}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
_GIANT: dict[str, Any] = {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11}
_GIGANTIC: dict[str, Any] = {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13}
_GIANT2: dict[str, Any] = {"embed_dim": 1536, "depth": 40, "num_heads": 24, "act": "swiglu"}
_GIANTOPT: dict[str, Any] = {"embed_dim": 1536, "depth": 40, "num_heads": 16}
_SO400M: dict[str, Any] = {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362}

_GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}
_FEATURES: dict[str, Any] = {"num_classes": 0}
_MAP: dict[str, Any] = {"class_token": False, "global_pool": "map", **_FEATURES}
_MAP_TANH = {**_MAP, "act": "gelu_tanh"}
_SIGLIP = {**_GAP, **_FEATURES}
_SIGLIP_TANH = {**_SIGLIP, "act": "gelu_tanh"}
_DINOV2: dict[str, Any] = {**_FEATURES, "img_size": 518, "init_values": 1e-5}
_DINOV2_REG = {**_DINOV2, "reg_tokens": 4, "no_embed_class": True}
_CLIP: dict[str, Any] = {"pre_norm": True, "norm_eps": 1e-5}
_QUICK = {**_CLIP, "act": "quick_gelu"}
_DEIT3 = {"no_embed_class": True, "init_values": 1e-6}

# A name says patch and image size; the table what it does not say.
_VITS: dict[str, tuple[dict[str, Any], str | None]] = {
    "vit_tiny_patch16_224": (_TINY, "augreg_in21k_ft_in1k"),
    "vit_tiny_patch16_384": (_TINY, "augreg_in21k_ft_in1k"),
    "vit_small_patch32_224": (_SMALL, "augreg_in21k_ft_in1k"),
    "vit_small_patch32_384": (_SMALL, "augreg_in21k_ft_in1k"),
    "vit_small_patch16_224": (_SMALL, "augreg_in21k_ft_in1k"),
    "vit_small_patch16_384": (_SMALL, "augreg_in21k_ft_in1k"),
    "vit_small_patch8_224": ({**_SMALL, **_FEATURES}, "dino"),
    "vit_base_patch32_224": (_BASE, "augreg_in21k_ft_in1k"),
    "vit_base_patch32_384": (_BASE, "augreg_in21k_ft_in1k"),
    "vit_base_patch16_224": (_BASE, "augreg2_in21k_ft_in1k"),
    "vit_base_patch16_384": (_BASE, "augreg_in21k_ft_in1k"),
    "vit_base_patch8_224": (_BASE, "augreg2_in21k_ft_in1k"),
    "vit_large_patch32_224": ({**_LARGE, **_FEATURES}, "orig_in21k"),
    "vit_large_patch32_384": (_LARGE, "orig_in21k_ft_in1k"),
    "vit_large_patch16_224": (_LARGE, "augreg_in21k_ft_in1k"),
    "vit_large_patch16_384": (_LARGE, "augreg_in21k_ft_in1k"),
    "vit_large_patch14_224": (_LARGE, None),
    "vit_huge_patch14_224": ({**_HUGE, **_FEATURES}, "orig_in21k"),
    "vit_giant_patch14_224": (_GIANT, None),
    "vit_gigantic_patch14_224": (_GIGANTIC, None),
    "vit_huge_patch14_gap_224": ({**_HUGE, **_SIGLIP}, None),
    "vit_huge_patch16_gap_448": ({**_HUGE, **_SIGLIP}, None),
    "vit_base_patch16_siglip_gap_224": ({**_BASE, **_SIGLIP}, "v2_webli"),
    "vit_base_patch16_siglip_gap_256": ({**_BASE, **_SIGLIP}, "v2_webli"),
    "vit_base_patch16_siglip_gap_384": ({**_BASE, **_SIGLIP}, "v2_webli"),
    "vit_base_patch16_siglip_gap_512": ({**_BASE, **_SIGLIP}, "v2_webli"),
    "vit_base_patch32_siglip_gap_256": ({**_BASE, **_SIGLIP_TANH}, "v2_webli"),
    "vit_large_patch16_siglip_gap_256": ({**_LARGE, **_SIGLIP}, "v2_webli"),
    "vit_large_patch16_siglip_gap_384": ({**_LARGE, **_SIGLIP}, "v2_webli"),
    "vit_large_patch16_siglip_gap_512": ({**_LARGE, **_SIGLIP_TANH}, "v2_webli"),
    "vit_so400m_patch14_siglip_gap_224": ({**_SO400M, **_SIGLIP}, "v2_webli"),
    "vit_so400m_patch14_siglip_gap_378": ({**_SO400M, **_SIGLIP}, "v2_webli"),
    "vit_so400m_patch14_siglip_gap_384": ({**_SO400M, **_SIGLIP}, "webli"),
    "vit_so400m_patch14_siglip_gap_448": ({**_SO400M, **_SIGLIP}, "pali_mix"),
    "vit_so400m_patch14_siglip_gap_896": ({**_SO400M, **_SIGLIP}, "pali_pt"),
    "vit_so400m_patch16_siglip_gap_256": ({**_SO400M, **_SIGLIP_TANH}, "v2_webli"),
    "vit_so400m_patch16_siglip_gap_384": ({**_SO400M, **_SIGLIP_TANH}, "v2_webli"),
    "vit_so400m_patch16_siglip_gap_512": ({**_SO400M, **_SIGLIP_TANH}, "v2_webli"),
    "vit_giantopt_patch16_siglip_gap_256": ({**_GIANTOPT, **_SIGLIP_TANH}, "v2_webli"),
    "vit_giantopt_patch16_siglip_gap_384": ({**_GIANTOPT, **_SIGLIP_TANH}, "v2_webli"),
    "vit_base_patch16_siglip_224": ({**_BASE, **_MAP}, "v2_webli"),
    "vit_base_patch16_siglip_256": ({**_BASE, **_MAP}, "v2_webli"),
    "vit_base_patch16_siglip_384": ({**_BASE, **_MAP}, "v2_webli"),
    "vit_base_patch16_siglip_512": ({**_BASE, **_MAP}, "v2_webli"),
    "vit_base_patch32_siglip_256": ({**_BASE, **_MAP_TANH}, "v2_webli"),
    "vit_large_patch16_siglip_256": ({**_LARGE, **_MAP}, "v2_webli"),
    "vit_large_patch16_siglip_384": ({**_LARGE, **_MAP}, "v2_webli"),
    "vit_large_patch16_siglip_512": ({**_LARGE, **_MAP_TANH}, "v2_webli"),
    "vit_so400m_patch14_siglip_224": ({**_SO400M, **_MAP}, "v2_webli"),
    "vit_so400m_patch14_siglip_378": ({**_SO400M, **_MAP}, "v2_webli"),
    "vit_so400m_patch14_siglip_384": ({**_SO400M, **_MAP}, "webli"),
    "vit_so400m_patch16_siglip_256": ({**_SO400M, **_MAP_TANH}, "v2_webli"),
    "vit_so400m_patch16_siglip_384": ({**_SO400M, **_MAP_TANH}, "v2_webli"),
    "vit_so400m_patch16_siglip_512": ({**_SO400M, **_MAP_TANH}, "v2_webli"),
    "vit_giantopt_patch16_siglip_256": ({**_GIANTOPT, **_MAP_TANH}, "v2_webli"),
    "vit_giantopt_patch16_siglip_384": ({**_GIANTOPT, **_MAP_TANH}, "v2_webli"),
    # CLIP's with exact GELU
    "vit_base_patch32_clip_224": ({**_BASE, **_CLIP}, "laion2b_ft_in12k_in1k"),
    "vit_base_patch32_clip_256": ({**_BASE, **_CLIP, "num_classes": 512}, "datacompxl"),
    "vit_base_patch32_clip_384": ({**_BASE, **_CLIP}, "laion2b_ft_in12k_in1k"),
    "vit_base_patch32_clip_448": ({**_BASE, **_CLIP}, "laion2b_ft_in12k_in1k"),
    "vit_base_patch16_clip_224": ({**_BASE, **_CLIP}, "laion2b_ft_in12k_in1k"),
    "vit_base_patch16_clip_384": ({**_BASE, **_CLIP}, "laion2b_ft_in12k_in1k"),
    "vit_large_patch14_clip_224": ({**_LARGE, **_CLIP}, "laion2b_ft_in12k_in1k"),
    "vit_large_patch14_clip_336": ({**_LARGE, **_CLIP}, "laion2b_ft_in12k_in1k"),
    "vit_huge_patch14_clip_224": ({**_HUGE, **_CLIP}, "laion2b_ft_in12k_in1k"),
    "vit_huge_patch14_clip_336": ({**_HUGE, **_CLIP}, "laion2b_ft_in12k_in1k"),
    "vit_huge_patch14_clip_378": ({**_HUGE, **_CLIP, "num_classes": 1024}, "dfn5b"),
    "vit_giant_patch14_clip_224": ({**_GIANT, **_CLIP, "num_classes": 1024}, "laion2b"),
    "vit_gigantic_patch14_clip_224": ({**_GIGANTIC, **_CLIP, "num_classes": 1280}, "laion2b"),
    "vit_gigantic_patch14_clip_378": ({**_GIGANTIC, **_CLIP, "num_classes": 1280}, "metaclip2_worldwide"),
    # and with OpenAI's own
    "vit_base_patch32_clip_quickgelu_224": ({**_BASE, **_QUICK, "num_classes": 512}, "laion400m_e32"),
    "vit_base_patch16_clip_quickgelu_224": ({**_BASE, **_QUICK, "num_classes": 512}, "metaclip_2pt5b"),
    "vit_large_patch14_clip_quickgelu_224": ({**_LARGE, **_QUICK, "num_classes": 768}, "dfn2b"),
    "vit_large_patch14_clip_quickgelu_336": ({**_LARGE, **_QUICK, "num_classes": 768}, "openai"),
    "vit_huge_patch14_clip_quickgelu_224": ({**_HUGE, **_QUICK, "num_classes": 1024}, "dfn5b"),
    "vit_huge_patch14_clip_quickgelu_378": ({**_HUGE, **_QUICK, "num_classes": 1024}, "dfn5b"),
    "vit_gigantic_patch14_clip_quickgelu_224": (
        {**_GIGANTIC, **_QUICK, "num_classes": 1280},
        "metaclip_2pt5b",
    ),
    "vit_small_patch14_dinov2": ({**_SMALL, **_DINOV2}, "lvd142m"),
    "vit_base_patch14_dinov2": ({**_BASE, **_DINOV2}, "lvd142m"),
    "vit_large_patch14_dinov2": ({**_LARGE, **_DINOV2}, "lvd142m"),
    "vit_giant_patch14_dinov2": ({**_GIANT2, **_DINOV2, "mlp_ratio": 2.66667 * 2}, "lvd142m"),
    "vit_small_patch14_reg4_dinov2": ({**_SMALL, **_DINOV2_REG}, "lvd142m"),
    "vit_base_patch14_reg4_dinov2": ({**_BASE, **_DINOV2_REG}, "lvd142m"),
    "vit_large_patch14_reg4_dinov2": ({**_LARGE, **_DINOV2_REG}, "lvd142m"),
    "vit_giant_patch14_reg4_dinov2": ({**_GIANT2, **_DINOV2_REG, "mlp_ratio": 2.66667 * 2}, "lvd142m"),
}
_DEITS: dict[str, tuple[dict[str, Any], str | None]] = {
    "deit_tiny_patch16_224": (_TINY, "fb_in1k"),
    "deit_small_patch16_224": (_SMALL, "fb_in1k"),
    "deit_base_patch16_224": (_BASE, "fb_in1k"),
    "deit_base_patch16_384": (_BASE, "fb_in1k"),
    "deit_tiny_distilled_patch16_224": (_TINY, "fb_in1k"),
    "deit_small_distilled_patch16_224": (_SMALL, "fb_in1k"),
    "deit_base_distilled_patch16_224": (_BASE, "fb_in1k"),
    "deit_base_distilled_patch16_384": (_BASE, "fb_in1k"),
    "deit3_small_patch16_224": ({**_SMALL, **_DEIT3}, "fb_in1k"),
    "deit3_small_patch16_384": ({**_SMALL, **_DEIT3}, "fb_in1k"),
    "deit3_medium_patch16_224": ({**_MEDIUM, **_DEIT3}, "fb_in1k"),
    "deit3_base_patch16_224": ({**_BASE, **_DEIT3}, "fb_in1k"),
    "deit3_base_patch16_384": ({**_BASE, **_DEIT3}, "fb_in1k"),
    "deit3_large_patch16_224": ({**_LARGE, **_DEIT3}, "fb_in1k"),
    "deit3_large_patch16_384": ({**_LARGE, **_DEIT3}, "fb_in1k"),
    "deit3_huge_patch14_224": ({**_HUGE, **_DEIT3}, "fb_in1k"),
}

_LAYERS = {
    "18": (BasicBlock, (2, 2, 2, 2)),
    "26": (Bottleneck, (2, 2, 2, 2)),
    "34": (BasicBlock, (3, 4, 6, 3)),
    "50": (Bottleneck, (3, 4, 6, 3)),
    "101": (Bottleneck, (3, 4, 23, 3)),
    "152": (Bottleneck, (3, 8, 36, 3)),
    "200": (Bottleneck, (3, 24, 36, 3)),
}
_C: dict[str, Any] = {"stem_width": 32}
_D: dict[str, Any] = {"stem_width": 32, "avg_down": True}
# A name says the number of layers; the table what it does not say.
_RESNETS: dict[str, tuple[dict[str, Any], str | None]] = {
    "resnet18": ({}, "a1_in1k"),
    "resnet18d": (_D, "ra2_in1k"),
    "resnet26": ({}, "bt_in1k"),
    "resnet26d": (_D, "bt_in1k"),
    "resnet34": ({}, "a1_in1k"),
    "resnet34d": (_D, "ra2_in1k"),
    "resnet50": ({}, "a1_in1k"),
    "resnet50c": (_C, "gluon_in1k"),
    "resnet50d": (_D, "ra2_in1k"),
    "resnet101": ({}, "a1h_in1k"),
    "resnet101c": (_C, "gluon_in1k"),
    "resnet101d": (_D, "ra2_in1k"),
    "resnet152": ({}, "a1h_in1k"),
    "resnet152c": (_C, "gluon_in1k"),
    "resnet152d": (_D, "ra2_in1k"),
    "resnet200": ({}, None),
    "resnet200d": (_D, "ra2_in1k"),
    "resnext50_32x4d": ({"groups": 32, "width_per_group": 4}, "a1h_in1k"),
    "resnext50d_32x4d": ({"groups": 32, "width_per_group": 4, **_D}, "bt_in1k"),
    "resnext101_32x4d": ({"groups": 32, "width_per_group": 4}, "fb_ssl_yfcc100m_ft_in1k"),
    "resnext101_32x8d": ({"groups": 32, "width_per_group": 8}, "tv_in1k"),
    "resnext101_32x16d": ({"groups": 32, "width_per_group": 16}, "fb_wsl_ig1b_ft_in1k"),
    "resnext101_32x32d": ({"groups": 32, "width_per_group": 32}, "fb_wsl_ig1b_ft_in1k"),
    "resnext101_64x4d": ({"groups": 64, "width_per_group": 4}, "c1_in1k"),
    "wide_resnet50_2": ({"width_per_group": 128}, "racm_in1k"),
    "wide_resnet101_2": ({"width_per_group": 128}, "tv_in1k"),
}


def _vit(name: str, arguments: dict[str, Any], tag: str | None) -> Entry:
    sizes = {"patch_size": int(re.findall(r"patch(\d+)", name)[0])}
    if image := re.findall(r"_(\d+)$", name):
        sizes["img_size"] = int(image[0])
    return Entry(DistilledViT if "distilled" in name else ViT, {**sizes, **arguments}, tag)


def _resnet(name: str, arguments: dict[str, Any], tag: str | None) -> Entry:
    block, layers = _LAYERS[re.findall(r"\d+", name)[0]]
    return Entry(ResNet, {"block": block, "layers": layers, **arguments}, tag)


MODELS: dict[str, Entry] = {
    **{name: Entry(ViT, dict(arguments)) for name, arguments in VIT_PRESETS.items()},
    **{name: _vit(name, *row) for name, row in (_VITS | _DEITS).items()},
    **{name: _resnet(name, *row) for name, row in _RESNETS.items()},
}
assert MODELS.keys() >= RESNET_PRESETS.keys()


def list_models(filter: str = "*") -> list[str]:
    """The names that :func:`create_model` takes, of those that match ``filter`` (``*`` and ``?`` as in file
    names): "deit*", "*dinov2"."""
    return [name for name in MODELS if fnmatch.fnmatchcase(name, filter)]


def find(name: str) -> Entry:
    """How the model ``name`` is made.

    Raises:
        ValueError: no model has this name.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"create_model: name must be one of {', '.join(list_models()[:5])}, ... (list_models() has all "
            f"{len(MODELS)}); got {name!r}{hint}"
        )
    return MODELS[name]


def repository(name: str, tag: str) -> str:
    """Where the hub has timm's weights ``tag`` of the model ``name``."""
    # published under the name without its activation
    return f"timm/{name.replace('_quickgelu', '')}.{tag}"


def build_model(name: str, **overrides: Any) -> Model:
    """A model with fresh weights; ``overrides`` are arguments of :class:`ViT` or :class:`ResNet`.

    Raises:
        ValueError: no model has this name.
    """
    entry = find(name)
    return entry.model(**{**entry.arguments, **overrides})
