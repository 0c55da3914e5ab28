"""transformers' ViTs (DeiT, DINOv2, CLIP, SigLIP towers too; DINOv3 around its attention) and ResNets."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from fastvr.accelerate.blocks import (
    IDENTITY,
    FastMlp,
    SplitAttention,
    asks,
    fusable,
    residual_branch,
)
from fastvr.accelerate.encoder import MultiheadAttention
from fastvr.accelerate.glu import SplitGlu
from fastvr.accelerate.maps import MAPS, FastBasicBlock, FastBottleneck, conv_bn_act, run_blocks, takes_map
from fastvr.accelerate.swap import Accelerated, takes, unobserved
from fastvr.nn.plain import idle, plain
from fastvr.nn.stem import stem


class ClipAttention(SplitAttention):
    scale_name = "scale"
    heads_name = "num_heads"
    dropout_name = "dropout"
    output_name = "out_proj"
    required = ("q_proj", "k_proj", "v_proj", "out_proj", "scale", "num_heads", "dropout")


class TransformersMlp(FastMlp):
    required = ("fc1", "fc2", "activation_fn")
    drop1 = drop2 = IDENTITY
    activation_fn: nn.Module
    act = property(lambda self: fusable(self.activation_fn))


class ViTLayer(Accelerated):
    """Pre-norm. A family says what its parts are called."""

    runs = "layer_norm, its attention, layernorm_mlp; each with LayerScale and the residual"
    part_names: ClassVar[tuple[str, ...]] = ("layernorm_before", "layernorm_after")
    required: ClassVar[tuple[str, ...]] = ("layernorm_before", "layernorm_after", "attention", "mlp")
    norms: ClassVar[tuple[str, str]] = ("layernorm_before", "layernorm_after")
    attention_name: ClassVar[str] = "attention"
    scales: ClassVar[tuple[str, str]] = ("", "")
    drop_name: ClassVar[str] = "dropout"

    mlp: nn.Module

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        norms = [getattr(self, name) for name in type(self).norms]
        if not takes(hidden_states, getattr(norms[0], "weight", None), norm=True) or args:
            y: torch.Tensor = self.own_forward(hidden_states, attention_mask, *args, **kwargs)
            return y
        attention = getattr(self, type(self).attention_name)
        scales = [getattr(self, name, None) for name in type(self).scales]
        drop = getattr(self, type(self).drop_name, None)

        def call(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = attention(x, attention_mask=attention_mask, **kwargs)[0]
            return result

        unmasked = attention_mask is None and not asks(kwargs)
        x = residual_branch(hidden_states, norms[0], attention, scales[0], drop, call, fused=unmasked)
        return residual_branch(x, norms[1], self.mlp, scales[1], drop)


class ClipLayer(ViTLayer):
    norms = ("layer_norm1", "layer_norm2")
    part_names = norms
    required = ("layer_norm1", "layer_norm2", "self_attn", "mlp")
    attention_name = "self_attn"
    drop_name = ""


class Dinov2Layer(ViTLayer):
    part_names = ("norm1", "norm2", "layer_scale1", "layer_scale2")
    required = ("norm1", "norm2", "layer_scale1", "layer_scale2", "drop_path", "attention", "mlp")
    norms = ("norm1", "norm2")
    scales = ("layer_scale1", "layer_scale2")
    drop_name = "drop_path"


class Dinov3Layer(Dinov2Layer):
    """DINOv3's attention has rotary positions, and stays PyTorch's."""

    runs = "layer_norm, its attention in PyTorch, layernorm_mlp with LayerScale and the residual"


class SiglipPool(Accelerated):
    """SigLIP's attention pooling; its attention is asked for weights that nobody reads."""

    runs = "its attention (linear, attention_kv, linear), layernorm_mlp with the residual"
    part_names = ("layernorm",)
    required = ("probe", "attention", "layernorm", "mlp")

    probe: torch.Tensor
    attention: nn.Module
    layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_state: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        attention, x = self.attention, hidden_state
        if (
            args
            or asks(kwargs)
            or not isinstance(attention, MultiheadAttention)
            or not unobserved(attention)
            or attention.separate()
            or not attention.batch_first
            or not takes(x, attention.in_proj_weight)
            or x.dim() != 3
        ):
            y: torch.Tensor = self.own_forward(hidden_state, *args, **kwargs)
            return y
        y = attention.across(self.probe.expand(x.shape[0], -1, -1), x)
        return residual_branch(y, self.layernorm, self.mlp, None, None)[:, 0]


