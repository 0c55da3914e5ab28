"""Which class of which library a family is for, by its path: the library need not be installed."""

from __future__ import annotations

from torch import nn

from fastvr.accelerate import encoder, generic, maps, timm, torchvision, transformers
from fastvr.accelerate.blocks import SplitAttention, path_of
from fastvr.accelerate.swap import Accelerated

_TORCH = {
    nn.LayerNorm: generic.FastLayerNorm,
    nn.Conv2d: generic.PatchConv,
    nn.MaxPool2d: generic.FastMaxPool,
    nn.Sequential: generic.FastSequential,
    nn.MultiheadAttention: encoder.MultiheadAttention,
    nn.TransformerEncoderLayer: encoder.TransformerEncoderLayer,
}

_TIMM = {
    "layers.norm.LayerNorm": generic.FastLayerNorm,
    "layers.attention.Attention": timm.TimmAttention,
    "models.vision_transformer.Attention": timm.TimmAttention,
    "layers.mlp.Mlp": timm.TimmMlp,
    "layers.mlp.GluMlp": timm.TimmGlu,
    "layers.mlp.SwiGLU": timm.TimmSplitGlu,
    "models.vision_transformer.Block": timm.TimmBlock,
    "layers.attention_pool.AttentionPoolLatent": timm.TimmAttentionPool,
    "models.eva.EvaBlock": timm.TimmEvaBlock,
    "models.resnet.BasicBlock": timm.TimmBasicBlock,
    "models.resnet.Bottleneck": timm.TimmBottleneck,
    "models.resnet.ResNet": timm.TimmResNet,
}

_TORCHVISION = {
    "models.vision_transformer.EncoderBlock": torchvision.EncoderBlock,
    "models.vision_transformer.MLPBlock": torchvision.MLPBlock,
    "models.resnet.BasicBlock": maps.FastBasicBlock,
    "models.resnet.Bottleneck": maps.FastBottleneck,
    "models.resnet.ResNet": torchvision.ResNet,
}


def _transformers(
    package: str, prefix: str, layer: type[Accelerated], kind: str = ""
) -> dict[str, type[Accelerated]]:
    path = f"{package}.modeling_{package}.{prefix}"
    attention = transformers.ClipAttention if layer is transformers.ClipLayer else SplitAttention
    return {
        f"{path}{kind}Layer": layer,
        f"{path}Attention": attention,
        f"{path}MLP": transformers.TransformersMlp,
    }


_REGISTERS = "dinov2_with_registers.modeling_dinov2_with_registers"
_TRANSFORMERS = {
    **_transformers("vit", "ViT", transformers.ViTLayer),
    **_transformers("deit", "DeiT", transformers.ViTLayer),
    **_transformers("vit_mae", "ViTMAE", transformers.ViTLayer),
    **_transformers("vit_msn", "ViTMSN", transformers.ViTLayer),
    **_transformers("dinov2", "Dinov2", transformers.Dinov2Layer),
    **_transformers("dinov2_with_registers", "Dinov2WithRegisters", transformers.Dinov2Layer),
    **_transformers("clip", "CLIP", transformers.ClipLayer, "Encoder"),
    **_transformers("siglip", "Siglip", transformers.ClipLayer, "Encoder"),
    **_transformers("siglip2", "Siglip2", transformers.ClipLayer, "Encoder"),
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer": transformers.Dinov3Layer,
    "siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead": transformers.SiglipPool,
    "dinov2.modeling_dinov2.Dinov2SwiGLUFFN": transformers.TransformersGlu,
    f"{_REGISTERS}.Dinov2WithRegistersSwiGLUFFN": transformers.TransformersGlu,
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTGatedMLP": transformers.TransformersGlu,
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTMLP": transformers.Dinov3Mlp,
    "resnet.modeling_resnet.ResNetConvLayer": transformers.ConvLayer,
    "resnet.modeling_resnet.ResNetShortCut": transformers.ConvLayer,
    "resnet.modeling_resnet.ResNetBasicLayer": transformers.ResNetBasicLayer,
    "resnet.modeling_resnet.ResNetBottleNeckLayer": transformers.ResNetBottleneckLayer,
    "resnet.modeling_resnet.ResNetStage": transformers.ResNetStage,
    "resnet.modeling_resnet.ResNetEmbeddings": transformers.ResNetEmbeddings,
}

FAMILIES: dict[str, type[Accelerated]] = {
    **{path_of(cls): family for cls, family in _TORCH.items()},
    **{f"timm.{path}": family for path, family in _TIMM.items()},
    **{f"torchvision.{path}": family for path, family in _TORCHVISION.items()},
    **{f"transformers.models.{path}": family for path, family in _TRANSFORMERS.items()},
}

# what is left to PyTorch, and why
REASONS = {
    "timm.layers.attention.AttentionRope": "rotary positions: attention stays PyTorch's",
    "timm.models.eva.EvaAttention": "rotary positions: attention stays PyTorch's",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention": (
        "rotary positions: attention stays PyTorch's"
    ),
    path_of(nn.Linear): "one matrix product with nothing around it: one launch already",
    path_of(nn.BatchNorm2d): "no convolution before it in the same nn.Sequential or known block",
    path_of(nn.TransformerDecoderLayer): "only its attention and its norms are accelerated",
}


def family_of(module: nn.Module) -> type[Accelerated] | None:
    """The family for exactly the class of ``module``, or None."""
    cls = type(module)
    found = FAMILIES.get(path_of(cls))
    # a sequence by another name, such as torchvision's Conv2dNormActivation, is one
    if found is None and isinstance(module, nn.Sequential) and cls.forward is nn.Sequential.forward:
        return generic.FastSequential
    return found
