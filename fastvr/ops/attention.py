"""attention: softmax(scale * q k') v for every head, from packed qkv, one launch; attention_kv: the same for
queries that come by themselves."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op, nbytes
from fastvr.reference.attention import attention as reference
from fastvr.reference.attention import attention_kv as reference_kv


def attention(qkv: torch.Tensor, num_heads: int, *, scale: float | None = None) -> torch.Tensor:
    """Self-attention of every head, straight from a packed qkv projection, without a mask or dropout.

    Computes ``softmax(scale * q @ k.T) @ v`` for each sample and head; scores and sums are float32.

    Args:
        qkv: [B, N, 3 * num_heads * head_dim], float32, float16 or bfloat16 (float64 runs in PyTorch): all of
            q, then k, then v, each head-major, as timm packs them. The kernel takes head_dim 32 to 128 in
            multiples of 8.
        num_heads: number of heads.
        scale: of the scores, head_dim ** -0.5 unless given; the kernel takes positive ones.

    Returns:
        [B, N, num_heads * head_dim], qkv's dtype.

    Under autocast qkv is cast to its dtype.

    Raises:
        ValueError: an argument's shape, dtype or value; the message names it.
    """
    _check.operand("attention", "qkv", qkv)
    _check_heads("attention", num_heads)
    if qkv.dim() != 3 or qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"attention: qkv must be [B, N, 3 * num_heads * head_dim] with num_heads={num_heads}; "
            f"got {list(qkv.shape)}"
        )
    scale = _checked_scale("attention", scale, qkv.shape[-1] // (3 * num_heads))
    if (dtype := _check.autocast_dtype(qkv.device)) is not None:
        qkv = _check.cast(qkv, dtype)
    return ATTENTION(qkv, num_heads, scale)


def attention_kv(
    q: torch.Tensor, kv: torch.Tensor, num_heads: int, *, scale: float | None = None
) -> torch.Tensor:
    """Attention of every head for queries of their own, such as a class token alone over all its tokens.

    Computes ``softmax(scale * q @ k.T) @ v`` for each sample and head, without a mask or dropout; scores and
    sums are float32.

    Args:
        q: [B, M, num_heads * head_dim], float32, float16 or bfloat16 (float64 runs in PyTorch), head-major.
            The kernel takes head_dim 32 to 128 in multiples of 8.
        kv: [B, N, 2 * num_heads * head_dim], q's dtype: all of k, then v, each head-major: the last two
            thirds of a packed qkv. N is at least 1.
        num_heads: number of heads.
        scale: of the scores, head_dim ** -0.5 unless given; the kernel takes positive ones.

    Returns:
        [B, M, num_heads * head_dim], q's dtype.

    Under autocast q and kv are cast to its dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or value; the message names it.
    """
    _check.operand("attention_kv", "q", q)
    _check.operand("attention_kv", "kv", kv)
    _check_heads("attention_kv", num_heads)
    if q.dim() != 3 or q.shape[-1] == 0 or q.shape[-1] % num_heads:
        raise ValueError(
            f"attention_kv: q must be [B, M, num_heads * head_dim] with num_heads={num_heads}; "
            f"got {list(q.shape)}"
        )
    batch, _, width = q.shape
    if kv.dim() != 3 or kv.shape[0] != batch or kv.shape[1] == 0 or kv.shape[2] != 2 * width:
        raise ValueError(f"attention_kv: kv must be [{batch}, N, {2 * width}], N > 0; got {list(kv.shape)}")
    scale = _checked_scale("attention_kv", scale, width // num_heads)
    if (dtype := _check.autocast_dtype(q.device)) is not None:
        q, kv = _check.cast(q, dtype), _check.cast(kv, dtype)
    _check.companion("attention_kv", "kv", kv, tuple(kv.shape), q, dtype=q.dtype)
    return ATTENTION_KV(q, kv, num_heads, scale)


def _check_heads(op: str, num_heads: int) -> None:
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"{op}: num_heads must be a positive int; got {num_heads!r}")


def _checked_scale(op: str, scale: float | None, head_dim: int) -> float:
    if scale is None:
        return float(head_dim**-0.5)
    # not math.isfinite: torch.compile(dynamic=True) makes a symbol of the scale, and cannot trace that
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be a finite number or None; got {scale!r}")
    return float(scale)


def table_key(batch: int, n: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> str:
    return tuning.key("attention", dtype, b=tuning.bucket(batch), n=n, h=num_heads, d=head_dim)


def table_key_kv(batch: int, m: int, n: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> str:
    return tuning.key("attention_kv", dtype, b=tuning.bucket(batch), m=m, n=n, h=num_heads, d=head_dim)


class Arguments(NamedTuple):
    qkv: torch.Tensor
    num_heads: int
    scale: float


class ArgumentsKV(NamedTuple):
    q: torch.Tensor
    kv: torch.Tensor
    num_heads: int
    scale: float


def _sizes(a: Arguments) -> tuple[int, int, int, int]:
    batch, n, width = a.qkv.shape
    return batch, n, a.num_heads, width // (3 * a.num_heads)


def _sizes_kv(a: ArgumentsKV) -> tuple[int, int, int, int, int]:
    batch, m, width = a.q.shape
    return batch, m, a.kv.shape[1], a.num_heads, width // a.num_heads


def _kernel(a: Arguments) -> torch.Tensor:
    batch, n, num_heads, head_dim = _sizes(a)
    y = backend.empty((batch, n, num_heads * head_dim), dtype=a.qkv.dtype, device=a.qkv.device)
    qkv = _reachable(a.qkv)
    _launch("attention", table_key(*_sizes(a), y.dtype), qkv, qkv, y, num_heads, a.scale)
    return y


def _kernel_kv(a: ArgumentsKV) -> torch.Tensor:
    y = backend.empty(a.q.shape, dtype=a.q.dtype, device=a.q.device)
    key = table_key_kv(*_sizes_kv(a), y.dtype)
    _launch("attention_kv", key, _reachable(a.q), _reachable(a.kv), y, a.num_heads, a.scale)
    return y


def _launch(
    op: str, key: str, q: torch.Tensor, kv: torch.Tensor, y: torch.Tensor, num_heads: int, scale: float
) -> None:
    from fastvr.kernels.attention import (
        FEW_QUERIES,
        candidate_configs,
        default_config,
        launch_attention_fwd,
    )

    if y.numel() == 0:
        return
    _, m, width = y.shape
    arch, head_dim, few = backend.architecture(y.device), width // num_heads, m <= FEW_QUERIES
    config = tuning.config(
        op,
        key,
        y.device,
        default=lambda: default_config(y.dtype, arch, head_dim=head_dim, few=few),
        candidates=lambda: candidate_configs(y.dtype, arch, head_dim=head_dim, few=few),
    )
    launch_attention_fwd(q=q, kv=kv, y=y, num_heads=num_heads, scale=scale, config=config)


def _reachable(x: torch.Tensor) -> torch.Tensor:
    """The kernel reads contiguous heads, and reaches the rows of a block by 32-bit offsets."""
    return x if x.stride(2) == 1 and x.stride(1) < 2**23 else x.contiguous()


def _fake(a: Arguments) -> torch.Tensor:
    batch, n, width = a.qkv.shape
    return a.qkv.new_empty((batch, n, width // 3))


def _fake_kv(a: ArgumentsKV) -> torch.Tensor:
    return a.q.new_empty(a.q.shape)


def _refused(head_dim: int, scale: float) -> str | None:
    if head_dim % 8 or not 32 <= head_dim <= 128:
        return f"head_dim {head_dim}; the kernel takes 32 to 128 in multiples of 8"
    return f"scale {scale}; the kernel takes positive ones" if scale <= 0 else None


def _unsupported(a: Arguments) -> str | None:
    return _refused(_sizes(a)[-1], a.scale) or _check.kernel_dtypes(a.qkv)


def _unsupported_kv(a: ArgumentsKV) -> str | None:
    return _refused(_sizes_kv(a)[-1], a.scale) or _check.kernel_dtypes(a.q)


def _measured(a: Arguments) -> str:
    # without a measurement PyTorch's own flash kernels run
    return tuning.choice(table_key(*_sizes(a), a.qkv.dtype), a.qkv.device, "reference")


def _measured_kv(a: ArgumentsKV) -> str:
    return tuning.choice(table_key_kv(*_sizes_kv(a), a.q.dtype), a.q.device, "reference")


def _cost(a: Arguments) -> Cost:
    batch, n, num_heads, head_dim = _sizes(a)
    result = batch * n * num_heads * head_dim
    return Cost(4 * n * result, (a.qkv.numel() + result) * a.qkv.element_size())


def _cost_kv(a: ArgumentsKV) -> Cost:
    return Cost(4 * a.kv.shape[1] * a.q.numel(), nbytes(a) + nbytes([a.q]))


ATTENTION = Op(
    "attention",
    "Tensor qkv, int num_heads, float scale",
    arguments=Arguments,
    kernel=_kernel,
    reference=reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
)
ATTENTION_KV = Op(
    "attention_kv",
    "Tensor q, Tensor kv, int num_heads, float scale",
    arguments=ArgumentsKV,
    kernel=_kernel_kv,
    reference=reference_kv,
    fake=_fake_kv,
    unsupported=_unsupported_kv,
    measured=_measured_kv,
    cost=_cost_kv,
)
