"""PyTorch's fused oneDNN operators: what ``prepare`` may choose on a CPU in place of a chain of eager ones.

They pay where a weight was laid out for them once. That layout hangs on the weight itself (:func:`keep`), so
it lives as long as the weight does, and a copy in another dtype (autocast's, say) does not have it.
TorchInductor calls the same operators.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeAlias

import torch

from fastvr.ops.cpu.layouts import Layouts
from fastvr.ops.cpu.magnitude import Gain
from fastvr.ops.cpu.prepared_pass import current
from fastvr.ops.cpu.winograd import Winograd
from fastvr.reference.linear import GELU, activate

_KEPT = "_fastvr_packed"

_packer: contextvars.ContextVar[Callable[[str, tuple[Any, ...]], None] | None] = contextvars.ContextVar(
    "fastvr_packer", default=None
)


def packer() -> Callable[[str, tuple[Any, ...]], None] | None:
    """Who packs weights as ops meet them, called with an op's name and arguments, or None."""
    return _packer.get()


@contextlib.contextmanager
def packing(pack: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Inside, ``pack`` sees the arguments of every op that has a vendor's call, before the op runs."""
    token = _packer.set(pack)
    try:
        yield
    finally:
        _packer.reset(token)


@functools.cache
def missing() -> str | None:
    """The reason why oneDNN's fused operators cannot be called, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    names = ("_linear_pointwise", "_convolution_pointwise", "_convolution_pointwise_")
    packing = ("_reorder_linear_weight", "_reorder_convolution_weight")
    if not all(hasattr(torch.ops.mkldnn, name) for name in (*names, *packing)):
        return "this PyTorch has no fused oneDNN operators"
    return None


def supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in ``dtype`` on this CPU without emulating it."""
    if missing() is not None or not torch.backends.mkldnn.enabled:
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


@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight that oneDNN has laid out. Where ``scale`` was multiplied into it, ``bias`` is its ``shift``.

    ``gelu``: whether oneDNN's GELU is to be fused; with AVX2 alone it is slower than PyTorch's own pass.
    ``parts``: of a linear layer whose weight was cut into columns, ``terms`` of them each, all their layouts.
    ``gain``: of a convolution, how large its results can be.
    ``onto_residual``: whether the result may be written over the residual, since nobody reads that again.
    """

    name: ClassVar[str] = "mkldnn"

    layouts: Layouts
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    gelu: bool = True
    gain: Gain | None = None
    onto_residual: bool = False
    parts: tuple[Layouts, ...] = ()
    terms: int = 0


AnyPacked: TypeAlias = Packed | Winograd


def keep(weight: torch.Tensor, packed: AnyPacked) -> None:
    """Let the vendor's call compute with ``packed`` wherever an op meets ``weight``; nobody writes to it."""
    weight.__dict__[_KEPT] = packed


def kept(weight: torch.Tensor) -> AnyPacked | None:
    found: AnyPacked | None = weight.__dict__.get(_KEPT)
    return found


def kept_in_pass(module: torch.nn.Module) -> AnyPacked | None:
    """What ``module``'s weight is computed with in a prepared model's own pass; None elsewhere."""
    if current() is None:
        return None
    weight = module._parameters.get("weight")
    return None if weight is None else kept(weight)


def pack_linear(weight: torch.Tensor, rows: int, *, most_terms: int | None = None) -> Packed:
    """``weight`` [out_features, in_features] laid out for ``rows`` rows; any number may come.

    With ``most_terms`` it is cut into equal parts of so many columns at most, whose products are added:
    oneDNN sums a thousand terms in a row, and the error of that grows with their number.
    """
    # without the attributes of a Parameter, which will lead here
    weight = weight.detach()
    columns = weight.shape[1]
    if most_terms is None or columns <= most_terms:
        return Packed(_linear_layouts(weight, rows))
    # whole cache lines
    terms = -(-columns // -(-columns // most_terms) // 16) * 16
    parts = tuple(_linear_layouts(part, rows) for part in weight.split(terms, 1))
    return Packed(parts[0], parts=parts, terms=terms)


def _linear_layouts(weight: torch.Tensor, rows: int) -> Layouts:
    def pack(size: Sequence[int]) -> torch.Tensor:
        layout: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), *size)
        return layout

    return Layouts(pack, (rows,))


