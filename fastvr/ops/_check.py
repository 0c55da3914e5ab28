"""Validation that the ops share: one ValueError that names the argument, what it got and what it takes."""

from __future__ import annotations

import math

import torch

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def operand(op: str, name: str, tensor: torch.Tensor) -> None:
    """``tensor`` is a Tensor of a floating dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{op}: {name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{op}: {name} must be float32, float16, bfloat16 or float64; got {tensor.dtype}")


def image(
    op: str,
    x: torch.Tensor,
    mean: torch.Tensor | None,
    std: torch.Tensor | None,
    channels: int,
) -> None:
    """``x`` is floating and comes without ``mean`` and ``std``, or uint8 with both, [channels], floating."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{op}: x must be a torch.Tensor; got {type(x).__name__}")
    if x.dtype != torch.uint8:
        operand(op, "x", x)
    for name, vector in (("mean", mean), ("std", std)):
        if (vector is None) == (x.dtype == torch.uint8):
            wanted = "must be given for uint8 images" if vector is None else "is for uint8 images only"
            raise ValueError(f"{op}: {name} {wanted}; got {None if vector is None else x.dtype}")
        companion(op, name, vector, (channels,), x)


def companion(
    op: str,
    name: str,
    tensor: torch.Tensor | None,
    shape: tuple[int, ...],
    x: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    meaning: str = "",
) -> None:
    """``tensor`` is None, or floating, of ``shape``, on x's device, and in ``dtype`` where one is given."""
    if tensor is None:
        return
    operand(op, name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}{meaning}; got {list(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, where x is; got {tensor.device}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{op}: {name} must be {dtype}, as the operands are; got {tensor.dtype}")


def sample_scale(op: str, factors: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """``factors`` is None, or a factor for each of x's samples, float32 (float64 with it), that is drawn and
    not learnt; as kernels read it."""
    if factors is None:
        return None
    if x.dim() < 2:
        raise ValueError(f"{op}: sample_scale needs an x of samples, [B, ...]; got {list(x.shape)}")
    companion(op, "sample_scale", factors, (x.shape[0],), x, meaning=", a factor for each sample")
    if factors.dtype != (wide := torch.promote_types(x.dtype, torch.float32)):
        raise ValueError(f"{op}: sample_scale must be {wide} for an x of {x.dtype}; got {factors.dtype}")
    if factors.requires_grad:
        raise ValueError(f"{op}: sample_scale has no gradient; got a tensor that requires one")
    return factors.contiguous()


def choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def heads(op: str, num_heads: int) -> None:
    """``num_heads`` is a positive int."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"{op}: num_heads must be a positive int; got {num_heads!r}")


def scale(op: str, value: float | None, head_dim: int) -> float:
    """``value`` as a finite float; that of scaled dot product attention where it is None."""
    if value is None:
        return float(head_dim**-0.5)
    # not math.isfinite: torch.compile(dynamic=True) makes a symbol of the scale, and cannot trace that
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"{op}: scale must be a finite number or None; got {value!r}")
    return float(value)


def probability(op: str, name: str, value: float) -> float:
    """``value`` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be a number from 0 to 1; got {value!r}")
    return float(value)


def seed(op: str, given: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """``given`` is None, or what a call's dropout is drawn by; as kernels read it."""
    if given is None:
        return None
    if not isinstance(given, torch.Tensor):
        raise ValueError(f"{op}: seed must be a torch.Tensor; got {type(given).__name__}")
    if given.shape != (2,) or given.dtype != torch.int64:
        raise ValueError(f"{op}: seed must be [2] torch.int64; got {list(given.shape)} {given.dtype}")
    if given.device != x.device:
        raise ValueError(f"{op}: seed must be on {x.device}, where x is; got {given.device}")
    return given.contiguous()


def kernel_dtypes(*arguments: object) -> str | None:
    """The reason why kernels cannot take the tensors among ``arguments``, dropout's seeds apart, or None."""
    for tensor in arguments:
        if isinstance(tensor, torch.Tensor) and tensor.dtype not in (*KERNEL_DTYPES, torch.int64):
            return f"dtype {tensor.dtype}; kernels take float32, float16 and bfloat16"
    return None


def too_many_pixels(pixels: int) -> str | None:
    """The reason why kernels cannot count a map's pixels, up to the end of the last tile, in 32 bits."""
    return f"{pixels} output pixels; kernels take up to 2^31 - 1024" if pixels > 2**31 - 1024 else None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts matmul operands to on this device, or None where it is off."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` in autocast's ``dtype``; float64 stays, as it does in autocast."""
    return tensor if tensor.dtype in (dtype, torch.float64) else tensor.to(dtype)


def cast_or_none(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else cast(tensor, dtype)


def dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    """A vector of parameters as kernels read it, element after element; copies only a strided view."""
    return None if vector is None else vector.contiguous()
