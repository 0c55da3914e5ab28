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
_WEE = {"embed_dim": 256, "depth": 14, "num_heads": 4, "mlp_ratio": 5}
_LITTLE: dict[str, Any] = {"embed_dim": 320, "depth": 14, "num_heads": 5, "mlp_ratio": 5.6}
_BETWIXT = {"embed_dim": 640, "depth": 12, "num_heads": 10}
_PLUS = {"embed_dim": 896, "depth": 12, "num_heads": 14}
_SO150M: dict[str, Any] = {"embed_dim": 896, "depth": 18, "num_heads": 14, "mlp_ratio": 2.572}
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
_DINOV2_REG = {**_DINOV2, "no_embed_class": True}
_TIPS: dict[str, Any] = {**_FEATURES, "img_size": 448, "init_values": 1.0, "no_embed_class": True}
_NO_NORM: dict[str, Any] = {**_FEATURES, "final_norm": False}
_RADIO = {**_NO_NORM, "img_size": 512, "no_embed_class": True}
# timm's own small ones: average pooling, with registers or without
_REG = {"class_token": False, "global_pool": "avg", "init_values": 1e-5, "no_embed_class": True}
_SO150M_REG = {"class_token": False, "global_pool": "avg", "fc_norm": False}
_MEDIUM_GAP = {**_MEDIUM, **_GAP, "qkv_bias": False, "init_values": 1e-6}
_FLEXI: dict[str, Any] = {"patch_size": 16, "img_size": 240, "no_embed_class": True}
_CLIP: dict[str, Any] = {"pre_norm": True, "norm_eps": 1e-5}
_QUICK = {**_CLIP, "act": "quick_gelu"}
_DEIT3 = {"no_embed_class": True, "init_values": 1e-6}

_SO150M2: dict[str, Any] = {"embed_dim": 832, "depth": 21, "num_heads": 13, "mlp_ratio": 34 / 13}
_SO150M2_REG = {**_SO150M2, **_REG, "qkv_bias": False, "no_embed_class": False}

