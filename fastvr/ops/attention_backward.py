"""attention_backward: attention's gradient, packed as qkv is; attention_kv_backward: attention_kv's. Two
launches, over a few keys one; deterministic."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._heads import reachable, refused
from fastvr.ops._op import Cost, Op, nbytes, reference_gradients
from fastvr.reference.attention import attention as reference
from fastvr.reference.attention import attention_kv as reference_kv


class Arguments(NamedTuple):
    grad: torch.Tensor
    qkv: torch.Tensor
    y: torch.Tensor
    lse: torch.Tensor
    num_heads: int
    scale: float
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None


class ArgumentsKV(NamedTuple):
    grad: torch.Tensor
    q: torch.Tensor
    kv: torch.Tensor
    y: torch.Tensor
    lse: torch.Tensor
    num_heads: int
    scale: float
    needs_q: bool
    needs_kv: bool


def _key(a: Arguments) -> str:
    batch, n, width = a.y.shape
    sizes = {"n": n, "h": a.num_heads, "d": width // a.num_heads} | ({} if a.seed is None else {"drop": 1})
    return tuning.key("attention_backward", a.qkv.dtype, b=tuning.bucket(batch), **sizes)


def _key_kv(a: ArgumentsKV) -> str:
    batch, m, width = a.y.shape
    sizes = {"m": m, "n": a.kv.shape[1], "h": a.num_heads, "d": width // a.num_heads}
    return tuning.key("attention_kv_backward", a.q.dtype, b=tuning.bucket(batch), **sizes)


def _kernel(a: Arguments) -> torch.Tensor:
    dqkv = backend.empty(a.qkv.shape, dtype=a.qkv.dtype, device=a.qkv.device)
    qkv = reachable(a.qkv)
    rest = ArgumentsKV(a.grad, qkv, qkv, a.y, a.lse, a.num_heads, a.scale, True, True)
    _launch("attention_backward", _key(a), rest, dqkv, dqkv, a.dropout_p, a.seed)
    return dqkv


def _kernel_kv(a: ArgumentsKV) -> tuple[torch.Tensor, torch.Tensor]:
    dq, dkv = (backend.empty(size, dtype=a.q.dtype, device=a.q.device) for size in _sizes_of_gradients(a))
    if a.y.numel() == 0:
        return dq, dkv.zero_()
    _launch("attention_kv_backward", _key_kv(a), a, dq if a.needs_q else None, dkv if a.needs_kv else None)
    return dq, dkv


def _launch(
    op: str,
    key: str,
    a: ArgumentsKV,
    dq: torch.Tensor | None,
    dkv: torch.Tensor | None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> None:
    from fastvr.kernels.attention import TAIL
    from fastvr.kernels.attention_backward import candidate_configs, default_config, launch_attention_bwd

    if a.y.numel() == 0:
        return
    arch, head_dim = backend.architecture(a.y.device), a.y.shape[-1] // a.num_heads
    kind = {"few": a.kv.shape[1] <= TAIL, "dropout": seed is not None}
    config = tuning.config(
        op,
        key,
        a.y.device,
        default=lambda: default_config(a.y.dtype, arch, head_dim=head_dim, **kind),
        candidates=lambda: candidate_configs(a.y.dtype, arch, head_dim=head_dim, **kind),
    )
    # over so few keys the kernel takes the rows' means where it needs them
    delta = None if kind["few"] else backend.empty(a.lse.shape, dtype=torch.float32, device=a.y.device)
    launch_attention_bwd(
        grad=reachable(a.grad),
        q=reachable(a.q),
        kv=reachable(a.kv),
        y=a.y.contiguous(),
        lse=a.lse.contiguous(),
        delta=delta,
        dq=dq,
        dkv=dkv,
        num_heads=a.num_heads,
        scale=a.scale,
        dropout_p=dropout_p,
        seed=seed,
        config=config,
    )


def _reference(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    num_heads: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    (dqkv,) = reference_gradients(reference, (qkv, num_heads, scale, dropout_p, seed), grad, [0])
    return dqkv.contiguous()


def _reference_kv(
    grad: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    y: torch.Tensor,
    lse: torch.Tensor,
    num_heads: int,
    scale: float,
    needs_q: bool,
    needs_kv: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = [0] * needs_q + [1] * needs_kv
    found = reference_gradients(reference_kv, (q, kv, num_heads, scale), grad, wanted)
    grads = dict(zip(wanted, found, strict=True))
    dq, dkv = (grads.get(i, q.new_empty(0)).contiguous() for i in (0, 1))
    return dq, dkv


def _sizes_of_gradients(a: ArgumentsKV) -> tuple[torch.Size, torch.Size]:
    """What is not needed comes back empty: an operator cannot return None."""
    nothing = torch.Size([0])
    return a.q.shape if a.needs_q else nothing, a.kv.shape if a.needs_kv else nothing


def _fake(a: Arguments) -> torch.Tensor:
    return a.qkv.new_empty(a.qkv.shape)


def _fake_kv(a: ArgumentsKV) -> tuple[torch.Tensor, torch.Tensor]:
    like_q, like_kv = _sizes_of_gradients(a)
    return a.q.new_empty(like_q), a.kv.new_empty(like_kv)


def _unsupported(a: Arguments | ArgumentsKV) -> str | None:
    return refused(a.y.shape[-1] // a.num_heads, a.scale) or _check.kernel_dtypes(a.grad, a.y)


def _cost(a: Arguments) -> Cost:
    # five products: scores, and a gradient of each operand of the two products of the forward pass
    return Cost(10 * a.y.shape[1] * a.y.numel(), nbytes(a) + nbytes([a.qkv]))


def _cost_kv(a: ArgumentsKV) -> Cost:
    products = 2 + a.needs_q + 2 * a.needs_kv
    return Cost(2 * products * a.kv.shape[1] * a.y.numel(), nbytes(a) + nbytes(_fake_kv(a)))


# the default is the kernel: only where the forward pass ran by one is this op called
ATTENTION_BACKWARD = Op(
    "attention_backward",
    "Tensor grad, Tensor qkv, Tensor y, Tensor lse, int num_heads, float scale, float dropout_p=0.0, "
    "Tensor? seed=None",
    arguments=Arguments,
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=lambda a: tuning.choice(_key(a), a.qkv.device, "triton"),
    cost=_cost,
    differentiable=False,
)
ATTENTION_KV_BACKWARD = Op(
    "attention_kv_backward",
    "Tensor grad, Tensor q, Tensor kv, Tensor y, Tensor lse, int num_heads, float scale, bool needs_q, "
    "bool needs_kv",
    arguments=ArgumentsKV,
    kernel=_kernel_kv,
    reference=_reference_kv,
    fake=_fake_kv,
    unsupported=_unsupported,
    measured=lambda a: tuning.choice(_key_kv(a), a.q.device, "triton"),
    cost=_cost_kv,
    returns="(Tensor, Tensor)",
    differentiable=False,
)
