"""transformer_block: a whole pre-norm block in training as one op, for autocast.

There the residual stream is float32, twice as wide as what matrix products read, so that keeping it twice a
block would cost the most. Of the two this op keeps the first; the second, between attention and MLP, is the
output projection's result, and computed again from what that read: 3 % more arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastvr import tuning
from fastvr.ops import layernorm_attention, layernorm_mlp
from fastvr.ops._op import Cost, Gradient, Op
from fastvr.ops.dropout import draw_seeds
from fastvr.ops.linear import LINEAR, result_dtype
from fastvr.reference.layernorm_attention import layernorm_attention_training as attention_reference
from fastvr.reference.layernorm_mlp import layernorm_mlp_training as mlp_reference


def transformer_block(x: torch.Tensor, attention: Mapping[str, Any], mlp: Mapping[str, Any]) -> torch.Tensor:
    """``x + attention(norm1(x))``, and that plus its ``mlp(norm2(...))``.

    Args:
        x: [B, N, features], float32, float16 or bfloat16 (float64 runs in PyTorch).
        attention: the arguments of :func:`fastvr.ops.layernorm_attention.layernorm_attention` but x and
            residual.
        mlp: those of :func:`fastvr.ops.layernorm_mlp.layernorm_mlp` but x and residual.

    Returns:
        [B, N, features].

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it and the half.
    """
    first = layernorm_attention.checked(x, **attention, residual=x)
    # what goes into the second half has x's shape and, where one op does all, its dtype
    second = layernorm_mlp.checked(x, **mlp, residual=x)
    if result_dtype(x, first.gamma) == x.dtype and x.dtype != first.qkv_weight.dtype:
        numbers = (first.num_heads, first.scale, first.eps, second.eps, second.act)
        rates = (first.dropout_p, first.proj_dropout_p, second.hidden_dropout_p, second.dropout_p)
        args = (x, *_own(first), *_own(second), *numbers, first.sample_scale, second.sample_scale)
        if TRANSFORMER_BLOCK_TRAINING.trains(*args, *_with_seeds(rates, [None] * len(rates))):
            seeds = draw_seeds(x, *rates)
            return TRANSFORMER_BLOCK_TRAINING(*args, *_with_seeds(rates, seeds))[0]
    y = layernorm_attention.run(first)
    if y.dtype == x.dtype:
        return layernorm_mlp.run(second._replace(x=y, residual=y))
    return layernorm_mlp.layernorm_mlp(y, **mlp, residual=y)


def _own(half: layernorm_attention.Arguments | layernorm_mlp.Arguments) -> tuple[Any, ...]:
    """Its seven parameters: without x, residual, numbers and sample_scale."""
    return half[1:8]


def _with_seeds(rates: Sequence[float], seeds: Sequence[torch.Tensor | None]) -> list[Any]:
    """Each rate of dropout with its seed behind it, as :class:`Arguments` has them."""
    return [value for pair in zip(rates, seeds, strict=True) for value in pair]


class Arguments(NamedTuple):
    """``attn_`` and ``mlp_`` are the halves' arguments of these names."""

    x: torch.Tensor
    attn_ln_weight: torch.Tensor
    attn_ln_bias: torch.Tensor | None
    attn_qkv_weight: torch.Tensor
    attn_qkv_bias: torch.Tensor | None
    attn_proj_weight: torch.Tensor
    attn_proj_bias: torch.Tensor | None
    attn_gamma: torch.Tensor | None
    mlp_ln_weight: torch.Tensor
    mlp_ln_bias: torch.Tensor | None
    mlp_fc1_weight: torch.Tensor
    mlp_fc1_bias: torch.Tensor | None
    mlp_fc2_weight: torch.Tensor
    mlp_fc2_bias: torch.Tensor | None
    mlp_gamma: torch.Tensor | None
    num_heads: int
    scale: float
    attn_eps: float
    mlp_eps: float
    act: str
    attn_sample_scale: torch.Tensor | None = None
    mlp_sample_scale: torch.Tensor | None = None
    # each with its seed, [2] int64
    attn_dropout_p: float = 0.0
    attn_seed: torch.Tensor | None = None
    attn_proj_dropout_p: float = 0.0
    attn_proj_seed: torch.Tensor | None = None
    mlp_hidden_dropout_p: float = 0.0
    mlp_hidden_seed: torch.Tensor | None = None
    mlp_dropout_p: float = 0.0
    mlp_seed: torch.Tensor | None = None


_Results = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]


def _attention(a: Arguments) -> layernorm_attention.Arguments:
    numbers = (a.num_heads, a.scale, a.attn_eps)
    drops: tuple[Any, ...] = (
        a.attn_sample_scale,
        a.attn_dropout_p,
        a.attn_seed,
        a.attn_proj_dropout_p,
        a.attn_proj_seed,
    )
    return layernorm_attention.Arguments(a.x, *a[1:8], a.x, *numbers, *drops)


def _mlp(a: Arguments, between: torch.Tensor) -> layernorm_mlp.Arguments:
    drops: tuple[Any, ...] = (
        a.mlp_sample_scale,
        a.mlp_hidden_dropout_p,
        a.mlp_hidden_seed,
        a.mlp_dropout_p,
        a.mlp_seed,
    )
    return layernorm_mlp.Arguments(between, *a[8:15], between, a.mlp_eps, a.act, *drops)


