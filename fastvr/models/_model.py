"""What the model families share: the check of an image, and noticing that weights may have changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastvr.ops import _check

if TYPE_CHECKING:
    from typing_extensions import Self


class Model(nn.Module):
    """A module that counts what may have changed its weights, so that a prepared snapshot knows it is stale.

    Counted are ``train()`` and ``eval()`` that change the mode, ``load_state_dict``, everything that goes
    through ``to()``, and new classifiers; also where the model is a part of a larger one. Writing into
    parameters by hand is not.
    """

    generation: int = 0

    def changed(self) -> None:
        """Say that weights, placement or structure changed."""
        self.generation += 1

    def train(self, mode: bool = True) -> Self:
        if mode != self.training:
            self.changed()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.changed()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any) -> None:
        self.changed()
        super()._load_from_state_dict(state_dict, *args)


def check_image(
    model: str, x: torch.Tensor, in_chans: int, img_size: tuple[int, int] | None, first: nn.Module
) -> None:
    """Raise one ValueError where ``x`` is no image for ``model``, whose first layer is ``first``.

    ``img_size`` None takes every size. Under autocast any floating dtype is taken.
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{model}: x must be a torch.Tensor; got {type(x).__name__}")
    size = "H, W" if img_size is None else f"{img_size[0]}, {img_size[1]}"
    shape = tuple(x.shape)
    fits = len(shape) == 4 and shape[1] == in_chans
    if not fits or (min(shape[2:]) < 1 if img_size is None else shape[2:] != img_size):
        raise ValueError(f"{model}: x must be [N, {in_chans}, {size}]; got {list(shape)}")
    if x.dtype not in _check.FLOATING:
        raise ValueError(f"{model}: x must be floating, as the weights are; got {x.dtype}")
    # a layer that somebody put in place may have no weight, or hold it elsewhere
    weight = getattr(first, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return
    if x.device != weight.device:
        raise ValueError(f"{model}: x must be on {weight.device}, where the weights are; got {x.device}")
    if x.dtype != weight.dtype and _check.autocast_dtype(x.device) is None:
        raise ValueError(f"{model}: x must be {weight.dtype}, as the weights are; got {x.dtype}")
