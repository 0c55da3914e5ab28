"""How images are fed to a model: numbers that belong to its weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


class Preprocessing(NamedTuple):
    """Resize the short side, crop the centre, normalise."""

    size: int
    """Height and width of the crop, in pixels."""
    resize: int
    """Length of the short side before the crop, in pixels; with ``squash`` of both sides."""
    mean: tuple[float, ...]
    """Of each channel, for values from 0 to 1."""
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    """One of :data:`INTERPOLATIONS`."""
    squash: bool = False
    """Resize the whole image to a square, before the crop."""

    def at(self, size: int) -> Preprocessing:
        """The same for images of another size."""
        return self._replace(size=size, resize=round(self.resize * size / self.size))

    def for_timm(self) -> dict[str, Any]:
        """As a part of timm's ``pretrained_cfg``."""
        share = self.size / self.resize
        # timm resizes to size / crop_pct, rounded down: 224 / (224 / 400) is 399.99...
        if math.floor(self.size / share) < self.resize:
            share = math.nextafter(share, 0)
        return {
            "input_size": [len(self.mean), self.size, self.size],
            "interpolation": self.interpolation,
            "crop_pct": share,
            "crop_mode": "squash" if self.squash else "center",
            "mean": list(self.mean),
            "std": list(self.std),
        }
