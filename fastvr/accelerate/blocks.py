"""What the transformer blocks of all libraries are made of: residual branches, attention, MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fastvr.accelerate.swap import Accelerated, ordinary, takes, unobserved
from fastvr.nn.attention import Attention
from fastvr.nn.block import DropPath
from fastvr.nn.mlp import Mlp, QuickGELU
from fastvr.nn.plain import DrawScale, drawn, idle, join, layer_norm, plain, plain_norm
from fastvr.ops.attention import attention
from fastvr.ops.layernorm_attention import layernorm_attention
from fastvr.ops.linear import linear

IDENTITY = nn.Identity()
_GELU, _GELU_TANH, _RELU = nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU()
_QUICK_GELU, _SILU = QuickGELU(), nn.SiLU()

# classes by their path, since nothing here imports a library that the model does not come from
_REGISTERS = "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters"
GAMMA = {
    "timm.layers.layer_scale.LayerScale": "gamma",
    "timm.models.vision_transformer.LayerScale": "gamma",
    "transformers.models.dinov2.modeling_dinov2.Dinov2LayerScale": "lambda1",
    f"{_REGISTERS}LayerScale": "lambda1",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayerScale": "lambda1",
}
_TIMMS_DROP_PATH = "timm.layers.drop.DropPath"
_DROP_PATHS = {
    _TIMMS_DROP_PATH,
    "transformers.models.dinov2.modeling_dinov2.Dinov2DropPath",
    f"{_REGISTERS}DropPath",
    "transformers.models.dinov3_vit.modeling_dinov3_vit.Dinov3ViTDropPath",
}
_ACTIVATIONS = {
    "timm.layers.activations.GELU": _GELU,
    "timm.layers.activations.GELUTanh": _GELU_TANH,
    "timm.layers.activations.QuickGELU": _QUICK_GELU,
    "transformers.activations.GELUActivation": _GELU,
    "transformers.activations.GELUTanh": _GELU_TANH,
    "transformers.activations.QuickGELUActivation": _QUICK_GELU,
    "transformers.activations.SiLUActivation": _SILU,
}


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def fusable(act: object) -> Any:
    """``act``, a module or a function, as PyTorch's module that computes the same, where there is one."""
    if act is F.relu or act is torch.relu:
        return _RELU
    if act is F.gelu:
        return _GELU
    if not isinstance(act, nn.Module):
        return act
    known = _ACTIVATIONS.get(path_of(type(act)))
    if known is None or not plain(act, type(act)):
        return act
    # transformers has variants in Python of both, which differ in the last digits
    function = getattr(act, "act", None)
    return act if getattr(function, "__name__", "").startswith("_gelu") else known


def asks(options: Mapping[str, object]) -> bool:
    """Whether one of the keyword arguments that transformers hands down asks attention for something."""
    # hidden states are recorded by hooks on the layers; attention is handed the wish, and ignores it
    return any(
        value is not None and value is not False
        for name, value in options.items()
        if name != "output_hidden_states"
    )


def ordinary_linear(*modules: nn.Module) -> bool:
    """Whether all are plain ``nn.Linear``, and their weights plain tensors, not quantised or distributed."""
    return all(plain(module, nn.Linear) and ordinary(module.weight) for module in modules)


def passes(drop: nn.Module | None) -> bool:
    """Whether ``drop`` hands its input on as it is, and nobody observes it."""
    if drop is None or idle(drop):
        return True
    if path_of(type(drop)) not in _DROP_PATHS or not plain(drop, type(drop)):
        return False
    return not drop.training or getattr(drop, "drop_prob", None) in (0, None)


def _draws(drop: nn.Module | None) -> DrawScale | None:
    """How timm's DropPath draws, where nobody observes it; other libraries draw in other ways."""
    if drop is None or path_of(type(drop)) != _TIMMS_DROP_PATH or not plain(drop, type(drop)):
        return None
    return functools.partial(DropPath.sample_scale, drop) if drop.scale_by_keep else None  # type: ignore[arg-type]


