"""What attention and its gradient ask of their arguments alike."""

from __future__ import annotations

import torch


def reachable(x: torch.Tensor) -> torch.Tensor:
    """The kernels read contiguous heads, and reach the rows of a block by 32-bit offsets."""
    return x if x.stride(2) == 1 and x.stride(1) < 2**23 else x.contiguous()


def refused(head_dim: int, scale: float) -> str | None:
    """The reason why no kernel takes such heads, or None."""
    if head_dim % 8 or not 32 <= head_dim <= 128:
        return f"head_dim {head_dim}; the kernel takes 32 to 128 in multiples of 8"
    return f"scale {scale}; the kernel takes positive ones" if scale <= 0 else None
