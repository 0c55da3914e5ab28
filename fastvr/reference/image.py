"""Images of 8-bit channels, as decoders give them, made what a model takes."""

from __future__ import annotations

import torch


def normalize(
    x: torch.Tensor, mean: torch.Tensor | None, std: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """``(x / 255 - mean) / std`` a channel for uint8 ``x`` [N, C, H, W], rounded once to ``dtype``.

    Other images pass as they are; ``mean`` and ``std`` are None then.
    """
    if x.dtype != torch.uint8:
        return x
    assert mean is not None
    assert std is not None
    wide = torch.promote_types(dtype, torch.float32)
    centred = x.to(wide) / 255 - mean.to(wide)[:, None, None]
    return (centred / std.to(wide)[:, None, None]).to(dtype)
