"""What the model families share: images and their check, and noticing that weights may have changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fastvr.models.checkpointing import recomputed
from fastvr.models.preprocessing import Preprocessing
from fastvr.ops import _check

if TYPE_CHECKING:
    from typing_extensions import Self


class Model(nn.Module):
    """A module that counts what may have changed its weights, so that a prepared snapshot knows it is stale.

    Counted are ``train()`` and ``eval()`` that change the mode, ``load_state_dict``, everything that goes
    through ``to()``, new classifiers and ``normalize_images``; also where the model is a part of a larger
    one. Writing into parameters by hand is not.
    """

    generation: int = 0
    in_chans: int
    num_classes: int
    preprocessing: Preprocessing | None = None
    """How its images were prepared in training, where the checkpoint said so."""
    grad_checkpointing: bool = False
    # what pretrained_cfg says of the family: the first convolution, the classifier, pixels to a last feature
    _first_conv: str
    _classifier: str | tuple[str, ...]
    _stride: int | None = None
    # what other libraries call an argument, and what it is called here
    other_names: ClassVar[Mapping[str, str]] = {}
    # and what there is not here, with what holds instead
    absent: ClassVar[Mapping[str, str]] = {}
    # (mean, std) of uint8 images; plain numbers, since a buffer would be rounded by .bfloat16()
    _moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __new__(cls, *args: Any, **arguments: Any) -> Self:
        for name in arguments:
            if (ours := cls.other_names.get(name)) is not None:
                raise TypeError(f"{cls.__name__}: there is no argument {name!r}; it is called {ours} here")
            if (instead := cls.absent.get(name)) is not None:
                raise TypeError(f"{cls.__name__}: there is no argument {name!r}: {instead}")
        return super().__new__(cls)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what goes into each block for the backward pass, and compute the rest again there (timm's
        method): less memory, about a third more arithmetic."""
        self.grad_checkpointing = enable

    def run_block(
        self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, block: nn.Module
    ) -> torch.Tensor:
        """``function(x)``, a part of ``block``, as :meth:`set_grad_checkpointing` has it."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return recomputed(function, x, block)
        return function(x)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm's tools ask of a model (``timm.data.resolve_model_data_config``): its images, and the
        names of its first and last layer, as they are now. How images are prepared is in it where that is
        known: from :attr:`preprocessing`, or mean and deviation from :meth:`normalize_images`."""
        how = self.preprocessing
        known = {} if how is None else how.for_timm()
        if how is None and self._moments is not None:
            known = {"mean": self._moments[0], "std": self._moments[1]}
        side = 224 if how is None else how.size
        # a ViT's; a ResNet takes every size
        fixed: tuple[int, int] | None = getattr(self, "img_size", None)
        height, width = fixed or (side, side)
        stride = self._stride
        return {
            **{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()},
            "num_classes": self.num_classes,
            "input_size": (self.in_chans, height, width),
            "fixed_input_size": fixed is not None and not getattr(self, "dynamic_img_size", False),
            "pool_size": None if stride is None else (-(-height // stride), -(-width // stride)),
            "first_conv": self._first_conv,
            "classifier": self._classifier,
        }

    @property
    def default_cfg(self) -> dict[str, Any]:
        """Another name of :attr:`pretrained_cfg`."""
        return self.pretrained_cfg

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that optimisers leave without weight decay, besides biases and norms."""
        return set()

    def normalize_images(self, mean: float | Sequence[float], std: float | Sequence[float]) -> Self:
        """Take uint8 images, as decoders give them, as ``(x / 255 - mean) / std``.

        The numbers belong to the weights: timm's ``vit_*_patch16_224`` were trained with 0.5 and 0.5,
        torchvision's ResNets with (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225). They are not part of the
        state dict.

        Args:
            mean, std: one number, or one for each of the images' channels; std is positive.

        Returns:
            The model. Floating images are taken as they are, as before.

        Raises:
            ValueError: numbers that do not fit; the message names the argument.
        """
        self._moments = self._per_channel("mean", mean), self._per_channel("std", std)
        self.changed()
        return self

    def _per_channel(self, name: str, given: float | Sequence[float]) -> tuple[float, ...]:
        values = tuple(given) if isinstance(given, Sequence) else (given,) * self.in_chans
        numbers = all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
        if len(values) != self.in_chans or not numbers or (name == "std" and min(values) <= 0):
            kind = "positive number" if name == "std" else "number"
            raise ValueError(
                f"{type(self).__name__}: {name} must be one {kind}, or one for each of {self.in_chans} "
                f"channels; got {given!r}"
            )
        return tuple(float(v) for v in values)

    def image_moments(
        self, x: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(mean, std), each [in_chans], as ops want them beside images ``x``; (None, None) for floating ones.

        ``dtype``: the weights'; the vectors are float32, or float64 beside such weights.
        """
        if x.dtype != torch.uint8:
            return None, None
        assert self._moments is not None
        wide = torch.promote_types(dtype, torch.float32)
        key = (self._moments, x.device, wide)
        kept = self.__dict__.get("_kept_moments")
        if kept is not None and kept[0] == key:
            mean, std = kept[1]
            return mean, std
        # training may read them later, which takes no tensors of inference mode
        with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
            mean, std = (torch.tensor(m, dtype=wide, device=x.device) for m in self._moments)
        # once, not at every call: copies to a GPU would wait for it; but a tracer's own tensors end with it
        if type(mean) is torch.Tensor:
            self.__dict__["_kept_moments"] = key, (mean, std)
        return mean, std

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
    model: Model, x: torch.Tensor, img_size: tuple[int, int] | None, first: nn.Module
) -> torch.dtype:
    """Raise one ValueError where ``x`` is no image for ``model``, whose first layer is ``first``.

    ``img_size`` None takes every size. Under autocast any floating dtype is taken.

    Returns:
        The dtype of the first layer's weight, or x's where there is none (float32 for uint8 images).
    """
    name, in_chans = ("ViT" if img_size is not None else "ResNet"), model.in_chans
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: x must be a torch.Tensor; got {type(x).__name__}")
    size = "H, W" if img_size is None else f"{img_size[0]}, {img_size[1]}"
    shape = tuple(x.shape)
    fits = len(shape) == 4 and shape[1] == in_chans
    if not fits or (min(shape[2:]) < 1 if img_size is None else shape[2:] != img_size):
        raise ValueError(f"{name}: x must be [N, {in_chans}, {size}]; got {list(shape)}")
    if x.dtype == torch.uint8 and model._moments is None:
        raise ValueError(
            f"{name}: x must be floating, or uint8 after normalize_images(mean, std); got {x.dtype}"
        )
    if x.dtype not in (*_check.FLOATING, torch.uint8):
        raise ValueError(f"{name}: x must be floating, as the weights are; got {x.dtype}")
    # a layer that somebody put in place may have no weight, or hold it elsewhere
    weight = getattr(first, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return torch.promote_types(x.dtype, torch.float32) if x.dtype == torch.uint8 else x.dtype
    if x.device != weight.device:
        raise ValueError(f"{name}: x must be on {weight.device}, where the weights are; got {x.device}")
    if x.dtype not in (weight.dtype, torch.uint8) and _check.autocast_dtype(x.device) is None:
        raise ValueError(f"{name}: x must be {weight.dtype}, as the weights are; got {x.dtype}")
    return weight.dtype
