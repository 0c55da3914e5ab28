"""Random tensors for a case's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from torch import Tensor


class Maker:
    """Random tensors of one dtype on one device, the same for the same seed; on meta only their shapes."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        # made on the device: the real shapes hold gigabytes
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0, like: Any = None) -> Tensor:
        dtype = like or self.dtype
        if self.generator is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return (values * scale + shift).to(dtype)

    def pixels(self, *shape: int) -> Tensor:
        if self.generator is None:
            return torch.empty(shape, dtype=torch.uint8, device=self.device)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator, device=self.device)

    def image(self, *shape: int) -> Tensor:
        return self.normal(*shape).to(memory_format=torch.channels_last)


def rows(case: Case) -> tuple[int, ...]:
    return (case["batch"],) if case.get("tokens") is None else (case["batch"], case["tokens"])


Builder = Callable[[Case, Maker], dict[str, Any]]
