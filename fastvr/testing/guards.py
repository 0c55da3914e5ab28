"""Guard regions and poison: what an op writes outside its tensors, and what it leaves unwritten, shows.

Every tensor lies inside a larger byte buffer. The bytes on both sides hold a pattern that is checked
afterwards; the tensor itself starts as NaN. The pattern is a NaN too in every floating dtype, so that a
kernel which *reads* past an end spoils its result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastvr import backend

GUARD_BYTES = 4096
ALIGNMENT = 256  # covers the 128 bytes that TMA and the 16 that vector loads ask for
# int16 0xFFF5: NaN as float16, bfloat16, float32 and float64, yet not the one that arithmetic makes
_PATTERN = -11
_POISON = 0xFF  # every byte: NaN in every floating dtype, -1 in signed integers


@dataclass(frozen=True)
class _Region:
    """One guarded buffer; the tensor's bytes are [start, stop) of it."""

    buffer: Tensor
    start: int
    stop: int
    label: str

    def check(self) -> None:
        pattern = torch.full((len(self.buffer) // 2,), _PATTERN, dtype=torch.int16, device=self.buffer.device)
        changed = self.buffer != pattern.view(torch.uint8)
        changed[self.start : self.stop] = False
        hits = changed.nonzero().flatten()
        if not len(hits):
            return
        before, after = hits[hits < self.start], hits[hits >= self.stop]
        found = []
        if len(before):
            found.append(f"{len(before)} bytes before its start (nearest: {self.start - int(before[-1])})")
        if len(after):
            found.append(f"{len(after)} bytes past its end (nearest: offset {int(after[0]) - self.stop})")
        raise AssertionError(f"{self.label}: a kernel wrote {' and '.join(found)}")


class Guards:
    """The guarded tensors of one :func:`guarded` block."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []

    def check(self) -> None:
        """Raises AssertionError naming the tensor, the side and the offset where a guard byte changed."""
        for region in self._regions:
            region.check()

    def empty(
        self,
        size: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """What ``torch.empty`` gives, between guards and filled with NaN (integers: every byte 0xFF)."""
        meta = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)
        tensor = self._place(meta.shape, meta.stride(), dtype, torch.device(device), address=0)
        if tensor is None:
            return torch.empty(size, dtype=dtype, device=device, memory_format=memory_format)
        return tensor

    def like(self, tensor: Tensor) -> Tensor:
        """A leaf with ``tensor``'s values, strides, alignment and ``requires_grad``, between guards.

        The elements of the extent that a strided view skips are poisoned.
        """
        source = tensor.detach()
        copy = self._place(
            source.shape, source.stride(), source.dtype, source.device, address=_address(source), what="input"
        )
        if copy is None:
            return tensor
        # An expanded dimension is one element in memory, and copy_ refuses to write it more than once.
        once = tuple(slice(0, 1) if step == 0 else slice(None) for step in source.stride())
        copy[once].copy_(source[once])
        return copy.requires_grad_(tensor.requires_grad)

    def _place(
        self,
        size: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        address: int,
        what: str = "output or workspace",
    ) -> Tensor | None:
        extent = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        payload = extent * dtype.itemsize
        total = 2 * GUARD_BYTES + payload + 2 * ALIGNMENT
        if device.type == "meta":
            return None  # nothing is written there, nor in a fake tensor
        words = torch.full((total // 2 + 1,), _PATTERN, dtype=torch.int16, device=device)
        if isinstance(words, FakeTensor):
            return None
        buffer = words.view(torch.uint8)
        start = GUARD_BYTES + (address - buffer.data_ptr() - GUARD_BYTES) % ALIGNMENT
        stop = start + payload
        label = f"{what} of shape {tuple(size)}, strides {tuple(stride)}, {dtype}"
        self._regions.append(_Region(buffer, start, stop, label))
        buffer[start:stop] = _POISON
        # set_ because a view of uint8 as a wider dtype wants a storage offset that divides.
        elements = torch.empty(0, dtype=dtype, device=device)
        if start % dtype.itemsize:
            raise ValueError(f"{label}: its address is no multiple of its element size")
        elements.set_(buffer.untyped_storage(), start // dtype.itemsize, tuple(size), tuple(stride))
        return elements


def _address(tensor: Tensor) -> int:
    if tensor.device.type == "meta" or isinstance(tensor, FakeTensor) or not tensor.numel():
        return 0
    return tensor.data_ptr()


_active: list[Guards] = []


@contextmanager
def guarded() -> Iterator[Guards]:
    """Everything that ops allocate through ``fastvr.backend.empty`` in this block lies between guards.

    The guards are checked on leaving the block, unless it leaves by an exception of its own; the allocator
    is restored either way. Not for concurrent threads: the allocator is one for the process.

    Raises:
        AssertionError: a guard byte changed.
    """
    guards = Guards()
    previous = backend._allocate
    backend._allocate = guards.empty
    _active.append(guards)
    try:
        yield guards
        guards.check()
    finally:
        _active.pop()
        backend._allocate = previous


def guarded_like(tensor: Tensor) -> Tensor:
    """:meth:`Guards.like` of the innermost :func:`guarded` block.

    Raises:
        RuntimeError: called outside a :func:`guarded` block, which would check nothing.
    """
    if not _active:
        raise RuntimeError("guarded_like needs a guarded() block, which checks the guards on leaving")
    return _active[-1].like(tensor)