def residual_branch(
    x: torch.Tensor,
    norm: nn.Module | None,
    module: nn.Module,
    scale: nn.Module | torch.Tensor | None,
    drop: nn.Module | None,
    call: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    fused: bool = True,
) -> torch.Tensor:
    """``x + drop(scale(module(norm(x))))``, by ``module.branch`` where it has one that may be used.

    ``scale`` is a module, or LayerScale's gamma itself. ``call`` is how ``module`` is called where it is, by
    default with one tensor; without ``fused`` (there are masks) it always is.
    """
    gamma = scale if isinstance(scale, torch.Tensor) else None
    if isinstance(scale, nn.Module) and plain(scale, type(scale)):
        gamma = getattr(scale, GAMMA.get(path_of(type(scale)), ""), None)
        if gamma is not None or isinstance(scale, nn.Identity):
            scale = None
    branch = getattr(module, "branch", None) if fused and unobserved(module) else None
    if branch is not None:
        if not isinstance(scale, nn.Module) and passes(drop):
            return branch(x, norm, gamma, x)  # type: ignore[no-any-return]
        draw = _draws(drop)
        if draw is not None and not isinstance(scale, nn.Module) and isinstance(module, (Attention, Mlp)):
            return module.branch(x, norm, gamma, x, draw)
        y = branch(x, norm, gamma)
    else:
        normed = x if norm is None else layer_norm(norm, x)
        y = module(normed) if call is None else call(normed)
        y = y if gamma is None else y * gamma
    y = scale(y) if isinstance(scale, nn.Module) else y
    result: torch.Tensor = x + (y if drop is None else drop(y))
    return result


def own_or_fused_branch(
    module: Any,
    x: torch.Tensor,
    norm: nn.Module | None = None,
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    drop_path: DrawScale | None = None,
) -> torch.Tensor:
    """``residual + drop_path(gamma * module(norm(x)))`` of an MLP or attention, by the class of fastvr's that
    it is taken for."""
    if module.separate():
        y = module.own_forward(x if norm is None else layer_norm(norm, x))
        return join(y, gamma, residual, drawn(drop_path, y))
    kind = type(module).family._fastvr_accelerates
    fused: torch.Tensor = kind.branch(module, x, norm, gamma, residual, drop_path)
    return fused


