"""Which implementation of an op runs, and the reason when it is not the one asked for.

Three modes, for the whole process (as ``torch.backends`` flags are):

- ``auto`` (default): on a supported GPU what the tuning table holds for the shape, without an entry
  the op's own default (the vendor's GEMM and convolution, our Triton kernel for the memory-bound ops);
  on anything else PyTorch.
- ``triton``: the Triton kernel or a :class:`BackendError` with the reason. Tests and benchmarks ask for
  this one, so that a fallback cannot pass for a kernel.
- ``reference``: PyTorch, always.

``strict`` turns every fallback on a supported GPU into a :class:`BackendError`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import logging
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch

Mode = Literal["auto", "triton", "reference"]

logger = logging.getLogger("fastvr")


class BackendError(RuntimeError):
    """The implementation that was asked for cannot run; the message says why."""


def _mode(value: str, source: str) -> Mode:
    for mode in get_args(Mode):
        if value == mode:
            return mode  # type: ignore[no-any-return]
    raise ValueError(f"{source} must be one of {', '.join(get_args(Mode))}; got {value!r}")


def _flag(value: str, source: str) -> bool:
    if value.lower() in ("", "0", "false", "no", "off"):
        return False
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    raise ValueError(f"{source} must be 0 or 1; got {value!r}")


class _State:
    mode: Mode = _mode(os.environ.get("FASTVR_BACKEND") or "auto", "the environment variable FASTVR_BACKEND")
    strict: bool = _flag(os.environ.get("FASTVR_STRICT", ""), "the environment variable FASTVR_STRICT")
    assumed: str | None = None


_state = _State()
_observers: list[collections.Counter[tuple[str, str]]] = []
_failed: set[tuple[str, str]] = set()


class use_backend(contextlib.AbstractContextManager["use_backend"]):
    """Choose the implementation of every op: ``"auto"``, ``"triton"`` or ``"reference"``.

    Called, it holds from then on; as a ``with`` block, until the block ends. The setting is one for the
    process, all threads included. ``strict=True`` raises :class:`BackendError` where ``auto`` would fall
    back to PyTorch on a supported GPU.

    The environment variables ``FASTVR_BACKEND`` and ``FASTVR_STRICT`` give the values at import.
    """

    def __init__(self, backend: str, *, strict: bool | None = None) -> None:
        mode = _mode(backend, "backend")
        self._previous = (_state.mode, _state.strict)
        _state.mode = mode
        if strict is not None:
            _state.strict = strict

    def __exit__(self, *exc: object) -> None:
        _state.mode, _state.strict = self._previous


def current_backend() -> Mode:
    """The mode in force: ``"auto"``, ``"triton"`` or ``"reference"``."""
    return _state.mode


# ---------------------------------------------------------------------------------- what is there


@functools.cache
def triton_missing() -> str | None:
    """The reason why Triton cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it is published for Linux)"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before the first import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _cuda_architecture(index: int) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, ...; on the CPU ``"interpreter"`` if Triton interprets, else ``"cpu"``."""
    if _state.assumed is not None:
        return _state.assumed
    if device.type == "cuda":
        return _cuda_architecture(torch.cuda.current_device() if device.index is None else device.index)
    return "interpreter" if interpreting() else device.type


@contextlib.contextmanager
def assume_architecture(arch: str) -> Iterator[None]:
    """Choose kernels and configurations as on ``arch``, whatever the tensors' device: for counting launches
    on meta tensors and for compiling without a GPU. Nothing can be launched for real inside."""
    previous, _state.assumed = _state.assumed, arch
    try:
        yield
    finally:
        _state.assumed = previous


@functools.cache
def _too_old(arch: str) -> str | None:
    if arch.startswith("sm_") and int(arch[3:]) < 80:
        return f"{arch} is older than sm_80 (Ampere), the oldest architecture with bfloat16 tensor cores"
    return None


def unavailable(device: torch.device) -> str | None:
    """The reason why no Triton kernel can run on ``device``, or None."""
    if missing := triton_missing():
        return missing
    if _state.assumed is not None:
        return None
    if device.type == "cuda":
        if interpreting():
            return "TRITON_INTERPRET=1 runs kernels on CPU tensors, and these are on the GPU"
        return _too_old(architecture(device))
    if device.type == "cpu" and interpreting():
        return None
    return f"the tensors are on {device.type}, and Triton kernels need a GPU (or TRITON_INTERPRET=1)"


