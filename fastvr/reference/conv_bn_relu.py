"""y = act(bn(conv(x)) + residual)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_input, conv2d_weight

from fastvr.reference.image import normalize
from fastvr.reference.linear import as_kernels_write, overwritable

ACTIVATIONS = ("none", "relu")


def _one_dtype(y: torch.Tensor, *vectors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The vectors as F.batch_norm takes them beside y: all in one dtype, y's own or a wider one, and dense,
    since its backward on a CPU reads past strided ones where y is channels_last."""
    dtypes = {v.dtype for v in vectors if v is not None}
    if len(dtypes) == 1 and y.dtype != torch.float64:
        return [None if v is None else v.contiguous() for v in vectors]
    dtype = functools.reduce(torch.promote_types, dtypes, y.dtype)
    return [None if v is None else v.to(dtype).contiguous() for v in vectors]


def _batch_norm(
    y: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    *,
    eps: float,
) -> torch.Tensor:
    """``F.batch_norm`` in eval, written over y where that is safe: fresh memory costs a CPU more than it."""
    if (
        y.device.type != "cpu"
        or not overwritable(y)
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return F.batch_norm(y, mean, var, weight, bias, False, 0.0, eps)
    assert mean is not None
    # the binding, and not torch.ops, which takes longer than the work on a small map
    unused = mean.new_empty(0), mean.new_empty(0)
    torch.native_batch_norm(y, weight, bias, mean, var, False, 0.0, eps, out=(y, *unused))
    return y


def conv_bn_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bn_weight: torch.Tensor | None = None,
    bn_bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    eps: float = 1e-5,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    groups: int = 1,
    act: str = "relu",
    residual: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
) -> torch.Tensor:
    x = normalize(x, mean, std, weight.dtype)
    y = F.conv2d(x, weight, None, tuple(stride), tuple(padding), 1, groups)
    if running_mean is not None:
        y = _batch_norm(y, *_one_dtype(y, bn_weight, bn_bias, running_mean, running_var), eps=eps)
    else:
        dtype = y.dtype
        if bn_weight is not None:
            y = y * bn_weight[:, None, None]
        if bn_bias is not None:
            y = y + bn_bias[:, None, None]
        y = y.to(dtype)
    # in place, as torchvision's blocks have it: y is nobody else's, and nothing here saves it for backward
    if residual is not None:
        y = y.add_(residual) if residual.dtype == y.dtype and overwritable(y) else y + residual
    if act == "relu":
        y = y.relu_() if overwritable(y) else y.relu()
    return as_kernels_write(y)


def conv_bn_relu_backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    x: torch.Tensor | None,
    size: Sequence[int],
    weight: torch.Tensor,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_var: torch.Tensor | None,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """Those of x, weight, bn_bias and residual that are needed."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    if y is not None:
        # a NaN lets the gradient through
        grad = grad.masked_fill(y <= 0, 0)
    scale = torch.ones(len(weight), dtype=wide, device=grad.device)
    if running_var is not None:
        scale = (running_var.to(wide) + eps).rsqrt()
    scale = (scale if bn_weight is None else scale * bn_weight)[:, None, None, None]
    steps: dict[str, Any] = {"stride": tuple(stride), "padding": tuple(padding), "groups": groups}
    given, found = grad.to(weight.dtype), []
    if needs[0]:
        scaled = (weight * scale).to(weight.dtype)
        dx = conv2d_input(tuple(size), scaled, given, **steps)
        found.append(dx.contiguous(memory_format=torch.channels_last))
    if needs[1]:
        assert x is not None
        product = conv2d_weight(normalize(x, mean, std, weight.dtype), weight.shape, given, **steps)
        # functional, for exporters, and in weight's layout
        found.append(torch.ops.aten.copy(weight, product * scale))
    if needs[2]:
        assert bn_bias is not None
        found.append(grad.sum((0, 2, 3), dtype=wide).to(bn_bias.dtype))
    return [*found, *([grad.contiguous(memory_format=torch.channels_last)] if needs[3] else [])]
