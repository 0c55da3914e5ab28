"""timm's ViTs (DeiT, DINOv2, CLIP and SigLIP towers too; EVA, DINOv3 around their attention) and ResNets."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from fastvr.accelerate.blocks import (
    FastMlp,
    PackedAttention,
    fusable,
    ordinary_linear,
    passes,
    residual_branch,
)
from fastvr.accelerate.glu import FastGlu, SplitGlu
from fastvr.accelerate.maps import MAPS, FastBasicBlock, FastBottleneck, conv_bn_act, run_blocks, takes_map
from fastvr.accelerate.swap import Accelerated, takes
from fastvr.nn.attention_pool import AttentionPoolLatent
from fastvr.nn.conv_bn_relu import conv_bn_relu
from fastvr.nn.plain import idle, plain
from fastvr.nn.stem import stem


class TimmAttention(PackedAttention):
    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if _optional(module, "norm"):
            return "it normalises its result: attention stays PyTorch's"
        norms = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
        if not all(idle(norm) or isinstance(norm, nn.LayerNorm) for norm in norms if norm is not None):
            return "it normalises queries and keys otherwise than LayerNorm: attention stays PyTorch's"
        return (
            "it has a gate: attention stays PyTorch's" if getattr(module, "gate", None) is not None else None
        )

    def separate(self) -> bool:
        return (
            super().separate()
            or type(self).refusal(self) is not None
            # PyTorch's function, which timm calls then, takes no other scale from it
            or (getattr(self, "fused_attn", False) and self.scale != self.head_dim**-0.5)
        )

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        given = (
            {} if attn_mask is None and not is_causal else {"attn_mask": attn_mask, "is_causal": is_causal}
        )
        weight = getattr(self.qkv, "weight", None)
        if given or not takes(x, weight) or x.dim() != 3 or self.separate():
            y: torch.Tensor = self.own_forward(x, **given)
            return y
        return self.branch(x)


class TimmMlp(FastMlp):
    # timm has classes of its own for some of PyTorch's activations
    act = property(lambda self: fusable(self._modules["act"]))

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if _optional(module, "norm"):
            return "it normalises between its layers"
        return "its layers are convolutions" if isinstance(module.fc1, nn.Conv2d) else None

    def separate(self) -> bool:
        return super().separate() or _optional(self, "norm")


class TimmGlu(FastGlu):
    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if _optional(module, "norm"):
            return "it normalises between its layers"
        if getattr(module, "gate_last", False) or not plain(getattr(module, "act", module), nn.SiLU):
            return "it is gated otherwise than SwiGLU"
        return "its layers are convolutions" if isinstance(module.fc1, nn.Conv2d) else None

    def separate(self) -> bool:
        return super().separate() or type(self).refusal(self) is not None


class TimmSplitGlu(SplitGlu):
    names = required = ("fc1_g", "fc1_x", "fc2")
    act_name = "act"
    drop_names = ("drop1", "drop2")

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        return "it normalises between its layers" if _optional(module, "norm") else None

    def separate(self) -> bool:
        return super().separate() or _optional(self, "norm")


class TimmAttentionPool(Accelerated, AttentionPoolLatent):
    _fastvr_accelerates = AttentionPoolLatent
    runs = "linear, attention_kv, linear, layernorm_mlp with the residual"
    part_names = ("q", "kv", "proj", "norm")
    required = ("latent", "q", "kv", "proj", "proj_drop", "norm", "mlp", "num_heads", "scale", "pool")

    pool: str
    proj_drop: nn.Module

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if _optional(module, "q_norm", "k_norm"):
            return "it normalises queries and keys: attention stays PyTorch's"
        if getattr(module, "pos_embed", None) is not None or getattr(module, "latent_len", 1) != 1:
            return "it has positions, or several queries"
        usual = all(isinstance(getattr(module, name, None), nn.Linear) for name in ("q", "kv", "proj"))
        return (
            None if usual and getattr(module, "mlp", None) is not None else "it lacks projections or its MLP"
        )

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        if (
            attn_mask is not None
            or not takes(x, getattr(self.kv, "weight", None))
            or x.dim() != 3
            or self.pool != "token"
            or not passes(self.proj_drop)
            or not ordinary_linear(self.q, self.kv, self.proj)
            or type(self).refusal(self) is not None
        ):
            given = {} if attn_mask is None else {"attn_mask": attn_mask}
            y: torch.Tensor = self.own_forward(x, **given)
            return y
        y = self.attended(x)[:, None]
        return residual_branch(y, self.norm, self.mlp, None, None)[:, 0]


class TimmBlock(Accelerated):
    """Pre-norm; LayerScale and stochastic depth as modules."""

    runs = "layer_norm, its attention, layernorm_mlp; each with LayerScale and the residual"
    part_names = ("norm1", "ls1", "norm2", "ls2")
    required = ("norm1", "attn", "norm2", "mlp")

    norm1: nn.Module
    norm2: nn.Module
    attn: nn.Module
    mlp: nn.Module

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        # older versions take neither
        given = (
            {} if attn_mask is None and not is_causal else {"attn_mask": attn_mask, "is_causal": is_causal}
        )
        if given or not takes(x, getattr(self.norm1, "weight", None), norm=True) or x.dim() != 3:
            y: torch.Tensor = self.own_forward(x, **given)
            return y
        x = residual_branch(x, self.norm1, self.attn, _module(self, "ls1"), _module(self, "drop_path1"))
        return residual_branch(x, self.norm2, self.mlp, _module(self, "ls2"), _module(self, "drop_path2"))


class TimmEvaBlock(Accelerated):
    """EVA's and DINOv3's: rotary positions in attention, which stays PyTorch's; LayerScale as parameters."""

    runs = "layer_norm, its attention in PyTorch, layernorm_mlp with LayerScale and the residual"
    part_names = ("norm1", "norm2")
    required = ("norm1", "attn", "norm2", "mlp")

    norm1: nn.Module
    norm2: nn.Module
    attn: nn.Module
    mlp: nn.Module
    gamma_1: torch.Tensor | None
    gamma_2: torch.Tensor | None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not takes(x, getattr(self.norm1, "weight", None), norm=True):
            y: torch.Tensor = self.own_forward(x, *args, **kwargs)
            return y
        names = ("rope", "attn_mask", "is_causal")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        x = residual_branch(
            x,
            self.norm1,
            self.attn,
            self.gamma_1,
            _module(self, "drop_path1"),
            lambda y: self.attn(y, **kwargs),
        )
        return residual_branch(x, self.norm2, self.mlp, self.gamma_2, _module(self, "drop_path2"))


