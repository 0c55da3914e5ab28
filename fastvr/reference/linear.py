"""y = residual + sample_scale * gamma * dropout(act(x @ weight.T + bias))."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastvr.reference.dropout import dropout

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "quick_gelu")
GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def overwritable(y: torch.Tensor) -> bool:
    """Whether ``y``, which is nobody else's, may be written over; what exporters trace is functional."""
    return type(y) is torch.Tensor


def as_kernels_write(y: torch.Tensor) -> torch.Tensor:
    """The map ``y`` in channels_last, which the operators' fakes promise; inside ``vmap``, which knows none,
    as it is."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return y
    return y.contiguous(memory_format=torch.channels_last)


def activate(x: torch.Tensor, act: str) -> torch.Tensor:
    """The activations that ops fuse: "none", "relu", "gelu" (exact, by erf), "gelu_tanh", "quick_gelu".

    x is nobody else's, and without gradients the result takes its place: on a CPU fresh memory costs more
    than the activation.
    """
    inplace = overwritable(x) and not torch.is_grad_enabled()
    if act == "relu":
        return F.relu(x, inplace=inplace)
    if act in GELU:
        gelu = torch.ops.aten.gelu_ if inplace else F.gelu
        return gelu(x, approximate=GELU[act])
    if act == "quick_gelu":
        gate = torch.sigmoid(1.702 * x)
        return x.mul_(gate) if inplace else x * gate
    return x


def scale_samples(y: torch.Tensor, sample_scale: torch.Tensor | None) -> torch.Tensor:
    """y [samples * n, ...] with each sample times its factor, [samples], in y's dtype."""
    if sample_scale is None:
        return y
    samples = sample_scale.shape[0]
    rows = y.reshape(samples, y.numel() // max(samples, 1))
    return (rows * sample_scale.to(y.dtype)[:, None]).view(y.shape)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    act: str = "none",
    sample_scale: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    y = activate(F.linear(x, weight, bias), act)
    if seed is not None:
        y = dropout(y, dropout_p, seed)
    if gamma is not None:
        y = y * gamma
    y = scale_samples(y, sample_scale)
    if residual is None:
        return y
    # y is nobody else's either
    if torch.is_grad_enabled() or y.dtype != residual.dtype or not overwritable(y):
        return residual + y
    return y.add_(residual)