# A name says patch, image size and registers; the table what it does not say.
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
    "vit_small_patch16_36x1_224": ({**_SMALL, "depth": 36, "init_values": 1e-5}, None),
    "vit_base_patch16_plus_240": ({**_PLUS, "init_values": 1e-5}, None),
    "vit_base_patch32_plus_256": ({**_PLUS, "init_values": 1e-5}, None),
    "vit_base_patch16_224_miil": ({**_BASE, "qkv_bias": False, "num_classes": 11221}, "in21k"),
    "flexivit_small": ({**_SMALL, **_FLEXI}, "1200ep_in1k"),
    "flexivit_base": ({**_BASE, **_FLEXI}, "1200ep_in1k"),
    "flexivit_large": ({**_LARGE, **_FLEXI}, "1200ep_in1k"),
    "eva_large_patch14_196": ({**_LARGE, "global_pool": "avg"}, "in22k_ft_in22k_in1k"),
    "eva_large_patch14_336": ({**_LARGE, "global_pool": "avg"}, "in22k_ft_in22k_in1k"),
    "vit_giant_patch16_gap_224": ({**_GIANT, **_SIGLIP}, None),
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
    "vit_xsmall_patch16_clip_224": (
        {**_WEE, **_CLIP, "depth": 10, "mlp_ratio": 4, "num_classes": 512},
        "tinyclip_yfcc15m",
    ),
    "vit_medium_patch16_clip_224": ({**_MEDIUM, **_CLIP, "num_classes": 512}, "tinyclip_yfcc15m"),
    "vit_medium_patch32_clip_224": ({**_MEDIUM, **_CLIP, "num_classes": 512}, "tinyclip_laion400m"),
    "vit_betwixt_patch32_clip_224": ({**_BETWIXT, **_CLIP, "num_classes": 512}, "tinyclip_laion400m"),
    "vit_base_patch16_plus_clip_240": ({**_PLUS, **_CLIP, "num_classes": 640}, "laion400m_e32"),
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
    "vit_intern300m_patch14_448": (
        {**_LARGE, **_NO_NORM, "init_values": 0.1, "dynamic_img_size": True},
        "ogvl_dist",
    ),
    "vit_base_patch16_radio_v3": ({**_BASE, **_RADIO, "reg_tokens": 7, "init_values": 1e-5}, "c_radio"),
    "vit_large_patch16_radio_v3": ({**_LARGE, **_RADIO, "reg_tokens": 7, "init_values": 1e-5}, "c_radio"),
    "vit_huge_patch16_radio_v3": ({**_HUGE, **_RADIO, "reg_tokens": 7}, "c_radio"),
    "vit_huge_patch16_radio_v4": ({**_HUGE, **_RADIO, "reg_tokens": 9}, "c_radio"),
    "vit_giant_patch16_radio_v3": ({**_GIANTOPT, **_RADIO, "num_heads": 24, "reg_tokens": 7}, "c_radio"),
    "vit_so400m_patch16_radio_v4": (
        {**_SO400M, **_RADIO, "mlp_ratio": 4304 / 1152, "reg_tokens": 9},
        "c_radio",
    ),
    "vit_base_patch14_reg1_tipsv2": ({**_BASE, **_TIPS}, "webli"),
    "vit_large_patch14_reg1_tipsv2": ({**_LARGE, **_TIPS}, "webli"),
    "vit_so400m_patch14_reg1_tipsv2": ({**_SO400M, **_TIPS, "mlp_ratio": 4304 / 1152}, "webli"),
    "vit_giant_patch14_reg1_tipsv2": ({**_GIANT2, **_TIPS, "mlp_ratio": 2.66667 * 2}, "webli"),
}
_SBB: dict[str, tuple[dict[str, Any], str | None]] = {
    "vit_wee_patch16_reg1_gap_256": ({**_WEE, **_REG}, "sbb_in1k"),
    "vit_little_patch16_reg1_gap_256": ({**_LITTLE, **_REG}, "sbb_in12k_ft_in1k"),
    "vit_little_patch16_reg4_gap_256": ({**_LITTLE, **_REG}, "sbb_in1k"),
    "vit_medium_patch16_gap_240": ({**_MEDIUM_GAP, "num_classes": 11821}, "sw_in12k"),
    "vit_medium_patch16_gap_256": (_MEDIUM_GAP, "sw_in12k_ft_in1k"),
    "vit_medium_patch16_gap_384": (_MEDIUM_GAP, "sw_in12k_ft_in1k"),
    "vit_medium_patch16_reg1_gap_256": ({**_MEDIUM, **_REG}, "sbb_in1k"),
    "vit_medium_patch16_reg4_gap_256": ({**_MEDIUM, **_REG}, "sbb_in12k_ft_in1k"),
    "vit_mediumd_patch16_reg4_gap_256": ({**_MEDIUM, **_REG, "depth": 20}, "sbb2_e200_in12k_ft_in1k"),
    "vit_mediumd_patch16_reg4_gap_384": ({**_MEDIUM, **_REG, "depth": 20}, "sbb2_e200_in12k_ft_in1k"),
    "vit_betwixt_patch16_gap_256": ({**_BETWIXT, **_GAP, "qkv_bias": False, "init_values": 1e-6}, None),
    "vit_betwixt_patch16_reg1_gap_256": ({**_BETWIXT, **_REG}, "sbb_in1k"),
    "vit_betwixt_patch16_reg4_gap_256": ({**_BETWIXT, **_REG}, "sbb2_e200_in12k_ft_in1k"),
    "vit_betwixt_patch16_reg4_gap_384": ({**_BETWIXT, **_REG}, "sbb2_e200_in12k_ft_in1k"),
    "vit_base_patch16_reg4_gap_256": ({**_BASE, **_REG, "init_values": None}, None),
    "vit_so150m_patch16_reg4_gap_256": ({**_SO150M, **_SO150M_REG}, "sbb_e250_in12k_ft_in1k"),
    "vit_so150m_patch16_reg4_gap_384": ({**_SO150M, **_SO150M_REG}, "sbb_e250_in12k_ft_in1k"),
    "vit_so150m_patch16_reg4_map_256": ({**_SO150M, **_MAP, "num_classes": 1000}, None),
    "vit_so150m2_patch16_reg1_gap_256": (_SO150M2_REG, "sbb_e200_in12k_ft_in1k"),
    "vit_so150m2_patch16_reg1_gap_384": (_SO150M2_REG, "sbb_e200_in12k_ft_in1k"),
    "vit_so150m2_patch16_reg1_gap_448": (_SO150M2_REG, "sbb_e200_in12k_ft_in1k"),
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
    written = {"patch_size": r"patch(\d+)", "img_size": r"_(\d+)$", "reg_tokens": r"_reg(\d)_"}
    found = {argument: re.findall(pattern, name) for argument, pattern in written.items()}
    sizes = {argument: int(numbers[0]) for argument, numbers in found.items() if numbers}
    return Entry(DistilledViT if "distilled" in name else ViT, {**sizes, **arguments}, tag)


def _resnet(name: str, arguments: dict[str, Any], tag: str | None) -> Entry:
    block, layers = _LAYERS[re.findall(r"\d+", name)[0]]
    return Entry(ResNet, {"block": block, "layers": layers, **arguments}, tag)


MODELS: dict[str, Entry] = {
    **{name: Entry(ViT, dict(arguments)) for name, arguments in VIT_PRESETS.items()},
    **{name: _vit(name, *row) for name, row in (_VITS | _SBB | _DEITS).items()},
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