def pack_convolution(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    size: Sequence[int],
) -> Packed:
    """``scale`` [O] times ``weight`` [O, C / groups, kh, kw], laid out for an x of ``size``; any may come."""
    weight = weight.detach()

    def pack(size: Sequence[int]) -> torch.Tensor:
        scaled = weight
        if scale is not None:
            # one rounding of the product, whatever the two dtypes
            scaled = (weight.double() * scale.double()[:, None, None, None]).to(weight.dtype)
        scaled = scaled.contiguous(memory_format=torch.channels_last)
        layout: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            scaled, list(padding), list(stride), [1, 1], groups, list(size)
        )
        return layout

    bias = None if shift is None else shift.to(weight.dtype)
    return Packed(Layouts(pack, size), bias, scale, shift, gain=Gain.of(weight, scale, shift))


def linear(
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    residual: torch.Tensor | None,
    act: str,
) -> torch.Tensor:
    """``residual + gamma * act(x @ weight.T + bias)`` for a packed ``weight``; arguments as the op's."""
    ops, size = torch.ops.mkldnn, (x.numel() // max(x.shape[-1], 1),)
    weight = packed.layouts.of(size)
    onto = act == "none" and gamma is None and residual is not None and residual.dtype == x.dtype
    y: torch.Tensor
    if packed.parts:
        first, *others = x.split(packed.terms, -1)
        if onto:
            y = ops._linear_pointwise.binary(first, residual, weight, bias, "add")
        else:
            y = ops._linear_pointwise(first, weight, bias, "none", [], "")
        for part, layouts in zip(others, packed.parts[1:], strict=True):
            y = ops._linear_pointwise.binary(part, y, layouts.of(size), None, "add")
        y = activate(y, act)
    elif onto:
        y = ops._linear_pointwise.binary(x, residual, weight, bias, "add")
    elif act in GELU and packed.gelu:
        y = ops._linear_pointwise(x, weight, bias, "gelu", [], GELU[act])
    elif act == "relu" and _relu_keeps_nan():
        y = ops._linear_pointwise(x, weight, bias, "relu", [], "")
    else:
        y = activate(ops._linear_pointwise(x, weight, bias, "none", [], ""), act)
    if onto:
        return y
    if gamma is not None:
        y = y * gamma
    return y if residual is None else residual + y


def conv_bn_relu(
    x: torch.Tensor,
    packed: Packed,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    act: str,
    residual: torch.Tensor | None,
    *,
    finite: bool = False,
) -> torch.Tensor:
    """``act(conv(x) * scale + shift + residual)`` for a packed weight, channels_last; ``finite`` says that
    nothing in it can be NaN or infinite."""
    ops, weight, bias = torch.ops.mkldnn, packed.layouts.of(x.shape), packed.bias
    where = (list(padding), list(stride), [1, 1], groups)
    y: torch.Tensor
    fused = act if act == "relu" and (finite or _relu_keeps_nan()) else "none"
    # PyTorch 2.11 fails to describe maps of one pixel, whose strides say nothing, where they are added
    if residual is not None and residual.dtype == x.dtype and residual.shape[2:].numel() != 1:
        then: tuple[Any, ...] = ("add", 1.0, None if fused == "none" else fused, [], "")
        if packed.onto_residual and residual.is_contiguous(memory_format=torch.channels_last):
            y = ops._convolution_pointwise_.binary(residual, x, weight, bias, *where, *then)
        else:
            y = ops._convolution_pointwise.binary(x, residual, weight, bias, *where, *then)
    else:
        y = ops._convolution_pointwise(
            x, weight, bias, *where, "none" if residual is not None else fused, [], ""
        )
        if residual is not None:
            y, fused = y + residual, "none"
    if act == "relu" and fused == "none":
        y = y.relu_()
    return y.contiguous(memory_format=torch.channels_last)
