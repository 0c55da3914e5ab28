"""Triton's interpreter, made to behave as a GPU does where it would hide a fault.

Out of the box (triton 3.6 to 3.9) it computes on the bit patterns of bfloat16, reads and writes any address,
fills masked lanes with 0, runs programs in order, ignores ``tl.device_assert`` and never rounds to TF32.
After :func:`install`:

- bfloat16 arithmetic, comparisons, dots, reductions and casts are those of bfloat16;
- every active lane of a load, store or atomic must lie in a tensor that was passed to the launch;
- lanes of a load that are masked off without ``other=`` are NaN (integers: all bits set);
- ``tl.maximum``, ``tl.clamp`` and ``tl.max`` drop NaN unless told to propagate it;
- ``tl.dot`` on float32 without ``input_precision`` is an error, and ``"tf32"`` rounds its operands;
- ``tl.device_assert`` holds, and so do int32 overflow checks.

What it cannot show is listed in the design notes on kernels: races inside a program, the memory model,
TMA, compilation, time.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter as _triton

from fastvr.testing import _interpreted_math

_Handle = _triton.TensorHandle
_Builder = _triton.InterpreterBuilder


class OutOfBounds(IndexError):
    """A kernel touched memory outside the tensors passed to its launch."""


class _State:
    installed = False
    bounds = False
    poison = False
    extents: Sequence[tuple[int, int]] | None = None  # [start, stop) in bytes, of the launch that runs
    patches: list[tuple[Any, str, Any]] | None = None
    depth = 0
    shuffle: random.Random | None = None
    order: list[int] | None = None


_state = _State()
_one_at_a_time = threading.RLock()


def install(*, bounds: bool = True, poison: bool = True) -> None:
    """Mend the interpreter for this process; a later call only changes ``bounds`` and ``poison``.

    Raises:
        RuntimeError: Triton was imported without ``TRITON_INTERPRET=1``, so that its own library is compiled
            code, which no kernel in the interpreter can call.
    """
    if not isinstance(tl.sum, _triton.InterpretedFunction) or not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "Triton's interpreter is off: set TRITON_INTERPRET=1 in the environment before triton is imported"
        )
    _state.bounds, _state.poison = bounds, poison
    if _state.installed:
        return
    _interpreted_math.install()
    for name, function in _METHODS.items():
        setattr(_Builder, name, function)
    # frozen dataclass; without debug, tl.device_assert does nothing
    object.__setattr__(_triton.interpreter_builder.options, "debug", True)
    _triton.GridExecutor._init_args_hst = _init_args
    _triton.GridExecutor.__call__ = _launch
    _triton.InterpretedFunction.__call__ = _call_device_function
    _triton._patch_lang = _patch_language
    _state.installed = True


def ensure() -> None:
    """:func:`install`, where nobody has yet: what a kernel's launch on a CPU asks for."""
    if not _state.installed:
        install()


@contextlib.contextmanager
def shuffle(seed: int | None = 0) -> Iterator[None]:
    """Run the programs of every launch in a random order; ``None`` in the given one.

    Programs still run one after another: what shows is dependence on their order.
    """
    previous = _state.shuffle
    _state.shuffle = None if seed is None else random.Random(seed)
    try:
        yield
    finally:
        _state.shuffle = previous


# memory


def _check(pointers: Any, mask: Any, kind: str) -> None:
    if not _state.bounds or _state.extents is None:
        return
    addresses = pointers.data
    if mask is not None:
        active = mask.data if isinstance(mask, _Handle) else mask
        if not np.all(active):
            addresses = addresses[np.broadcast_to(active, addresses.shape)]
    if not addresses.size:
        return
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    first, last = int(addresses.min()), int(addresses.max()) + size
    if any(start <= first and last <= stop for start, stop in _state.extents):
        return
    flat = np.ravel(addresses).astype(np.int64)
    inside = np.zeros(flat.shape, dtype=bool)
    for start, stop in _state.extents:
        inside |= (flat >= start) & (flat + size <= stop)
    if not inside.all():
        stray = int(flat[~inside][0])
        nearest = min(_state.extents, key=lambda e: max(e[0] - stray, stray - e[1]), default=(stray, stray))
        raise OutOfBounds(
            f"{kind}: {int((~inside).sum())} of {flat.size} lanes lie outside every tensor of the launch; "
            f"one is at byte {stray - nearest[0]} of the nearest, which has {nearest[1] - nearest[0]}"
        )


def _create_assert(self: Any, condition: Any, message: str) -> None:
    assert np.all(condition.data), message


