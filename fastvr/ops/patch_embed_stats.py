"""patch_embed_stats: patch_embed, and the statistics of its rows for the LayerNorm behind it, one launch."""

from __future__ import annotations

import math

import torch

from fastvr import backend, tuning
from fastvr.ops._op import Cost, Op
from fastvr.ops.patch_embed import (
    SCHEMA,
    Arguments,
    checked,
    cost,
    dtype_of,
    launch,
    size,
    table_key,
    unsupported,
)
from fastvr.reference.linear_stats import STATS_CHUNK
from fastvr.reference.patch_embed import patch_embed_stats as reference


def patch_embed_stats(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    pos_embed: torch.Tensor | None = None,
    prefix_tokens: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`fastvr.ops.patch_embed.patch_embed`, and with it what :func:`fastvr.ops.norm_linear.norm_linear`
    needs to normalise the result. For inference: it has no gradient.

    Args:
        x, weight, bias, pos_embed, prefix_tokens, mean, std: ``patch_embed``'s.

    Returns:
        ``patch_embed``'s result [B, T, D], and ``stats`` [B * T, ceil(D / 64), 2] in float32: of each 64
        columns of a row, in the dtype it is stored in, the mean and the sum of squared deviations from it.

    Raises:
        ValueError: an argument's shape, dtype or device; the message names it.
        NotImplementedError: a tensor requires a gradient.
    """
    arguments = checked("patch_embed_stats", x, weight, bias, pos_embed, prefix_tokens, mean, std)
    return PATCH_EMBED_STATS(*arguments)


def _stats_shape(a: Arguments) -> tuple[int, int, int]:
    batch, tokens, d = size(a)
    return batch * tokens, -(-d // STATS_CHUNK), 2


def _kernel(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    y = backend.empty(size(a), dtype=dtype_of(a), device=a.x.device)
    stats = backend.empty(_stats_shape(a), dtype=torch.float32, device=a.x.device)
    launch("patch_embed_stats", a, y, stats)
    return y, stats


def _fake(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = dtype_of(a)
    wide = torch.promote_types(dtype, torch.float32)
    return a.x.new_empty(size(a), dtype=dtype), a.x.new_empty(_stats_shape(a), dtype=wide)


def _measured(a: Arguments) -> str:
    # who asks for it has decided to fold: PyTorch would take several launches
    return tuning.choice(table_key("patch_embed_stats", a), a.x.device, "triton")


def _cost(a: Arguments) -> Cost:
    embedding = cost(a)
    return Cost(embedding.flops, embedding.bytes + 4 * math.prod(_stats_shape(a)))


PATCH_EMBED_STATS = Op(
    "patch_embed_stats",
    SCHEMA,
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=unsupported,
    measured=_measured,
    cost=_cost,
    returns="(Tensor, Tensor)",
    differentiable=False,
)
