"""oneDNN's fused operators of PyTorch: what ``prepare`` may choose on a CPU in place of PyTorch's own chain.

They pay where weights were laid out for them once. A packed weight is an opaque tensor of the same shape and
dtype (``is_mkldnn``) that stands where the dense one stood, so nothing is kept twice; for whatever these
operators do not do it is unpacked again (:func:`dense`). TorchInductor calls the same operators.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from fastvr.reference.linear import activate

_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


@functools.cache
def missing() -> str | None:
    """The reason why oneDNN's fused operators cannot be called, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    names = ("_linear_pointwise", "_convolution_pointwise")
    packing = ("_reorder_linear_weight", "_reorder_convolution_weight")
    if not all(hasattr(torch.ops.mkldnn, name) for name in (*names, *packing)):
        return "this PyTorch has no fused oneDNN operators"
    return None


def supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in ``dtype`` on this CPU without emulating it."""
    if missing() is not None or not torch.backends.mkldnn.enabled:  # type: ignore[attr-defined]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


@functools.cache
def _relu_keeps_nan() -> bool:
    """Older releases of oneDNN make 0 of a NaN in their fused ReLU, where PyTorch's keeps it."""
    nan, weight = torch.full((1, 16, 1, 1), torch.nan), torch.ones(16, 16, 1, 1)
    mapped = torch.ops.mkldnn._convolution_pointwise(
        nan, weight, None, [0, 0], [1, 1], [1, 1], 1, "relu", [], ""
    )
    rows = torch.ops.mkldnn._linear_pointwise(nan.view(1, 16), weight.view(16, 16), None, "relu", [], "")
    return bool(mapped.isnan().all()) and bool(rows.isnan().all())


def packed(args: Sequence[Any]) -> bool:
    return any(isinstance(a, torch.Tensor) and a.is_mkldnn for a in args)


def dense(args: Sequence[Any]) -> tuple[Any, ...]:
    """``args`` with packed weights unpacked, exactly."""
    return tuple(a.to_dense() if isinstance(a, torch.Tensor) and a.is_mkldnn else a for a in args)


def pack_linear(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """``weight`` [out_features, in_features] laid out for about ``rows`` rows; any number may come."""
    result: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return result


def pack_convolution(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    size: Sequence[int],
) -> torch.Tensor:
    """``scale`` [O] times ``weight`` [O, C / groups, kh, kw], laid out for an x of ``size``; any may come."""
    weight = weight.detach()
    if scale is not None:
        # one rounding of the product, whatever the two dtypes
        weight = (weight.double() * scale.double()[:, None, None, None]).to(weight.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    result: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, list(padding), list(stride), [1, 1], groups, list(size)
    )
    return result


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    act: str,
) -> torch.Tensor:
    """``residual + gamma * act(x @ weight.T + bias)`` for a packed ``weight``; arguments as the op's."""
    ops = torch.ops.mkldnn
    if act == "none" and gamma is None and residual is not None and residual.dtype == x.dtype:
        y: torch.Tensor = ops._linear_pointwise.binary(x, residual, weight, bias, "add")
        return y
    if act in _GELU:
        y = ops._linear_pointwise(x, weight, bias, "gelu", [], _GELU[act])
    elif act == "relu" and _relu_keeps_nan():
        y = ops._linear_pointwise(x, weight, bias, "relu", [], "")
    else:
        y = activate(ops._linear_pointwise(x, weight, bias, "none", [], ""), act)
    if gamma is not None:
        y = y * gamma
    return y if residual is None else residual + y


def conv_bn_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    act: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """``act(conv(x) + bias + residual)`` for a packed ``weight``, channels_last."""
    ops = torch.ops.mkldnn
    where = (list(padding), list(stride), [1, 1], groups)
    fused = act if act == "relu" and _relu_keeps_nan() else "none"
    if residual is not None and residual.dtype == x.dtype:
        unary = None if fused == "none" else fused
        y: torch.Tensor = ops._convolution_pointwise.binary(
            x, residual, weight, bias, *where, "add", 1.0, unary, [], ""
        )
    else:
        y = ops._convolution_pointwise(
            x, weight, bias, *where, "none" if residual is not None else fused, [], ""
        )
        if residual is not None:
            y, fused = y + residual, "none"
    if act == "relu" and fused == "none":
        y = y.relu_()
    return y.contiguous(memory_format=torch.channels_last)
