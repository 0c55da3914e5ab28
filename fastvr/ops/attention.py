"""attention: softmax(scale * q k') v for every head, from packed qkv, one launch; attention_kv: the same for
queries that come by themselves. With `_training` they also leave what their gradient needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._heads import reachable, refused
from fastvr.ops._op import Cost, Gradient, Op, nbytes
from fastvr.ops.attention_backward import ATTENTION_BACKWARD, ATTENTION_KV_BACKWARD
from fastvr.ops.cpu import onednn_attention
from fastvr.ops.cpu.prepared_pass import current
from fastvr.ops.dropout import draw_seed
from fastvr.reference.attention import attention as reference
from fastvr.reference.attention import attention_kv as reference_kv
from fastvr.reference.attention import attention_kv_training as reference_kv_training
from fastvr.reference.attention import attention_training as reference_training


def attention(
    qkv: torch.Tensor, num_heads: int, *, scale: float | None = None, dropout_p: float = 0.0
) -> torch.Tensor:
    """Self-attention of every head, straight from a packed qkv projection, without a mask.

    Computes ``softmax(scale * q @ k.T) @ v`` for each sample and head; scores and sums are float32.

    Args:
        qkv: [B, N, 3 * num_heads * head_dim], float32, float16 or bfloat16 (float64 runs in PyTorch): all of
            q, then k, then v, each head-major, as timm packs them. The kernel takes head_dim 32 to 128 in
            multiples of 8.
        num_heads: number of heads.
        scale: of the scores, head_dim ** -0.5 unless given; the kernel takes positive ones.
        dropout_p: the probability with which each weight is dropped, 0 to 1; the others are divided by
            1 - dropout_p. Where PyTorch's own attention runs, the random numbers are its own. Kernels, which
            run where a gradient is needed, have the same distribution from a stream of theirs: Philox 4x32-10
            at each weight's place, by a seed that PyTorch's generator draws on the device. So
            ``torch.manual_seed`` decides, and a CUDA graph draws anew at each replay.

    Returns:
        [B, N, num_heads * head_dim], qkv's dtype.

    Under autocast qkv is cast to its dtype.

    Raises:
        ValueError: an argument's shape, dtype or value; the message names it.
    """
    _check.operand("attention", "qkv", qkv)
    _check.heads("attention", num_heads)
    if qkv.dim() != 3 or qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"attention: qkv must be [B, N, 3 * num_heads * head_dim] with num_heads={num_heads}; "
            f"got {list(qkv.shape)}"
        )
    scale = _check.scale("attention", scale, qkv.shape[-1] // (3 * num_heads))
    if (dtype := _check.autocast_dtype(qkv.device)) is not None:
        qkv = _check.cast(qkv, dtype)
    return attend(qkv, num_heads, scale, _check.probability("attention", "dropout_p", dropout_p))


def attend(qkv: torch.Tensor, num_heads: int, scale: float, dropout_p: float) -> torch.Tensor:
    """:func:`attention` of arguments that were found good."""
    if dropout_p == 0:
        return ATTENTION(qkv, num_heads, scale)
    if ATTENTION_TRAINING.trains(qkv, num_heads, scale, dropout_p):
        return ATTENTION_TRAINING(qkv, num_heads, scale, dropout_p, draw_seed(qkv))[0]
    backend.ran("attention", "reference")
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    return y.transpose(1, 2).flatten(2)


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
    _check.heads("attention_kv", num_heads)
    if q.dim() != 3 or q.shape[-1] == 0 or q.shape[-1] % num_heads:
        raise ValueError(
            f"attention_kv: q must be [B, M, num_heads * head_dim] with num_heads={num_heads}; "
            f"got {list(q.shape)}"
        )
    batch, _, width = q.shape
    if kv.dim() != 3 or kv.shape[0] != batch or kv.shape[1] == 0 or kv.shape[2] != 2 * width:
        raise ValueError(f"attention_kv: kv must be [{batch}, N, {2 * width}], N > 0; got {list(kv.shape)}")
    scale = _check.scale("attention_kv", scale, width // num_heads)
    if (dtype := _check.autocast_dtype(q.device)) is not None:
        q, kv = _check.cast(q, dtype), _check.cast(kv, dtype)
    _check.companion("attention_kv", "kv", kv, tuple(kv.shape), q, dtype=q.dtype)
    return ATTENTION_KV(q, kv, num_heads, scale)


def table_key(
    batch: int,
    n: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    op: str = "attention",
    *,
    dropout: bool = False,
) -> str:
    drop = {"drop": 1} if dropout else {}
    return tuning.key(op, dtype, b=tuning.bucket(batch), n=n, h=num_heads, d=head_dim, **drop)


def table_key_kv(
    batch: int, m: int, n: int, num_heads: int, head_dim: int, dtype: torch.dtype, op: str = "attention_kv"
) -> str:
    return tuning.key(op, dtype, b=tuning.bucket(batch), m=m, n=n, h=num_heads, d=head_dim)


class Arguments(NamedTuple):
    """``seed``, with ``dropout_p``, is [2] int64: what the weights are dropped by. Only the training form has
    both."""

    qkv: torch.Tensor
    num_heads: int
    scale: float
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None


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
    return _run(a, "attention")


def _kernel_training(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    batch, n, num_heads, _ = _sizes(a)
    lse = _empty_lse(a.qkv, batch, num_heads, n)
    return _run(a, "attention_training", lse), lse


def _run(a: Arguments, op: str, lse: torch.Tensor | None = None) -> torch.Tensor:
    batch, n, num_heads, head_dim = _sizes(a)
    y = backend.empty((batch, n, num_heads * head_dim), dtype=a.qkv.dtype, device=a.qkv.device)
    qkv = reachable(a.qkv)
    key = table_key(*_sizes(a), y.dtype, op, dropout=a.seed is not None)
    _launch(op, key, qkv, qkv, y, lse, num_heads, a.scale, a.dropout_p, a.seed)
    return y


def _kernel_kv(a: ArgumentsKV) -> torch.Tensor:
    return _run_kv(a, "attention_kv")


def _kernel_kv_training(a: ArgumentsKV) -> tuple[torch.Tensor, torch.Tensor]:
    batch, m, _, num_heads, _ = _sizes_kv(a)
    lse = _empty_lse(a.q, batch, num_heads, m)
    return _run_kv(a, "attention_kv_training", lse), lse


def _run_kv(a: ArgumentsKV, op: str, lse: torch.Tensor | None = None) -> torch.Tensor:
    y = backend.empty(a.q.shape, dtype=a.q.dtype, device=a.q.device)
    key = table_key_kv(*_sizes_kv(a), y.dtype, op)
    _launch(op, key, reachable(a.q), reachable(a.kv), y, lse, a.num_heads, a.scale)
    return y


def _empty_lse(x: torch.Tensor, batch: int, num_heads: int, m: int) -> torch.Tensor:
    return backend.empty((batch, num_heads, m), dtype=torch.float32, device=x.device)


def _launch(
    op: str,
    key: str,
    q: torch.Tensor,
    kv: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor | None,
    num_heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
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
    arch, head_dim = backend.architecture(y.device), width // num_heads
    kind = {"few": m <= FEW_QUERIES, "dropout": seed is not None}
    config = tuning.config(
        op,
        key,
        y.device,
        default=lambda: default_config(y.dtype, arch, head_dim=head_dim, **kind),
        candidates=lambda: candidate_configs(y.dtype, arch, head_dim=head_dim, **kind),
    )
    launch_attention_fwd(
        q=q,
        kv=kv,
        y=y,
        lse=lse,
        num_heads=num_heads,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        config=config,
    )


def _vendor(a: Arguments) -> torch.Tensor | None:
    run = current()
    if run is None or onednn_attention.key(a.qkv, a.num_heads, a.scale) not in run.chosen:
        return None
    backend.ran("attention", "mkldnn")
    return onednn_attention.attention(a.qkv, a.num_heads, a.scale)


def _fake(a: Arguments) -> torch.Tensor:
    batch, n, width = a.qkv.shape
    return a.qkv.new_empty((batch, n, width // 3))


def _fake_kv(a: ArgumentsKV) -> torch.Tensor:
    return a.q.new_empty(a.q.shape)


def _fake_training(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    batch, n, num_heads, _ = _sizes(a)
    dtype = torch.promote_types(a.qkv.dtype, torch.float32)
    return _fake(a), a.qkv.new_empty((batch, num_heads, n), dtype=dtype)


def _fake_kv_training(a: ArgumentsKV) -> tuple[torch.Tensor, torch.Tensor]:
    batch, m, _, num_heads, _ = _sizes_kv(a)
    dtype = torch.promote_types(a.q.dtype, torch.float32)
    return _fake_kv(a), a.q.new_empty((batch, num_heads, m), dtype=dtype)


def _unsupported(a: Arguments) -> str | None:
    return refused(_sizes(a)[-1], a.scale) or _check.kernel_dtypes(a.qkv)


def _unsupported_kv(a: ArgumentsKV) -> str | None:
    return refused(_sizes_kv(a)[-1], a.scale) or _check.kernel_dtypes(a.q)


def _measured(a: Arguments) -> str:
    # without a measurement PyTorch's own flash kernels run
    return tuning.choice(table_key(*_sizes(a), a.qkv.dtype), a.qkv.device, "reference")


def _measured_kv(a: ArgumentsKV) -> str:
    return tuning.choice(table_key_kv(*_sizes_kv(a), a.q.dtype), a.q.device, "reference")


def _measured_training(a: Arguments) -> str:
    key = table_key(*_sizes(a), a.qkv.dtype, "attention_training", dropout=a.dropout_p > 0)
    return tuning.choice(key, a.qkv.device, "reference")


def _measured_kv_training(a: ArgumentsKV) -> str:
    key = table_key_kv(*_sizes_kv(a), a.q.dtype, "attention_kv_training")
    return tuning.choice(key, a.q.device, "reference")


def _cost(a: Arguments) -> Cost:
    batch, n, num_heads, head_dim = _sizes(a)
    result = batch * n * num_heads * head_dim
    return Cost(4 * n * result, (a.qkv.numel() + result) * a.qkv.element_size())


def _cost_kv(a: ArgumentsKV) -> Cost:
    return Cost(4 * a.kv.shape[1] * a.q.numel(), nbytes(a) + nbytes([a.q]))


def _cost_training(a: Arguments) -> Cost:
    cost = _cost(a)
    return Cost(cost.flops, cost.bytes + nbytes(_fake_training(a)[1:]))


def _cost_kv_training(a: ArgumentsKV) -> Cost:
    cost = _cost_kv(a)
    return Cost(cost.flops, cost.bytes + nbytes(_fake_kv_training(a)[1:]))


def _backward(
    a: Arguments, results: tuple[torch.Tensor, torch.Tensor], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    return {"qkv": ATTENTION_BACKWARD(grad, a.qkv, *results, *a[1:])}


def _backward_kv(
    a: ArgumentsKV, results: tuple[torch.Tensor, torch.Tensor], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    asked = "q" in needs, "kv" in needs
    dq, dkv = ATTENTION_KV_BACKWARD(grad, a.q, a.kv, *results, a.num_heads, a.scale, *asked)
    return {"q": dq, "kv": dkv}


ATTENTION_TRAINING = Op(
    "attention_training",
    "Tensor qkv, int num_heads, float scale, float dropout_p=0.0, Tensor? seed=None",
    arguments=Arguments,
    kernel=_kernel_training,
    reference=reference_training,
    fake=_fake_training,
    unsupported=_unsupported,
    measured=_measured_training,
    cost=_cost_training,
    returns="(Tensor, Tensor)",
    gradient=Gradient(saves=lambda a, needs: ("qkv", "seed", 0, 1), backward=_backward),
)
ATTENTION_KV_TRAINING = Op(
    "attention_kv_training",
    "Tensor q, Tensor kv, int num_heads, float scale",
    arguments=ArgumentsKV,
    kernel=_kernel_kv_training,
    reference=reference_kv_training,
    fake=_fake_kv_training,
    unsupported=_unsupported_kv,
    measured=_measured_kv_training,
    cost=_cost_kv_training,
    returns="(Tensor, Tensor)",
    gradient=Gradient(saves=lambda a, needs: ("q", "kv", 0, 1), backward=_backward_kv),
)


# A traced program holds the operator itself, and somebody may differentiate it later
def _backward_of_traced(
    a: Arguments, results: tuple[None], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    return _backward(a, ATTENTION_TRAINING(*a), grad, needs)


def _backward_of_traced_kv(
    a: ArgumentsKV, results: tuple[None], grad: torch.Tensor, needs: frozenset[str]
) -> dict[str, torch.Tensor]:
    return _backward_kv(a, ATTENTION_KV_TRAINING(*a), grad, needs)


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
    vendor=_vendor,
    gradient=Gradient(saves=lambda a, needs: ("qkv",), backward=_backward_of_traced),
    training=ATTENTION_TRAINING,
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
    gradient=Gradient(saves=lambda a, needs: ("q", "kv"), backward=_backward_of_traced_kv),
    training=ATTENTION_KV_TRAINING,
)
