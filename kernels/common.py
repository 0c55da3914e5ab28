"""What the kernels share: how one is launched, the order of tiles, sums of parts, dot precision."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvr.backend import architecture, interpreting

# A recorder takes (kernel, grid, arguments, options) in place of the launch.
Recorder = Callable[[Any, tuple[int, ...], dict[str, Any], dict[str, int]], None]
_recorders: list[Recorder] = []
_overlapping: contextvars.ContextVar[bool] = contextvars.ContextVar("overlapping", default=False)


def launch(kernel: Any, grid: tuple[int, ...], config: dict[str, int], **arguments: Any) -> None:
    """Launch ``kernel`` on the device of its tensors. Every launch of fastvr passes here.

    ``config`` holds the BLOCK_* sizes beside ``num_warps``, ``num_stages`` and other compiler options.
    """
    options = {name: value for name, value in config.items() if not name.isupper()}
    arguments |= {name: value for name, value in config.items() if name.isupper()}
    # Triton 3.10 changes the default, and the parity figures are those of contracted multiply-adds
    options["enable_fp_fusion"] = True
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    if _overlapping.get() and "PDL" in kernel.arg_names and _can_overlap(architecture(device)):
        arguments["PDL"] = 1
        options["launch_pdl"] = True
    if _recorders:
        _recorders[-1](kernel, grid, arguments, options)
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](**arguments, **options)
    else:
        if device.type == "cpu":
            _mend_interpreter()
        kernel[grid](**arguments, **options)


@functools.cache
def _mend_interpreter() -> None:
    # as Triton ships it, it computes on the bit patterns of bfloat16
    from fastvr.testing import interpreter

    interpreter.ensure()


@contextlib.contextmanager
def record_launches(recorder: Recorder) -> Iterator[None]:
    """Hand every launch inside the block to ``recorder`` instead of the GPU (tensors may be on meta)."""
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.pop()


@functools.cache
def _can_overlap(arch: str) -> bool:
    return arch.startswith("sm_") and int(arch[3:]) >= 90


@contextlib.contextmanager
def overlapping_launches() -> Iterator[None]:
    """Launches inside the block begin while the one before them still runs, where kernel and GPU can: those
    with a ``PDL`` argument, from sm_90 on (CUDA's programmatic dependent launch). Of use where launches are
    short and many, as in a CUDA graph of a small batch."""
    token = _overlapping.set(True)
    try:
        yield
    finally:
        _overlapping.reset(token)


@triton.jit
def wait_for_launch_before(PDL: tl.constexpr):
    """To be called before anything is read or written: what the launch before wrote is there from here on."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_launch_begin(PDL: tl.constexpr):
    """The next launch may take its place; it waits itself until this one has ended."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def ceil_div(x: int, y: int) -> int:
    # triton.cdiv is made for kernels: on the host it takes microseconds, at every launch
    return -(-x // y)


def tma_descriptor(matrix: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor | None:
    """A descriptor of ``block``-sized blocks of a 16-bit matrix, or None where TMA cannot read it: rows must
    be contiguous, and start at multiples of 16 bytes."""
    step = matrix.stride(0)
    aligned = step % 8 == 0 and matrix.data_ptr() % 16 == 0
    if not aligned or matrix.stride(1) != 1 or step < matrix.shape[1] or matrix.dtype.itemsize != 2:
        return None
    return TensorDescriptor.from_tensor(matrix, list(block))


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(device: torch.device) -> int:
    """How many programs a persistent grid has. Without a GPU a few, so that each takes several tiles."""
    if device.type != "cuda":
        return 2
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


def dot_precision(dtype: torch.dtype, *, convolution: bool = False) -> str:
    """``input_precision`` of a ``tl.dot``: TF32 only where PyTorch's own switch for the op asks for it."""
    if dtype != torch.float32:
        return "ieee"
    # not by allow_tf32, which raises once somebody has used the newer switches
    backends: Any = torch.backends
    switch = backends.cudnn.conv if convolution else backends.cuda.matmul
    # the switches say nothing about a CPU, where the interpreter runs beside PyTorch's full float32
    return "tf32" if switch.fp32_precision == "tf32" and not interpreting() else "ieee"


@triton.jit
def swizzle(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of program ``pid``: GROUP_M rows of tiles are walked column by column, so that the tiles
    in flight share operands in L2 (the order of Triton's matrix multiplication tutorial)."""
    group = pid // (GROUP_M * num_n)
    first_m = group * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    inside = pid - group * GROUP_M * num_n
    return first_m + inside % rows, inside // rows


@triton.jit
def split_range(K, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """The part of K that program_id(1) of SPLIT_K sums, in whole blocks: first and stop."""
    first, stop = 0, K
    if SPLIT_K > 1:
        part = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
        first = tl.program_id(1) * part
        stop = tl.minimum(first + part, K)
    return first, stop


@triton.jit
def sum_parts(
    workspace_ptr,  # [SPLIT_K, M, N] float32
    offs_m,
    offs_n,
    M,
    N,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What SPLIT_K programs left of a tile, summed in their order."""
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in tl.static_range(SPLIT_K):
        rows = workspace_ptr + (offs_m.to(tl.int64) + part * tl.cast(M, tl.int64))[:, None] * N
        acc += tl.load(rows + offs_n[None, :], mask=mask, other=0.0)
    return acc


@triton.jit
def sum_shares(
    shares_ptr,  # [SHARES, 2, N] float32
    which,  # of the two
    offs_n,
    SHARES,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N columns of one of the two sums that SHARES programs left shares of, in a fixed order."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, SHARES, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        shares = shares_ptr + (offs_m.to(tl.int64) * 2 + which)[:, None] * N + offs_n[None, :]
        total += tl.load(shares, mask=(offs_m < SHARES)[:, None] & (offs_n < N)[None, :], other=0.0)
    return tl.sum(total, 0)


# what rounding to float32 takes from 1 / 255
_REST = tl.constexpr(-2.319175823606301e-10)


@triton.jit
def normalize(x, mean, std, EXACT: tl.constexpr = False):
    """``(x / 255 - mean) / std`` of uint8 ``x``, float32; one multiply-add an element.

    EXACT: for what is not rounded to 16 bits afterwards. Where x / 255 is near the mean, one multiply-add
    keeps the rounding of both: its RMS error is 2 to 5 times PyTorch's."""
    scale = 1.0 / std.to(tl.float32)
    x = x.to(tl.float32)
    mean = mean.to(tl.float32)
    if EXACT:
        y = (x * (1.0 / 255.0) + (x * _REST - mean)) * scale
    else:
        y = x * (scale * (1.0 / 255.0)) - mean * scale
    return y