def kernels_possible(device: torch.device) -> bool:
    """False where the mode and the device alone already say that PyTorch runs."""
    if _state.mode == "auto":
        return (device.type == "cuda" or _state.assumed is not None) and triton_missing() is None
    return _state.mode == "triton"


# ------------------------------------------------------------------------------------- the choice


@functools.lru_cache(maxsize=1024)
def _log_once(op: str, reason: str) -> None:
    logger.info("fastvr.%s runs in PyTorch: %s", op, reason)


def ran(op: str, implementation: str) -> None:
    """Tell :func:`observe`."""
    for counter in _observers:
        counter[op, implementation] += 1


@contextlib.contextmanager
def observe() -> Iterator[collections.Counter[tuple[str, str]]]:
    """Count what really runs inside the block: ``Counter[(op, "triton" | "mkldnn" | "reference")]``."""
    counter: collections.Counter[tuple[str, str]] = collections.Counter()
    _observers.append(counter)
    try:
        yield counter
    finally:
        # by identity: Counters with the same content are equal, and nested blocks often have the same
        _observers[:] = [c for c in _observers if c is not counter]


def _kernel_errors() -> tuple[type[BaseException], ...]:
    """What compiling and loading a kernel may raise. A pass of Triton's compiler that fails, or a missing C
    compiler, is a plain RuntimeError; a cache that cannot be written an OSError."""
    from triton.errors import TritonError

    return TritonError, subprocess.CalledProcessError, RuntimeError, OSError


def run_reference(op: str, reference: Callable[..., Any], args: Sequence[Any]) -> Any:
    ran(op, "reference")
    return reference(*args)


def kernel_runs(
    op: str,
    args: Sequence[Any],
    device: torch.device,
    *,
    unsupported: Callable[..., str | None],
    measured: Callable[..., str],
) -> bool:
    """Whether the mode, the device, the arguments and the table lead to the Triton kernel, or to PyTorch.

    ``unsupported(*args)`` gives the reason why the kernel cannot take these arguments, or None;
    ``measured(*args)`` what to run where it can: ``"triton"`` or ``"reference"``.

    Raises:
        BackendError: PyTorch would have to do what was asked of the kernel.
    """
    if _state.mode == "reference":
        return False
    missing = unavailable(device)
    reason = missing or unsupported(*args)
    forced = _state.mode == "triton"
    if reason is not None:
        if forced or (_state.strict and missing is None):
            raise BackendError(f"fastvr.{op}: no Triton kernel runs here: {reason}")
        _log_once(op, reason)
        return False
    return forced or (
        # the interpreter checks kernels, nobody would wait for it
        device.type != "cpu" and (op, architecture(device)) not in _failed and measured(*args) == "triton"
    )


def run_kernel(
    op: str,
    args: Sequence[Any],
    device: torch.device,
    *,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
) -> Any:
    """Run one op by its kernel where :func:`kernel_runs`, and by PyTorch from the first one on that fails."""
    if _state.mode == "triton" or _state.strict:
        result = kernel(*args)
    else:
        try:
            result = kernel(*args)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # the GPU's, not the kernel's: PyTorch would meet it too
        except _kernel_errors() as error:
            _failed.add((op, architecture(device)))
            warnings.warn(
                f"fastvr.{op}: the Triton kernel failed on {architecture(device)} "
                f"({type(error).__name__}: {str(error)[:300]}); PyTorch runs instead from now on. "
                "use_backend(..., strict=True) raises instead.",
                RuntimeWarning,
                stacklevel=2,
            )
            return run_reference(op, reference, args)
    ran(op, "triton")
    return result


# ------------------------------------------------------------------------------------- allocation


def _allocate(
    size: Sequence[int], *, dtype: torch.dtype, device: torch.device, memory_format: torch.memory_format
) -> torch.Tensor:
    return torch.empty(tuple(size), dtype=dtype, device=device, memory_format=memory_format)


def empty(
    size: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """The one place where ops allocate results and workspaces, so that tests can put guards around them."""
    return _allocate(size, dtype=dtype, device=device, memory_format=memory_format)
