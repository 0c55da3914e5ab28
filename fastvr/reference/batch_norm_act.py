"""y = act(bn(x) + residual), BatchNorm by the batch's own statistics (Ioffe, Szegedy, 2015) or given ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    act: str = "relu",
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and the batch's mean and biased variance; these empty where others are given."""
    x = x.contiguous(memory_format=torch.channels_last)
    # parameters in float32 beside 16-bit maps, as PyTorch's kernels take them on every device
    wide = torch.promote_types(x.dtype, torch.float32)
    if running_mean is not None and running_var is not None:
        given = running_mean.to(wide), running_var.to(wide)
        y = F.batch_norm(x, *given, weight.to(wide), bias.to(wide), False, 0.0, eps)
        mean, var = torch.zeros((2, 0), dtype=wide, device=x.device).unbind()
    else:
        mean, unbiased = torch.zeros((2, x.shape[1]), dtype=wide, device=x.device).unbind()
        y = F.batch_norm(x, mean, unbiased, weight.to(wide), bias.to(wide), True, 1.0, eps)
        pixels = x.numel() // x.shape[1]
        var = unbiased * ((pixels - 1) / max(pixels, 1))
    if residual is not None:
        y = y + residual
    if act == "relu":
        y = F.relu(y)
    # the layout that the kernel writes, and that the operator's fake implementation promises
    return y.contiguous(memory_format=torch.channels_last), mean.clone(), var.clone()


def batch_norm_act_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    needs_x: bool,
    needs_parameters: bool,
    needs_residual: bool,
    frozen: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, var = (v.to(torch.promote_types(x.dtype, torch.float32)) for v in (mean, var))
    if bias is not None:
        # without a residual the activation's input tells what it let through
        scale = (weight.to(mean.dtype) * (var + eps).rsqrt())[:, None, None]
        y = (x - mean[:, None, None]) * scale + bias.to(mean.dtype)[:, None, None]
    if y is not None:
        grad = torch.where(y <= 0, 0, grad)
    if x.numel():
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad.to(x.dtype).contiguous(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
            weight.to(mean.dtype),
            mean if frozen else None,
            var if frozen else None,
            None if frozen else mean,
            None if frozen else (var + eps).rsqrt(),
            not frozen,
            eps,
            [needs_x, needs_parameters, needs_parameters],
        )
    else:
        dx, dweight, dbias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
    # what is not needed comes back empty
    empty = x.new_empty(0)
    return (
        dx.contiguous(memory_format=torch.channels_last) if needs_x else empty,
        dweight.to(weight.dtype) if needs_parameters else empty.to(weight.dtype),
        dbias.to(weight.dtype) if needs_parameters else empty.to(weight.dtype),
        # a copy: an operator must not return its argument
        grad.clone(memory_format=torch.channels_last) if needs_residual else empty.to(grad.dtype),
    )