def _masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **more: Any) -> Any:
    _check(pointers, mask, "load")
    if other is None and _state.poison and mask is not None:
        kind = pointers.get_element_ty()
        filler = np.full(1, 0xFF, np.uint8).repeat(max(1, kind.primitive_bitwidth // 8))
        value = np.True_ if kind == tl.int1 else filler.view(_triton._get_np_dtype(kind))[0]
        other = _Handle(np.full(pointers.data.shape, value), kind)
    return _triton_load(self, pointers, mask, other, *rest, **more)


def _masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _check(pointers, mask, "store")
    return _triton_store(self, pointers, value, mask, *rest)


def _atomic_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _check(pointers, mask, "atomic")
    return _triton_rmw(self, operation, pointers, value, mask, *rest)


def _atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
    _check(pointers, None, "atomic")
    return _triton_cas(self, pointers, *rest)


# launches


def _extents(argument: Any) -> Iterator[tuple[int, int]]:
    if isinstance(argument, (tuple, list)):
        for part in argument:
            yield from _extents(part)
    elif hasattr(argument, "base") and hasattr(argument, "block_shape"):
        yield from _extents(argument.base)
    elif hasattr(argument, "data_ptr"):
        tensor = _triton._unwrap_tensor(argument)
        if tensor.numel():  # of the view, not of its storage
            span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            yield tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()


def _init_args(self: Any, args: Any, kwargs: Any) -> Any:
    with _disable_current_modes():
        on_host, named_on_host = _triton_init_args(self, args, kwargs)
        _state.extents = list(_extents([*on_host, *named_on_host.values()]))
    return on_host, named_on_host


def _launch(self: Any, *args: Any, **kwargs: Any) -> None:
    # a launch exchanges Triton's own functions for the whole process
    with _one_at_a_time:
        previous = (_state.extents, _state.depth, _state.order)
        try:
            _triton_launch(self, *args, **kwargs)
        finally:
            _state.extents, _state.depth, _state.order = previous


def _set_grid_index(self: Any, x: int, y: int, z: int) -> None:
    if _state.shuffle is None:
        _triton_grid_index(self, x, y, z)
        return
    _, height, depth = self.grid_dim
    if (x, y, z) == (0, 0, 0):
        total = int(np.prod(self.grid_dim))
        _state.order = _state.shuffle.sample(range(total), total)
    assert _state.order is not None
    place = _state.order[(x * height + y) * depth + z]
    _triton_grid_index(self, place // (height * depth), place // depth % height, place % depth)


class _Scope:
    """Triton's own functions, exchanged for interpreted ones during a launch."""

    def __init__(self) -> None:
        self.originals: list[tuple[Any, str, Any]] = []

    def restore(self) -> None:
        for target, name, original in reversed(self.originals):
            if original is _triton_missing:
                delattr(target, name)
            else:
                setattr(target, name, original)
        if self.originals:
            _state.depth -= 1
        self.originals = []


def _patch_language(fn: Any) -> _Scope:
    """As Triton's, but worked out once, and not again for every device function that a kernel calls."""
    scope = _Scope()
    if _state.depth:
        return scope
    if _state.patches is None:
        # exec gives a function whose globals name both modules that kernels and Triton's library use
        namespace: dict[str, Any] = {"tl": tl, "core": tl.core}
        exec("def everything(): ...", namespace)
        recorded = _triton_patch_lang(namespace["everything"])
        _state.patches = [(target, name, getattr(target, name)) for target, name, _ in recorded._changes]
        recorded.restore()
        # NumPy 2.4 refuses int() of an array with one element, which triton 3.6 relies on
        _state.patches.append((tl.tensor, "__index__", lambda tensor: int(tensor.handle.data.reshape(()))))
    for target, name, value in _state.patches:
        scope.originals.append((target, name, target.__dict__.get(name, _triton_missing)))
        setattr(target, name, value)
    _state.depth += 1
    return scope


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


_triton_missing = object()
_triton_load = _Builder.create_masked_load
_triton_store = _Builder.create_masked_store
_triton_rmw = _Builder.create_atomic_rmw
_triton_cas = _Builder.create_atomic_cas
_triton_grid_index = _Builder.set_grid_idx
_triton_init_args = _triton.GridExecutor._init_args_hst
_triton_launch = _triton.GridExecutor.__call__
_triton_patch_lang = _triton._patch_lang

_METHODS: dict[str, Callable[..., Any]] = {
    "create_assert": _create_assert,
    "create_masked_load": _masked_load,
    "create_masked_store": _masked_store,
    "create_atomic_rmw": _atomic_rmw,
    "create_atomic_cas": _atomic_cas,
    "set_grid_idx": _set_grid_index,
}
