"""What a GPU computes where Triton's interpreter computes something else: bfloat16, NaN, TF32, reductions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes
from triton._C.libtriton import ir
from triton.runtime import interpreter as _triton

Array = npt.NDArray[Any]
_Handle = _triton.TensorHandle
_Builder = _triton.InterpreterBuilder


def install() -> None:
    """Exchange the builder's arithmetic, the reductions and ``tl.dot``."""
    for name, function in _METHODS.items():
        setattr(_Builder, name, function)
    _triton._get_np_dtype = _numpy_dtype
    _triton.interpreter_semantic.binary_op_sanitize_overflow_impl = _check_overflow
    _triton.ReduceOps.generic_reduce = _generic_reduce
    _triton.ReduceOps.apply_impl = _reduce
    tl.dot = tl.core.dot = _checked_dot(tl.dot)


# Triton's own, which take a third of a launch's time


def _numpy_dtype(dtype: Any) -> Any:
    name = dtype.scalar.name
    if name not in _dtypes:
        _dtypes[name] = _triton_dtype(dtype)
    return _dtypes[name]


def _check_overflow(left: Any, right: Any, operation: Any) -> None:
    bits = left.type.scalar.int_bitwidth
    if bits == 1 or bits >= 64:
        return
    compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    result = compute(left.handle.data, right.handle.data, dtype=np.int64)
    lowest, highest = left.type.scalar.get_int_min_value(), left.type.scalar.get_int_max_value()
    if result.size and not lowest <= int(result.min()) <= int(result.max()) <= highest:
        raise OverflowError(f"int{bits} overflow detected for operation {operation.__name__}")


# bfloat16: stored by the interpreter as uint16


