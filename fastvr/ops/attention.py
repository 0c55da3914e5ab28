"""attention: softmax(scale * q k') v for every head, from packed qkv, one launch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._op import Cost, Op
from fastvr.reference.attention import attention as reference


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
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"attention: num_heads must be a positive int; got {num_heads!r}")
    if qkv.dim() != 3 or qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"attention: qkv must be [B, N, 3 * num_heads * head_dim] with num_heads={num_heads}; "
            f"got {list(qkv.shape)}"
        )
    if scale is None:
        scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    # not math.isfinite: torch.compile(dynamic=True) makes a symbol of the scale, and cannot trace that
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf:
        raise ValueError(f"attention: scale must be a finite number or None; got {scale!r}")
    if (dtype := _check.autocast_dtype(qkv.device)) is not None:
        qkv = _check.cast(qkv, dtype)
    return ATTENTION(qkv, num_heads, float(scale))


def table_key(batch: int, n: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> str:
    return tuning.key("attention", dtype, b=tuning.bucket(batch), n=n, h=num_heads, d=head_dim)


def _sizes(qkv: torch.Tensor, num_heads: int) -> tuple[int, int, int, int]:
    batch, n, width = qkv.shape
    return batch, n, num_heads, width // (3 * num_heads)


class Arguments(NamedTuple):
    qkv: torch.Tensor
    num_heads: int
    scale: float


def _kernel(a: Arguments) -> torch.Tensor:
    from fastvr.kernels.attention import candidate_configs, default_config, launch_attention_fwd

    batch, n, _, head_dim = _sizes(a.qkv, a.num_heads)
    y = backend.empty((batch, n, a.num_heads * head_dim), dtype=a.qkv.dtype, device=a.qkv.device)
    if y.numel() == 0:
        return y
    arch = backend.architecture(a.qkv.device)
    config = tuning.config(
        "attention",
        table_key(batch, n, a.num_heads, head_dim, a.qkv.dtype),
        a.qkv.device,
        default=lambda: default_config(a.qkv.dtype, arch, head_dim=head_dim),
        candidates=lambda: candidate_configs(a.qkv.dtype, arch, head_dim=head_dim),
    )
    launch_attention_fwd(
        # the kernel reads contiguous heads, and reaches the rows of a block by 32-bit offsets
        qkv=a.qkv if a.qkv.stride(2) == 1 and a.qkv.stride(1) < 2**23 else a.qkv.contiguous(),
        y=y,
        num_heads=a.num_heads,
        scale=a.scale,
        config=config,
    )
    return y


def _fake(a: Arguments) -> torch.Tensor:
    batch, n, width = a.qkv.shape
    return a.qkv.new_empty((batch, n, width // 3))


def _unsupported(a: Arguments) -> str | None:
    head_dim = _sizes(a.qkv, a.num_heads)[-1]
    if head_dim % 8 or not 32 <= head_dim <= 128:
        return f"head_dim {head_dim}; the kernel takes 32 to 128 in multiples of 8"
    if a.scale <= 0:
        return f"scale {a.scale}; the kernel takes positive ones"
    return _check.kernel_dtypes(a.qkv)


def _measured(a: Arguments) -> str:
    # without a measurement PyTorch's own flash kernels run
    return tuning.choice(table_key(*_sizes(a.qkv, a.num_heads), a.qkv.dtype), a.qkv.device, "reference")


def _cost(a: Arguments) -> Cost:
    batch, n, _, head_dim = _sizes(a.qkv, a.num_heads)
    result = batch * n * a.num_heads * head_dim
    return Cost(4 * n * result, (a.qkv.numel() + result) * a.qkv.element_size())


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