class TransformersGlu(SplitGlu):
    names = required = ("gate_proj", "up_proj", "down_proj")
    act_name = "act_fn"


class Dinov3Mlp(TransformersMlp):
    part_names = ("up_proj", "down_proj")
    required = ("up_proj", "down_proj", "act_fn")
    fc1 = property(lambda self: self.up_proj)
    fc2 = property(lambda self: self.down_proj)
    act = property(lambda self: fusable(self.act_fn))


class ConvLayer(Accelerated):
    """Convolution, BatchNorm and activation; a shortcut has no activation."""

    runs = "conv_bn_relu"
    part_names = required = ("convolution", "normalization")

    convolution: nn.Module
    normalization: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if takes_map(x, self.convolution):
            return conv_bn_act(self.convolution, self.normalization, getattr(self, "activation", None), x)
        y: torch.Tensor = self.own_forward(x)
        return y


class ResNetEmbeddings(Accelerated):
    runs = "conv_bn_relu_max_pool"
    part_names = ("pooler",)
    required = ("embedder", "pooler", "num_channels")

    embedder: Any
    pooler: nn.Module
    num_channels: int

    @classmethod
    def note(cls, module: nn.Module) -> str | None:
        return MAPS

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        layer = self.embedder
        if not (
            unobserved(layer)
            and takes_map(pixel_values, layer.convolution)
            and pixel_values.shape[1] == self.num_channels
        ):
            y: torch.Tensor = self.own_forward(pixel_values)
            return y
        modules = (layer.convolution, layer.normalization, layer.activation, self.pooler)
        return stem(*modules, pixel_values, None, None, pixel_values.dtype)


class _Layers:
    """Where transformers has what torchvision has in a block itself: in a sequence of :class:`ConvLayer`."""

    part_names: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ("layer", "shortcut", "activation")
    layer: Any
    shortcut: nn.Module
    activation: nn.Module

    conv1 = property(lambda self: self.layer[0].convolution)
    bn1 = property(lambda self: self.layer[0].normalization)
    conv2 = property(lambda self: self.layer[1].convolution)
    bn2 = property(lambda self: self.layer[1].normalization)
    conv3 = property(lambda self: self.layer[2].convolution)
    bn3 = property(lambda self: self.layer[2].normalization)
    relu = property(lambda self: self.activation)

    downsample = property(lambda self: None if idle(self.shortcut) else self.shortcut)

    def simple(self) -> bool:
        *before, last = self.layer
        return (
            plain(self.layer, nn.Sequential)
            and all(unobserved(layer) for layer in (*before, last))
            # that of the block may be another one than those inside
            and all(plain(act, nn.ReLU) for act in (self.activation, *(layer.activation for layer in before)))
            and idle(last.activation)
        )


class ResNetStage(Accelerated):
    runs = "its blocks (bottleneck_chain)"
    required = ("layers",)

    layers: Any

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        convolutions = (module for module in self.modules() if isinstance(module, nn.Conv2d))
        if takes_map(input, next(convolutions, self)):
            return run_blocks(self.layers, input)
        y: torch.Tensor = self.own_forward(input)
        return y


class ResNetBasicLayer(_Layers, FastBasicBlock):
    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        if takes_map(hidden_state, self.conv1) and self.simple():
            return super().forward(hidden_state)
        y: torch.Tensor = self.own_forward(hidden_state)
        return y


class ResNetBottleneckLayer(_Layers, FastBottleneck):
    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        if takes_map(hidden_state, self.conv1) and self.simple():
            return super().forward(hidden_state)
        y: torch.Tensor = self.own_forward(hidden_state)
        return y
