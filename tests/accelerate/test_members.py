"""Members of the families as their libraries name them, each accelerated beside its own copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2}
PATCH14 = {**SMALL, "img_size": 42}

TIMM = {
    "deit_tiny_distilled_patch16_224": SMALL,
    "deit3_small_patch16_224": SMALL,
    "vit_small_patch14_dinov2": PATCH14,
    "vit_small_patch14_reg4_dinov2": PATCH14,
    "vit_giant_patch14_dinov2": {**PATCH14, "mlp_ratio": 4},
    "vit_base_patch16_clip_224": SMALL,
    "vit_base_patch32_clip_quickgelu_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "vit_base_patch16_siglip_gap_224": SMALL,
    "vit_so400m_patch14_siglip_224": PATCH14,
}


@pytest.mark.parametrize("name", TIMM)
def test_timms(name, hold) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **TIMM[name])
    size = TIMM[name]["img_size"]
    x = torch.randn(2, 3, size, size)
    _, ran = hold(model, x)
    assert ran["attention", "reference"] == 2
    assert ran["layer_norm", "reference"] >= 3


TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Callable[[Any], torch.Tensor]]] = {
    "vit classifier": ("ViTForImageClassification", {}, lambda y: y.logits),
    "vit pooler": ("ViTModel", {}, lambda y: y.pooler_output),
    "vit mae": ("ViTMAEModel", {"mask_ratio": 0.5}, lambda y: y.last_hidden_state),
    "deit classifier": ("DeiTForImageClassification", {}, lambda y: y.logits),
    "deit with teacher": ("DeiTForImageClassificationWithTeacher", {}, lambda y: y.distillation_logits),
    "dinov2 classifier": ("Dinov2ForImageClassification", {"mlp_ratio": 2}, lambda y: y.logits),
    "dinov2 registers classifier": (
        "Dinov2WithRegistersForImageClassification",
        {"mlp_ratio": 2},
        lambda y: y.logits,
    ),
    "clip pooler": ("CLIPVisionModel", {}, lambda y: y.pooler_output),
    "clip projection": ("CLIPVisionModelWithProjection", {"projection_dim": 8}, lambda y: y.image_embeds),
    "siglip attention pooling": ("SiglipVisionModel", {}, lambda y: y.pooler_output),
}


def _transformers(name: str, options: dict[str, Any]) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**sizes, image_size=32, patch_size=8, **options))


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers(kind, hold, images) -> None:
    name, options, get = TRANSFORMERS[kind]
    model = _transformers(name, options)
    # which patches ViTMAE masks is drawn, unless it is said
    given = {"noise": torch.linspace(0, 1, 32).view(2, 16)} if kind == "vit mae" else {}
    _, ran = hold(model, images, get=get, **given)
    assert ran["attention", "reference"] == 2
    assert ran["layer_norm", "reference"] >= 3
    # QuickGELU's own rounding is left to who computes it
    if "clip" not in kind:
        assert ran["layernorm_mlp", "reference"] >= 2


def test_resnet_classifier_of_transformers(hold, images) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1])
    _, ran = hold(transformers.ResNetForImageClassification(config), images, get=lambda y: y.logits)
    assert ran["conv_bn_relu", "reference"] == 16


def test_flops_are_counted_alike() -> None:
    """Also for what transformers computes around its layers."""
    from torch.utils.flop_counter import FlopCounterMode

    import fastvr

    with torch.device("meta"):
        model = _transformers("ViTForImageClassification", {})
        x = torch.empty(2, 3, 32, 32)

        def count() -> int:
            with FlopCounterMode(display=False) as counter:
                model(x).logits.sum().backward()
            return int(counter.get_total_flops())

        expected = count()
        fastvr.accelerate(model)
        with fastvr.use_backend("reference"):
            assert count() == expected