def _widen(data: Array) -> Array:
    wide: Array = (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


def _round_bits(data: Array, dropped: int) -> npt.NDArray[np.uint32]:
    """float32 as bits, rounded to nearest even at ``dropped`` bits; NaN stays NaN."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32).reshape(data.shape)
    half = np.uint32((1 << (dropped - 1)) - 1)
    rounded = bits + half + ((bits >> np.uint32(dropped)) & np.uint32(1))
    result: npt.NDArray[np.uint32] = np.where(np.isnan(data), np.uint32(0x7FC00000), rounded)
    return result


def _narrow(data: Array) -> Array:
    narrow: Array = (_round_bits(data, 16) >> np.uint32(16)).astype(np.uint16)
    return narrow


def _to_tf32(data: Array) -> Array:
    rounded = _round_bits(data, 13) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(data), rounded.view(np.float32), data)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16) and handle.data.dtype == np.uint16


def _float32(handle: Any) -> Any:
    return _Handle(_widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's method that computes on bfloat16 operands in float32 and rounds its result once."""

    @functools.wraps(method)
    def computed(self: Any, *operands: Any) -> Any:
        if not any(isinstance(operand, _Handle) and _is_bf16(operand) for operand in operands):
            return method(self, *operands)
        wide = [_float32(operand) if isinstance(operand, _Handle) else operand for operand in operands]
        with np.errstate(all="ignore"):
            result = method(self, *wide)
        if result.data.dtype == np.bool_:
            return _Handle(result.data, tl.int1)
        return _Handle(_narrow(result.data), tl.bfloat16)

    return computed


def _quiet(method: Callable[..., Any]) -> Callable[..., Any]:
    """NaN and Inf are values; NumPy warns about them."""

    @functools.wraps(method)
    def computed(self: Any, *operands: Any) -> Any:
        with np.errstate(all="ignore"):
            return method(self, *operands)

    return computed


def _cast(self: Any, source: Any, target: Any) -> Any:
    old, new = source.dtype.scalar, target.scalar
    if old == tl.bfloat16 and new != tl.bfloat16:
        source, old = _Handle(_widen(source.data), tl.float32), tl.float32
        if new == tl.float32:
            return source
    if new == tl.bfloat16 and old != tl.bfloat16:
        wide = source if old == tl.float32 else _triton_cast(self, source, tl.float32)
        return _Handle(_narrow(wide.data), tl.bfloat16)
    with np.errstate(all="ignore"):
        return _triton_cast(self, source, target)


def _create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    nearest = rounding is None or rounding == ir.ROUNDING_MODE.RTNE
    wide = (tl.bfloat16, tl.float16, tl.float32, tl.float64)
    if nearest and source.dtype.scalar in wide and target.scalar in wide:
        return _cast(self, source, target)
    return _triton_fp_to_fp(self, source, target, rounding)


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    wide = np.float64 if z.data.dtype in (np.float16, np.float32) else z.data.dtype
    product = np.multiply(x.data, y.data, dtype=wide)
    return _Handle(np.add(product, z.data, dtype=wide).astype(z.data.dtype), z.dtype.scalar)


def _create_clamp(self: Any, x: Any, low: Any, high: Any, propagate: Any) -> Any:
    if propagate == ir.PROPAGATE_NAN.NONE:
        return self.binary_op(self.binary_op(x, low, np.fmax), high, np.fmin)
    return self.binary_op(self.binary_op(x, low, np.maximum), high, np.minimum)


def _create_erf(self: Any, x: Any) -> Any:
    # NumPy has none, and math.erf one element at a time is 50 times slower. Dispatch modes that count a
    # model's operations must not see this one.
    with _disable_current_modes():
        values = torch.erf(torch.from_numpy(np.array(x.data, copy=True, order="C"))).numpy()
    return _Handle(values, x.dtype.scalar)


def _create_rsqrt(self: Any, x: Any) -> Any:
    return _Handle((1 / np.sqrt(x.data)).astype(x.data.dtype), x.dtype.scalar)


# tl.dot


def _checked_dot(dot: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(dot)
    def checked(
        input: Any, other: Any, acc: Any = None, input_precision: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        unsaid = input_precision is None and not args and kwargs.get("allow_tf32") is None
        if unsaid and not triton.knobs.language.fp32_default and input.dtype == tl.float32:
            raise ValueError(
                "tl.dot on float32 without input_precision would be TF32 on the GPU: say 'ieee', or 'tf32'"
            )
        return dot(input, other, acc, input_precision, *args, **kwargs)

    return checked


def _create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
    kinds = (tl.bfloat16, tl.float16, tl.float32)
    if a.dtype.scalar not in kinds or b.dtype.scalar not in kinds:
        return _triton_dot(self, a, b, acc, precision, imprecise)
    left, right = (_float32(operand).data.astype(np.float32, copy=False) for operand in (a, b))
    if precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
        left, right = _to_tf32(left), _to_tf32(right)
    elif a.dtype.scalar == tl.float32:
        # a GPU sums in the order of K wherever in a tile a value lies; NumPy's float32 depends on the shape,
        # and a backward pass that computes a score again, in another tile, would not find the same one
        left, right = left.astype(np.float64), right.astype(np.float64)
    with np.errstate(all="ignore"):
        result = np.matmul(left, right).astype(np.float32, copy=False) + _float32(acc).data
    if acc.dtype.scalar == tl.bfloat16:
        return _Handle(_narrow(result), tl.bfloat16)
    return _Handle(result.astype(acc.data.dtype, copy=False), acc.dtype.scalar)


# reductions


def _generic_reduce(self: Any, input: tuple[Any, ...]) -> list[Any]:
    """Neighbours combined pairwise, whole blocks at a time: the tree that a GPU walks, and fast."""
    flat = self.axis is None
    axis = 0 if flat else self.axis
    rank = len(input[0].handle.data.shape)
    parts = [
        np.moveaxis(part.handle.data.reshape(-1) if flat else part.handle.data, axis, 0) for part in input
    ]
    tensors = [_tensor(part, source.dtype) for part, source in zip(parts, input, strict=True)]
    while (count := tensors[0].handle.data.shape[0]) > 1:
        if count % 2:
            raise ValueError(f"reduction over {count} elements, which is no power of two")
        even = [_tensor(part.handle.data[0::2], part.dtype) for part in tensors]
        odd = [_tensor(part.handle.data[1::2], part.dtype) for part in tensors]
        combined = self.combine_fn.fn(*even, *odd)
        tensors = list(combined) if isinstance(combined, tuple | tl.tuple) else [combined]
    results = []
    for part, source in zip(tensors, input, strict=True):
        data = part.handle.data[0]
        if self.keep_dims:
            data = data.reshape((1,) * rank) if flat else np.expand_dims(data, axis)
        results.append(self.to_tensor(data, source.dtype))
    return results


def _tensor(data: Array, dtype: Any) -> Any:
    return tl.tensor(_Handle(data, dtype.scalar), tl.block_type(dtype.scalar, list(data.shape)))


def _reduce_sum(self: Any, input: Any) -> Any:
    if not input.dtype.is_floating():
        total = np.sum(input.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(total, input.dtype)
    data = input.handle.data
    bf16 = _is_bf16(input.handle)
    data = _widen(data) if bf16 else data
    shape = (
        [1] * data.ndim
        if self.axis is None
        else [1 if d == self.axis else n for d, n in enumerate(data.shape)]
    )
    data = data.reshape(-1) if self.axis is None else np.moveaxis(data, self.axis, 0)
    with np.errstate(all="ignore"):
        while data.shape[0] > 1:
            data = data[0::2] + data[1::2]
            if bf16:
                data = _widen(_narrow(data))
    data = data[0].reshape(shape) if self.keep_dims else data[0]
    return self.to_tensor(_narrow(data) if bf16 else data, input.dtype)


def _reduce(self: Any, input: tuple[Any, ...]) -> Any:
    source = input[0]
    narrow = _is_bf16(source.handle)
    # the ufuncs themselves: np.nanmax warns about, and np.max keeps, what the hardware drops
    dropping = {tl.standard._elementwise_max: np.fmax, tl.standard._elementwise_min: np.fmin}
    if self.combine_fn in dropping:
        data = _float32(source.handle).data
        data = dropping[self.combine_fn].reduce(data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(_narrow(data) if narrow else data, source.dtype)
    if self.combine_fn is tl.standard._sum_combine:
        return _reduce_sum(self, source)
    return _generic_reduce(self, input) if narrow else _triton_reduce(self, input)


_dtypes: dict[str, Any] = {}
_triton_dtype = _triton._get_np_dtype
_triton_cast = _Builder.cast_impl
_triton_fp_to_fp = _Builder.create_fp_to_fp
_triton_dot = _Builder.create_dot
_triton_reduce = _triton.ReduceOps.apply_impl

_METHODS: dict[str, Callable[..., Any]] = {
    "cast_impl": _cast,
    "create_fp_ext": _cast,
    "create_fp_trunc": _cast,
    "create_fp_to_fp": _create_fp_to_fp,
    "get_bf16": lambda self, value: _cast(self, self.get_fp32(value), tl.bfloat16),
    "binary_op": _in_float32(_quiet(_Builder.binary_op)),
    "unary_op": _in_float32(_quiet(_Builder.unary_op)),
    "create_fma": _in_float32(_quiet(_create_fma)),
    "create_erf": _in_float32(_create_erf),
    "create_rsqrt": _in_float32(_quiet(_create_rsqrt)),
    "create_clampf": _create_clamp,
    "create_minnumf": lambda self, x, y: self.binary_op(x, y, np.fmin),
    "create_maxnumf": lambda self, x, y: self.binary_op(x, y, np.fmax),
    "create_dot": _create_dot,
}
