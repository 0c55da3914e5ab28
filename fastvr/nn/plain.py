"""Which modules a container may compute for, with their parameters, instead of calling them.

A container that fuses never calls the modules inside it. So it asks here first whether anybody would notice:
a hook, a subclass or a replacement (LoRA, quantisation), a patched ``forward``. Where somebody would, that
module is called, and the numbers stay within the parity rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fastvr import backend
from fastvr.ops import _check
from fastvr.ops.layer_norm import layer_norm as layer_norm_op
from fastvr.ops.linear import checked, run
from fastvr.ops.linear import linear as linear_op
from fastvr.reference.linear import scale_samples

_Module = TypeVar("_Module", bound=nn.Module)

# Draws what stochastic depth multiplies a tensor's samples by, [B], or None where it drops nothing. Called
# where the branch ends, so that random numbers come in the order in which the modules would have drawn them.
DrawScale = Callable[[torch.Tensor], torch.Tensor | None]


def plain(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether ``module`` is exactly a ``kind``, as an accelerated one is, and nobody observes its call."""
    return (
        getattr(type(module), "_fastvr_accelerates", type(module)) is kind
        and not has_hooks(module)
        and "forward" not in module.__dict__
        and not _has_any_global_hook()
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after ``module``'s forward or backward pass."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def idle(module: nn.Module) -> bool:
    """Whether ``module`` is a dropout (or an identity in its place) that passes its input on as it is."""
    if plain(module, nn.Dropout):
        return not module.training or module.p == 0
    return plain(module, nn.Identity)


def drop_rate(drop: nn.Module, *, by_kernels: bool = True) -> float | None:
    """With which probability ``drop`` drops, where an op may do it: 0 where it is idle, None where it has to
    be called, since somebody observes or replaced it, or (not ``by_kernels``) its random numbers stay
    PyTorch's."""
    if idle(drop):
        return 0.0
    return drop.p if by_kernels and plain(drop, nn.Dropout) else None


def drops_apart(drop: nn.Module, x: torch.Tensor, *, by_kernels: bool = True) -> bool:
    """Whether a part of what ``drop`` is given may be dropped by itself: it is idle, or its random numbers
    may be others than those of a call for the whole, as where kernels run."""
    if idle(drop):
        return True
    return drop_rate(drop, by_kernels=by_kernels) is not None and backend.kernels_possible(x.device)


def drawn(drop_path: DrawScale | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if drop_path is None else drop_path(x)


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``module(x)``, through the op where ``module`` is a plain ``nn.Linear``."""
    if plain(module, nn.Linear):
        return linear_op(x, module.weight, module.bias)
    return _called(module, x)


def dropped_linear(
    module: nn.Module,
    drop: nn.Module,
    x: torch.Tensor,
    *,
    act: str = "none",
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    drop_path: DrawScale | None = None,
    by_kernels: bool = True,
) -> torch.Tensor:
    """``residual + drop_path(gamma * drop(act(module(x))))``, through the op where it does all of that; with
    an activation ``module`` is a plain ``nn.Linear``."""
    p = drop_rate(drop, by_kernels=by_kernels)
    if plain(module, nn.Linear) and p is not None:
        a = checked(x, module.weight, module.bias, act, gamma, residual, dropout_p=p)
        return run(a, drop_path)
    y = linear_op(x, module.weight, module.bias, act=act) if plain(module, nn.Linear) else _called(module, x)
    y = _called(drop, y)
    return join(y, gamma, residual, drawn(drop_path, y))


def plain_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether ``module`` is a plain ``nn.LayerNorm`` over the last dimension with a weight."""
    # the stub says Parameter, but elementwise_affine=False leaves None
    weight: torch.Tensor | None = module.weight if plain(module, nn.LayerNorm) else None
    return weight is not None and weight.dim() == 1


def layer_norm(module: nn.Module, x: torch.Tensor, *, for_matmul: bool = False) -> torch.Tensor:
    """``module(x)``, through the op where ``module`` is a plain ``nn.LayerNorm``.

    ``for_matmul``: only a matmul reads the result, so that autocast may round it to its dtype at once.
    """
    if plain_norm(module):
        narrow = for_matmul and x.dtype != torch.float64
        out_dtype = _check.autocast_dtype(x.device) if narrow else None
        return layer_norm_op(x, module.weight, module.bias, module.eps, out_dtype=out_dtype)
    return _called(module, x)


def join(
    y: torch.Tensor,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    sample_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual + sample_scale * gamma * y`` for a branch that could not be fused."""
    if gamma is not None:
        y = y * gamma
    y = scale_samples(y, sample_scale)
    return y if residual is None else residual + y


def _called(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module(x)
    return result
