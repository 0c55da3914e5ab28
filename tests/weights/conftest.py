"""Small models of other libraries, with weights that leave no value at its initial 0 or 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

# depth, width and sizes of every small ViT here
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CLASSES = 5
_TEXT = ("hidden_size", "intermediate_size")


class EncoderViT(nn.Module):
    """The ViT that many tutorials print, but with ``batch_first=True``."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 32, kernel_size=8, stride=8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 32))
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.transformer_encoder(x))[:, 0])


def transformers_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    common = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": CLASSES,
    }
    if kind == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], num_labels=CLASSES
        )
        return transformers.ResNetForImageClassification(config)
    if kind == "resnet-basic":
        config = transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 32, 64],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            num_labels=CLASSES,
        )
        return transformers.ResNetForImageClassification(config)
    if kind.startswith("dinov2"):
        name = "Dinov2WithRegisters" if kind == "dinov2-registers" else "Dinov2"
        gated = {"use_swiglu_ffn": kind == "dinov2-giant"}
        return getattr(transformers, f"{name}Model")(
            getattr(transformers, f"{name}Config")(**common, **gated)
        )
    if kind in ("clip", "clip-projection"):
        config = transformers.CLIPVisionConfig(intermediate_size=64, projection_dim=CLASSES, **common)
        projected = "WithProjection" if kind == "clip-projection" else ""
        return getattr(transformers, f"CLIPVisionModel{projected}")(config)
    if kind == "clip-classifier":
        towers = transformers.CLIPConfig(
            vision_config={"intermediate_size": 64, **common},
            text_config={"vocab_size": 9, "num_hidden_layers": 1, **dict.fromkeys(_TEXT, 32)},
            num_labels=CLASSES,
        )
        return transformers.CLIPForImageClassification(towers)
    if kind == "siglip":
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(intermediate_size=64, **common))
    if kind == "siglip-classifier":
        towers = transformers.SiglipConfig(
            vision_config={"intermediate_size": 64, **common},
            text_config={"vocab_size": 9, "num_hidden_layers": 1, **dict.fromkeys(_TEXT, 32)},
            num_labels=CLASSES,
        )
        return transformers.SiglipForImageClassification(towers)
    if kind == "vit-backbone":
        return transformers.ViTModel(transformers.ViTConfig(intermediate_size=64, **common))
    name, task = {
        "vit": ("ViT", "ImageClassification"),
        "deit": ("DeiT", "ImageClassification"),
        "deit-teacher": ("DeiT", "ImageClassificationWithTeacher"),
    }[kind]
    config = getattr(transformers, f"{name}Config")(intermediate_size=64, **common)
    return getattr(transformers, f"{name}For{task}")(config)


def peer(kind: str) -> nn.Module:
    import timm.models.resnet
    import timm.models.vision_transformer
    import torchvision

    if kind.startswith("transformers-"):
        return transformers_model(kind.removeprefix("transformers-"))
    makers: dict[str, Callable[[], nn.Module]] = {
        "encoder": EncoderViT,
        "timm-vit": lambda: timm.models.vision_transformer.VisionTransformer(
            **VIT, num_classes=CLASSES, init_values=0.1, reg_tokens=2, mlp_ratio=2
        ),
        "timm-qk-norm": lambda: timm.models.vision_transformer.VisionTransformer(
            **VIT, num_classes=CLASSES, qk_norm=True
        ),
        "timm-giant": lambda: timm.models.vision_transformer.VisionTransformer(
            **VIT,
            num_classes=CLASSES,
            init_values=0.1,
            mlp_ratio=5.5,
            mlp_layer=timm.layers.SwiGLUPacked,
            act_layer=nn.SiLU,
        ),
        "timm-resnet": lambda: timm.models.resnet.ResNet(
            timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=CLASSES
        ),
        "torchvision-vit": lambda: torchvision.models.VisionTransformer(
            32, 8, 2, 2, 32, 64, num_classes=CLASSES
        ),
        "torchvision-resnet": lambda: torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES
        ),
    }
    return makers[kind]()


@pytest.fixture
def make_peer() -> Callable[[str], nn.Module]:
    """Another library's small model in eval, by kind: "timm-vit", "transformers-deit", "encoder", ..."""

    def make(kind: str) -> nn.Module:
        torch.manual_seed(3)
        model = peer(kind)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 2.0)
            for parameter in model.parameters():
                if parameter.dim() != 4:
                    parameter += 0.1 * torch.randn(parameter.shape)
        return model.eval()

    return make