class _TimmResidual:
    """What timm's residual blocks have besides torchvision's."""

    runs: ClassVar[str]

    def simple(self) -> bool:
        acts = [getattr(self, name) for name in ("act1", "act2", "act3") if hasattr(self, name)]
        return (
            all(plain(act, nn.ReLU) for act in acts)
            and getattr(self, "se", None) is None
            and passes(getattr(self, "drop_path", None))
            and passes(getattr(self, "drop_block", None))
            and passes(getattr(self, "aa", None))
        )

    @classmethod
    def describe(cls, module: nn.Module) -> str:
        assert isinstance(module, _TimmResidual)
        if module.simple():
            return cls.runs
        return "conv_bn_relu; squeeze-and-excite, another activation and the like in PyTorch"

    def finish_branch(self, y: torch.Tensor, x: torch.Tensor, act: nn.Module) -> torch.Tensor:
        """Squeeze-and-excite and stochastic depth, which stay PyTorch's, shortcut and activation."""
        for name in ("se", "drop_path"):
            module = getattr(self, name, None)
            y = y if module is None else module(y)
        downsample = getattr(self, "downsample", None)
        result: torch.Tensor = act(y + (x if downsample is None else downsample(x)))
        return result


class TimmBasicBlock(_TimmResidual, FastBasicBlock):
    required = ("conv1", "bn1", "act1", "conv2", "bn2", "act2")

    @property
    def relu(self) -> nn.Module:  # type: ignore[override]
        return self.act2

    act1: nn.Module
    act2: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not takes_map(x, self.conv1):
            y: torch.Tensor = self.own_forward(x)
            return y
        if self.simple():
            return super().forward(x)
        y = _between(self, self.conv1, self.bn1, self.act1, x)
        return self.finish_branch(conv_bn_relu(self.conv2, self.bn2, None, y), x, self.act2)


class TimmBottleneck(_TimmResidual, FastBottleneck):
    required = ("conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act3")

    @property
    def relu(self) -> nn.Module:  # type: ignore[override]
        return self.act3

    act1: nn.Module
    act2: nn.Module
    act3: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not takes_map(x, self.conv1):
            y: torch.Tensor = self.own_forward(x)
            return y
        if self.simple():
            return super().forward(x)
        y = conv_bn_act(self.conv1, self.bn1, self.act1, x)
        y = _between(self, self.conv2, self.bn2, self.act2, y)
        return self.finish_branch(conv_bn_relu(self.conv3, self.bn3, None, y), x, self.act3)


class TimmResNet(Accelerated):
    runs = "conv_bn_relu_max_pool, the stages (bottleneck_chain)"
    part_names = ("conv1", "bn1", "maxpool")
    required = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4")

    conv1: nn.Module
    bn1: nn.Module
    act1: nn.Module
    maxpool: nn.Module

    @classmethod
    def note(cls, module: nn.Module) -> str | None:
        return MAPS

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        checkpointing = getattr(self, "grad_checkpointing", False)
        if checkpointing or not takes_map(x, next(_convs(self.conv1), self.conv1)):
            # a block that is made again stops at the last tensor that its gradient needs: timm's own does so
            # behind its BatchNorms, a fused one before their running statistics move the second time
            whole = checkpointing and not torch.compiler.is_compiling()
            with set_checkpoint_early_stop(False) if whole else contextlib.nullcontext():
                y: torch.Tensor = super().forward_features(x)  # type: ignore[misc]
            return y
        x = stem(self.conv1, self.bn1, self.act1, self.maxpool, x, None, None, x.dtype)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = run_blocks(getattr(self, name), x)
        return x


def _convs(module: nn.Module) -> Any:
    return (m for m in module.modules() if isinstance(m, nn.Conv2d))


def _between(
    block: nn.Module, conv: nn.Module, bn: nn.Module, act: nn.Module, x: torch.Tensor
) -> torch.Tensor:
    """A convolution with what timm may have around its activation."""
    drop, aa = getattr(block, "drop_block", None), getattr(block, "aa", None)
    if drop is None or passes(drop):
        y = conv_bn_act(conv, bn, act, x)
    else:
        y = drop(conv_bn_relu(conv, bn, None, x))
        y = act(y)
    return y if aa is None or passes(aa) else aa(y)


def _module(block: nn.Module, name: str) -> nn.Module | None:
    module: nn.Module | None = getattr(block, name, None)
    return module


def _optional(module: nn.Module, *names: str) -> bool:
    """Whether one of these is there and does something."""
    found = [getattr(module, name, None) for name in names]
    return any(part is not None and not idle(part) for part in found)
