"""PyTorch's nn.TransformerEncoderLayer and nn.MultiheadAttention, wherever they are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvr.accelerate.blocks import FeedForward, attend, fusable, residual_branch
from fastvr.accelerate.swap import Accelerated, takes
from fastvr.nn.mlp import fused_name
from fastvr.nn.plain import join, layer_norm
from fastvr.ops.attention import attention, attention_kv
from fastvr.ops.linear import linear

_SEQUENCE_FIRST = (
    "batch_first=False: attention runs over the first dimension; fed with [B, N, D], that is the batch"
)


class MultiheadAttention(Accelerated):
    """Of one sequence or of two, with ``need_weights=False`` and without masks; PyTorch's own otherwise."""

    runs = "with need_weights=False and no mask: linear, attention (attention_kv across sequences), linear"
    part_names = ("out_proj",)

    in_proj_weight: torch.Tensor
    in_proj_bias: torch.Tensor | None
    out_proj: nn.Linear
    num_heads: int
    embed_dim: int
    dropout: float
    batch_first: bool
    bias_k: torch.Tensor | None
    bias_v: torch.Tensor | None
    add_zero_attn: bool

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if getattr(module, "in_proj_weight", None) is None:
            return "its keys or values have another width than its queries"
        if getattr(module, "bias_k", None) is not None or getattr(module, "add_zero_attn", False):
            return "it adds keys and values of its own"
        return None

    @classmethod
    def note(cls, module: nn.Module) -> str | None:
        return None if getattr(module, "batch_first", True) else _SEQUENCE_FIRST

    def separate(self) -> bool:
        """Whether only the library's own forward computes what the module is set to."""
        # in training its dropout's random numbers stay PyTorch's
        return (self.training and self.dropout > 0) or type(self).refusal(self) is not None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if (
            need_weights
            or is_causal
            or key_padding_mask is not None
            or attn_mask is not None
            or key is not value
            or not all(takes(x, self.in_proj_weight) and x.dim() == 3 for x in (query, key))
            or self.separate()
        ):
            result: tuple[torch.Tensor, torch.Tensor | None] = self.own_forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
            return result
        return (self.branch(query) if query is key else self.across(query, key)), None

    def branch(
        self,
        x: torch.Tensor,
        norm: nn.Module | None = None,
        gamma: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``residual + gamma * attention(norm(x))`` of one sequence."""
        if self.batch_first and not self.separate():
            weight, bias = self.in_proj_weight, self.in_proj_bias
            return attend(x, norm, weight, bias, self.out_proj, self.num_heads, None, gamma, residual)
        if norm is not None:
            x = layer_norm(norm, x, for_matmul=True)
        if self.separate():
            return join(self.own_forward(x, x, x, need_weights=False)[0], gamma, residual)
        qkv = self._samples_first(linear(x, self.in_proj_weight, self.in_proj_bias))
        y = self._samples_first(attention(qkv, self.num_heads))
        return linear(y, self.out_proj.weight, self.out_proj.bias, gamma=gamma, residual=residual)

    def across(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Attention of ``query`` over ``key``, both in the module's order of dimensions."""
        sizes = [self.embed_dim, 2 * self.embed_dim]
        q_weight, kv_weight = self.in_proj_weight.split(sizes)
        q_bias, kv_bias = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        q = self._samples_first(linear(query, q_weight, q_bias))
        kv = self._samples_first(linear(key, kv_weight, kv_bias))
        y = self._samples_first(attention_kv(q, kv, self.num_heads))
        return linear(y, self.out_proj.weight, self.out_proj.bias)

    def _samples_first(self, x: torch.Tensor) -> torch.Tensor:
        """From the module's order of dimensions to [B, N, D], and back."""
        return x if self.batch_first else x.transpose(0, 1)


class TransformerEncoderLayer(Accelerated):
    """Pre-norm and post-norm; any activation."""

    runs = "its attention with the residual, layernorm_mlp (post-norm: linear, linear, layer_norm)"
    part_names = ("linear1", "linear2", "norm1", "norm2")

    self_attn: nn.Module
    linear1: nn.Module
    dropout: nn.Module
    linear2: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    dropout1: nn.Module
    dropout2: nn.Module
    activation: Any
    norm_first: bool

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        if (
            src_mask is not None
            or src_key_padding_mask is not None
            or is_causal
            or not takes(src, getattr(self.linear1, "weight", None))
            or src.dim() != 3
            # overridden in a subclass it is not; replaced on the instance it may be
            or "_sa_block" in self.__dict__
            or "_ff_block" in self.__dict__
            or self._means_something_else_in_eval()
        ):
            y: torch.Tensor = self.own_forward(
                src, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal
            )
            return y
        if self.norm_first:
            return self._feed(self._attend(src, self.norm1), self.norm2)
        x = layer_norm(self.norm1, self._attend(src, None))
        return layer_norm(self.norm2, self._feed(x, None))

    def _means_something_else_in_eval(self) -> bool:
        """Whether PyTorch's one call for a whole layer in eval would compute something else than the modules.

        It reads the weights wherever they are, whoever replaced their modules, and knows exact GELU and ReLU
        alone, by what ``activation`` was when the layer was made: GELU(approximate="tanh") is exact in it.
        """
        known: int = getattr(self, "activation_relu_or_gelu", 0)
        # only with these does PyTorch make that call
        if self.training or not known or not getattr(self.self_attn, "batch_first", False):
            return False
        expected: dict[str, type[nn.Module]] = {
            **dict.fromkeys(("linear1", "linear2"), nn.Linear),
            **dict.fromkeys(("norm1", "norm2"), nn.LayerNorm),
            "self_attn": nn.MultiheadAttention,
        }
        return fused_name(fusable(self.activation)) != ("gelu" if known == 2 else "relu") or not all(
            _as_made(getattr(self, name), kind) for name, kind in expected.items()
        )

    def _attend(self, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        # a module put in place is called as PyTorch's layer calls it
        unmasked = {"attn_mask": None, "key_padding_mask": None, "need_weights": False, "is_causal": False}
        attn = self.self_attn
        return residual_branch(x, norm, attn, None, self.dropout1, lambda y: attn(y, y, y, **unmasked)[0])

    def _feed(self, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        layers = FeedForward(
            self.linear1, fusable(self.activation), self.dropout, self.linear2, self.dropout2
        )
        return layers.branch(x, norm, residual=x)  # type: ignore[misc]


def _as_made(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is a ``kind``, as an accelerated one is, with its own forward; hooks it may have."""
    cls = type(module)
    return getattr(cls, "_fastvr_accelerates", cls) is kind and "forward" not in module.__dict__