def attend(
    x: torch.Tensor,
    norm: nn.Module | None,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    output: nn.Linear,
    num_heads: int,
    scale: float | None,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """``residual + gamma * output(attention(norm(x)))`` of tokens [B, N, D], by weights that are packed as
    :func:`fastvr.ops.attention.attention` has them."""
    if norm is not None and plain_norm(norm):
        return layernorm_attention(
            x,
            norm.weight,
            norm.bias,
            qkv_weight,
            qkv_bias,
            output.weight,
            output.bias,
            num_heads,
            scale=scale,
            eps=norm.eps,
            gamma=gamma,
            residual=residual,
        )
    if norm is not None:
        x = layer_norm(norm, x, for_matmul=True)
    y = attention(linear(x, qkv_weight, qkv_bias), num_heads, scale=scale)
    return linear(y, output.weight, output.bias, gamma=gamma, residual=residual)


def joined(*layers: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of one linear layer that gives what ``layers`` give, one behind the other."""
    # joined anew at each call: a copy that is kept would go stale where somebody writes into .data
    weight = torch.cat([layer.weight for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight, None
    biases = [weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    return weight, torch.cat(biases)


class LinearLayers(Accelerated):
    """What linear layers are the parts of; without them the module's own forward runs."""

    @classmethod
    def describe(cls, module: nn.Module) -> str:
        assert isinstance(module, Accelerated)
        linear_layers = all(type(part) is nn.Linear for part in module.parts())
        return cls.runs if linear_layers else "its own forward: its linear layers were replaced"


class FastMlp(LinearLayers, Mlp):
    """Two linear layers; a family says where the library has them."""

    _fastvr_accelerates = Mlp
    runs = "linear with its activation, linear (in a block: layernorm_mlp with LayerScale and residual)"
    # in training its dropout's random numbers stay PyTorch's
    kernels_drop = False
    part_names = ("fc1", "fc2")

    def separate(self) -> bool:
        """Whether only the library's own forward, or a call of what was put in place, computes what it is."""
        return not ordinary_linear(self.fc1, self.fc2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not takes(x, getattr(self.fc1, "weight", None)) or self.separate():
            y: torch.Tensor = self.own_forward(x)
            return y
        return super().branch(x)

    branch = own_or_fused_branch


class FeedForward:
    """An MLP whose layers lie in their block itself."""

    def __init__(self, fc1: nn.Module, act: Any, drop1: nn.Module, fc2: nn.Module, drop2: nn.Module) -> None:
        self.fc1, self.act, self.drop1, self.fc2, self.drop2 = fc1, act, drop1, fc2, drop2

    branch, fused = Mlp.branch, Mlp.fused
    kernels_drop = False


class PackedAttention(LinearLayers, Attention):
    """Attention with one linear layer for queries, keys and values, and fastvr's (timm's) names."""

    _fastvr_accelerates = Attention
    runs = "linear, attention, linear (in a block: with LayerScale and residual)"
    # in training its dropout's random numbers stay PyTorch's
    kernels_drop = False
    part_names = ("qkv", "proj")
    required = (
        *("qkv", "q_norm", "k_norm", "proj", "attn_drop", "proj_drop"),
        *("num_heads", "head_dim", "scale"),
    )

    def separate(self) -> bool:
        """Whether only the library's own forward, or a call of what was put in place, computes what it is."""
        # in training its dropout's random numbers stay PyTorch's
        dropping = self.training and getattr(self.attn_drop, "p", 0) > 0
        return dropping or not idle(self.attn_drop) or not ordinary_linear(self.qkv, self.proj)

    branch = own_or_fused_branch


class SplitAttention(LinearLayers):
    """Attention with linear layers of their own for queries, keys and values, as transformers has it."""

    runs = "linear (the three weights joined), attention, linear (in a block: with LayerScale and residual)"
    part_names = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj")
    required = ("q_proj", "k_proj", "v_proj", "o_proj", "scaling", "num_attention_heads", "attention_dropout")
    scale_name: ClassVar[str] = "scaling"
    heads_name: ClassVar[str] = "num_attention_heads"
    dropout_name: ClassVar[str] = "attention_dropout"
    output_name: ClassVar[str] = "o_proj"

    config: Any
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def separate(self) -> bool:
        """Whether only the library's own forward, or a call of what was put in place, computes what it is."""
        projections = (self.q_proj, self.k_proj, self.v_proj, getattr(self, self.output_name))
        return (
            self.config._attn_implementation not in ("sdpa", "eager")
            or not ordinary_linear(*projections)
            or (self.training and getattr(self, self.dropout_name) > 0)
            or getattr(self, "is_causal", False)
        )

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if (
            not takes(hidden_states, getattr(self.q_proj, "weight", None))
            or attention_mask is not None
            or asks(kwargs)
            or hidden_states.dim() != 3
            or self.separate()
            # "eager" also returns the weights
            or self.config._attn_implementation != "sdpa"
        ):
            y: tuple[torch.Tensor, torch.Tensor | None] = self.own_forward(
                hidden_states, attention_mask, **kwargs
            )
            return y
        return self.branch(hidden_states), None

    def branch(
        self,
        x: torch.Tensor,
        norm: nn.Module | None = None,
        gamma: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``residual + gamma * attention(norm(x))``."""
        if self.separate():
            normed = x if norm is None else layer_norm(norm, x)
            return join(self.own_forward(normed)[0], gamma, residual)
        weight, bias = joined(self.q_proj, self.k_proj, self.v_proj)
        output: Any = getattr(self, self.output_name)
        num_heads, scale = getattr(self, self.heads_name), getattr(self, self.scale_name)
        return attend(x, norm, weight, bias, output, num_heads, scale, gamma, residual)