def _kernel(a: Arguments) -> _Results:
    between, *of_attention = layernorm_attention.kernel(_attention(a))
    y, *of_mlp = layernorm_mlp.kernel_training(_mlp(a, between))
    return (y, *of_attention, *of_mlp)  # type: ignore[return-value]


def _reference(*args: Any) -> _Results:
    a = Arguments(*args)
    between, *of_attention = attention_reference(*_attention(a))
    y, *of_mlp = mlp_reference(*_mlp(a, between))
    return (y, *of_attention, *of_mlp)  # type: ignore[return-value]


def _fake(a: Arguments) -> _Results:
    between, *of_attention = layernorm_attention.fake(_attention(a))
    y, *of_mlp = layernorm_mlp.fake_training(_mlp(a, between))
    return (y, *of_attention, *of_mlp)  # type: ignore[return-value]


def _unsupported(a: Arguments) -> str | None:
    return layernorm_attention.unsupported(_attention(a)) or layernorm_mlp.unsupported(_mlp(a, a.x))


def _measured(a: Arguments) -> str:
    batch, n, features = a.x.shape
    sizes = {"n": n, "h": a.num_heads, "k": features, "hidden": a.mlp_fc1_weight.shape[0]}
    sizes |= {"drop": 1} if a.attn_dropout_p > 0 else {}
    of_rows = (a.attn_proj_dropout_p, a.mlp_hidden_dropout_p, a.mlp_dropout_p)
    sizes |= {"projdrop": 1} if max(of_rows) > 0 else {}
    key = tuning.key("transformer_block_training", a.attn_qkv_weight.dtype, b=tuning.bucket(batch), **sizes)
    return tuning.choice(key, a.x.device, "reference")


def _cost(a: Arguments) -> Cost:
    halves = layernorm_attention.cost(_attention(a)), layernorm_mlp.cost_training(_mlp(a, a.x))
    return Cost(sum(half.flops for half in halves), sum(half.bytes for half in halves))


def _needs_of_halves(needs: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    attention, mlp = (
        frozenset(name.removeprefix(half) for name in needs if name.startswith(half))
        for half in ("attn_", "mlp_")
    )
    if "x" in needs:
        attention |= {"x", "residual"}
    return attention, mlp | {"x", "residual"} if attention else mlp


def _saves(a: Arguments, needs: frozenset[str]) -> set[str | int]:
    of_attention, of_mlp = _needs_of_halves(needs)
    saves: set[str | int] = set()
    for half, names, places in (
        ("attn_", layernorm_attention.saves_of(_attention(a), of_attention), 0),
        ("mlp_", layernorm_mlp.saves_of(_mlp(a, a.x), of_mlp), 4),
    ):
        for name in names:
            if isinstance(name, int):
                saves.add(name + places)
            elif (half, name) != ("mlp_", "x"):
                saves.add("x" if name == "x" else half + name)
            else:
                # what lies between the halves is computed again
                saves |= {"x", 2, "attn_proj_weight", "attn_proj_bias", "attn_gamma", "attn_sample_scale"}
                saves.add("attn_proj_seed")
    return saves


def _backward(
    a: Arguments, results: tuple[Any, ...], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor | None]:
    _, qkv, attended, lse, attn_moments, hidden, mlp_moments = results
    of_attention, of_mlp = _needs_of_halves(needs)
    found: dict[str, torch.Tensor | None] = {}
    if of_mlp:
        between = a.x
        if "x" in layernorm_mlp.saves_of(_mlp(a, a.x), of_mlp):
            between = LINEAR.where_supported(*layernorm_attention.projection(_attention(a), attended))
        gradients = layernorm_mlp.backward(_mlp(a, between), (None, hidden, mlp_moments), grad, of_mlp)
        found |= {f"mlp_{name}": value for name, value in gradients.items()}
        grad = found.get("mlp_x", grad)  # type: ignore[assignment]
    if of_attention:
        kept = (None, qkv, attended, lse, attn_moments)
        gradients = layernorm_attention.backward(_attention(a), kept, grad, of_attention)
        found |= {f"attn_{name}": value for name, value in gradients.items()}
        found["x"] = found.get("attn_x")
    return found


TRANSFORMER_BLOCK_TRAINING = Op(
    "transformer_block_training",
    "Tensor x, Tensor attn_ln_weight, Tensor? attn_ln_bias, Tensor attn_qkv_weight, Tensor? attn_qkv_bias, "
    "Tensor attn_proj_weight, Tensor? attn_proj_bias, Tensor? attn_gamma, Tensor mlp_ln_weight, "
    "Tensor? mlp_ln_bias, Tensor mlp_fc1_weight, Tensor? mlp_fc1_bias, Tensor mlp_fc2_weight, "
    "Tensor? mlp_fc2_bias, Tensor? mlp_gamma, int num_heads, float scale, float attn_eps, float mlp_eps, "
    "str act, Tensor? attn_sample_scale=None, Tensor? mlp_sample_scale=None, "
    "float attn_dropout_p=0.0, Tensor? attn_seed=None, "
    "float attn_proj_dropout_p=0.0, Tensor? attn_proj_seed=None, "
    "float mlp_hidden_dropout_p=0.0, Tensor? mlp_hidden_seed=None, "
    "float mlp_dropout_p=0.0, Tensor? mlp_seed=None",
    arguments=Arguments,
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
    returns="(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    gradient=Gradient(saves=_saves, backward=_backward),
)
