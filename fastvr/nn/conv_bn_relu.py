"""Convolution, BatchNorm, residual addition and activation of separate modules, as one computation."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from fastvr import backend
from fastvr.nn.plain import plain
from fastvr.nn.running_statistics import track
from fastvr.ops import _check
from fastvr.ops.batch_norm_act import batch_norm_act, fuses_batch_norm_act
from fastvr.ops.conv_bn_relu import CONV_BN_RELU, BatchNorm, run_packed
from fastvr.ops.conv_bn_relu import conv_bn_relu as conv_bn_relu_op
from fastvr.ops.cpu import mkldnn
from fastvr.ops.dual_conv_bn_relu import dual_conv_bn_relu as dual_conv_bn_relu_op


class ScaleShift(nn.Module):
    """``x * scale + shift`` a channel: what ``prepare`` makes of a BatchNorm in eval.

    ``scale`` and ``shift`` are [C], float32 (float64 for a float64 model), whatever the model's dtype.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        mean, var = bn.running_mean, bn.running_var
        if mean is None or var is None:
            raise ValueError("ScaleShift: bn must have running statistics; got track_running_stats=False")
        dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
        scale = (var.detach().double() + bn.eps).rsqrt()
        # the stubs say Parameter, but affine=False leaves None
        weight: torch.Tensor | None = bn.weight
        bias: torch.Tensor | None = bn.bias
        if weight is not None:
            scale = scale * weight.detach().double()
        shift = -mean.detach().double() * scale
        if bias is not None:
            shift = shift + bias.detach().double()
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("shift", shift.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.scale[:, None, None] + self.shift[:, None, None]
        return y.to(x.dtype)


def conv_bn_relu(
    conv: nn.Module,
    bn: nn.Module,
    relu: nn.Module | None,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``relu(bn(conv(x)) + residual)``; ``relu`` None is none.

    One launch where ``bn`` normalises by its running statistics (in eval, or frozen in training) and no
    module is observed or replaced. Where it does by the batch's own, or its weight is trained, everything
    behind the convolution is one op, if its kernel runs; else the modules are called.
    """
    act = "none" if relu is None else "relu"
    if (
        (packed := mkldnn.kept_in_pass(conv)) is not None
        and isinstance(conv, nn.Conv2d)
        and packed.scale is bn._buffers.get("scale")
        and (relu is None or plain(relu, nn.ReLU))
    ):
        return run_packed(x, packed, conv.stride, conv.padding, conv.groups, act, residual)  # type: ignore[arg-type]
    norm = batch_norm(bn)
    if (
        norm is None
        or not (plain_conv(conv) and conv.bias is None)
        or not (relu is None or plain(relu, nn.ReLU))
    ):
        return norm_act(bn, relu, convolve(conv, x), residual)
    weight, stride, padding, groups = conv.weight, conv.stride, conv.padding, conv.groups
    if not backend.kernels_possible(x.device) and _check.autocast_dtype(x.device) is None:
        # PyTorch checks what modules hand it, and checking it twice would cost as much as calling it
        return CONV_BN_RELU(x, weight, *norm, stride, padding, groups, act, residual, None, None)
    given: dict[str, Any] = {"eps": norm.eps, "stride": stride, "padding": padding, "groups": groups}
    return conv_bn_relu_op(x, weight, *norm[:4], **given, act=act, residual=residual)


def norm_act(
    bn: nn.Module, relu: nn.Module | None, made: torch.Tensor, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """``relu(bn(made) + residual)``, one op where ``bn`` is trained, its kernel runs and no module is
    observed or replaced."""
    act = "none" if relu is None else "relu"
    if (
        (takes_batch_statistics(bn) or trains_frozen(bn))
        and (relu is None or plain(relu, nn.ReLU))
        and fuses_batch_norm_act(made, bn, residual, act)
    ):
        if trains_frozen(bn):
            given = {"running_mean": bn.running_mean, "running_var": bn.running_var}
            return batch_norm_act(made, bn.weight, bn.bias, eps=bn.eps, residual=residual, act=act, **given)[
                0
            ]
        normalised, mean, var = batch_norm_act(
            made, bn.weight, bn.bias, eps=bn.eps, residual=residual, act=act
        )
        track([bn], [(mean, var)], [made.numel() // made.shape[1]])
        return normalised
    y: torch.Tensor = bn(made)
    if residual is not None:
        y = y + residual
    if relu is None:
        return y
    # not in place, as the module has it: a backward hook on bn forbids that, and nothing is saved by it
    return F.relu(y) if plain(relu, nn.ReLU) else relu(y)


def dual_conv_bn_relu(
    conv: nn.Module,
    bn: nn.Module,
    relu: nn.Module | None,
    x: torch.Tensor,
    conv2: nn.Module,
    bn2: nn.Module,
    x2: torch.Tensor,
) -> torch.Tensor:
    """``relu(bn(conv(x)) + bn2(conv2(x2)))``: a residual block's last convolution and its shortcut's.

    One launch where both are plain 1x1 convolutions under the conditions of :func:`conv_bn_relu`.
    """
    norm, norm2 = batch_norm(bn), batch_norm(bn2)
    if (
        # else its parts would run, each of which checks its arguments itself
        backend.kernels_possible(x.device)
        and norm is not None
        and norm2 is not None
        and pointwise(conv)
        and conv.stride == (1, 1)
        and pointwise(conv2)
        and (relu is None or plain(relu, nn.ReLU))
    ):
        act = "none" if relu is None else "relu"
        return dual_conv_bn_relu_op(
            x, conv.weight, norm, x2, conv2.weight, norm2, stride2=conv2.stride, act=act
        )
    return conv_bn_relu(conv, bn, relu, x, residual=conv_bn_relu(conv2, bn2, None, x2))


def batch_norm(bn: nn.Module) -> BatchNorm | None:
    """What ``bn`` computes by running statistics, in eval or frozen in training; None where it does
    not, or where it is observed or replaced, or its own weight is trained: its gradient reads what the
    convolution made, so no op may swallow that."""
    if (
        plain(bn, nn.BatchNorm2d)
        and not bn.training
        and bn.running_mean is not None
        and not trains_frozen(bn)
    ):
        return BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
    if plain(bn, ScaleShift):
        return BatchNorm(bn.scale, bn.shift)
    return None


def trains_frozen(bn: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether ``bn``, a plain ``nn.BatchNorm2d`` of running statistics, gets a gradient of its weight where
    kernels may run."""
    if not (torch.is_grad_enabled() and plain(bn, nn.BatchNorm2d)) or bn.training or bn.running_mean is None:
        return False
    # the stubs say Parameter, but affine=False leaves None
    weight: torch.Tensor | None = bn.weight
    return weight is not None and weight.requires_grad and backend.kernels_possible(weight.device)


def takes_batch_statistics(bn: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether ``bn`` is a plain ``nn.BatchNorm2d`` with weight and bias that normalises by the batch."""
    if not plain(bn, nn.BatchNorm2d):
        return False
    # the stubs say Parameter, but affine=False leaves None
    parameters: list[torch.Tensor | None] = [bn.weight, bn.bias]
    return None not in parameters and (bn.training or (bn.running_mean is None and bn.running_var is None))


def convolve(
    conv: nn.Module, x: torch.Tensor, mean: torch.Tensor | None = None, std: torch.Tensor | None = None
) -> torch.Tensor:
    """``conv(x)``, through the op where ``conv`` is plain: only then bytes, with ``mean`` and ``std``."""
    if plain_conv(conv):
        return conv_bn_relu_op(
            x,
            conv.weight,
            None,
            conv.bias,
            stride=conv.stride,
            padding=conv.padding,  # type: ignore[arg-type]
            groups=conv.groups,
            act="none",
            mean=mean,
            std=std,
        )
    y: torch.Tensor = conv(x)
    return y


def plain_conv(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether ``conv`` is a plain ``nn.Conv2d`` that the op can compute: zero padding, no dilation."""
    return (
        plain(conv, nn.Conv2d)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def pointwise(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether ``conv`` is a plain 1x1 convolution of one group without bias or padding."""
    return (
        plain_conv(conv)
        and conv.bias is None
        and conv.groups == 1
        and conv.kernel_size == (1, 1)
        and conv.padding == (0, 0)
    )
