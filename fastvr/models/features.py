"""Features from the middle of a model: which ones, what they are, and a model that gives nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastvr.models._model import Model

if TYPE_CHECKING:
    from fastvr.models.resnet import ResNet
    from fastvr.models.vit import ViT


def take_indices(owner: str, name: str, indices: int | Sequence[int] | None, available: int) -> list[int]:
    """Which of ``available`` features the argument ``name`` means, counted from the first.

    Args:
        owner, name: what the message calls the model and the argument.
        indices: the last n, or those with these indices (negative ones count from the end), or None: all.

    Raises:
        ValueError: there are no such features, or none are asked for.
    """
    if indices is None:
        return list(range(available))
    if type(indices) is int:
        if 0 < indices <= available:
            return list(range(available - indices, available))
    elif (
        isinstance(indices, Sequence)
        and len(indices) > 0
        and all(type(i) is int and -available <= i < available for i in indices)
    ):
        return [i % available for i in indices]
    raise ValueError(
        f"{owner}: {name} must be how many of the last of {available} features, or a sequence of their "
        f"indices; got {indices!r}"
    )


def check_output_fmt(owner: str, output_fmt: str, formats: tuple[str, ...]) -> None:
    if output_fmt not in formats:
        raise ValueError(
            f"{owner}: output_fmt must be {' or '.join(map(repr, formats))}; got {str(output_fmt)!r}"
        )


class FeatureInfo:
    """What features a backbone gives, by the methods of timm's class of this name.

    Args:
        info: of every feature that the model has ``num_chs`` (channels), ``reduction`` (pixels of the image
            to one of the map) and ``module`` (the name of the module that makes it).
        out_indices: those that are given.
    """

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = [{"index": i, **one} for i, one in enumerate(info)]
        self.out_indices = tuple(out_indices)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """``key`` of the feature ``idx`` of the model, of several, or (None) of those that are given."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """As :meth:`get`, of several keys or (None) all, as dictionaries."""
        if isinstance(idx, int):
            return {key: self.info[idx][key] for key in (self.info[idx] if keys is None else keys)}
        return [self.get_dicts(keys, i) for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Channels of the maps."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Strides of the maps, in pixels of the image."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Names of the modules whose results the maps are."""
        return self.get("module", idx)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.info[item]

    def __len__(self) -> int:
        return len(self.info)


class Backbone(nn.Module):
    """A model without its head that gives feature maps, as detection and segmentation want them.

    Its state-dict keys are the model's behind ``model.``, as those of timm's ``FeatureGetterNet``.

    Args:
        model: a ViT or ResNet. It becomes a part of this module; its head, and what comes after the last
            feature, are taken off it.
        out_indices: how many of the last features, or their indices in rising order: blocks of a ViT; a
            ResNet's stem (0) and stages (1 to 4). None: the last three blocks, or all five.
        norm: whether a ViT's features pass its last norm.

    Raises:
        ValueError: another model, or ``out_indices`` that it does not have; it stays as it was.
    """

    def __init__(
        self, model: ViT | ResNet, out_indices: int | Sequence[int] | None = None, *, norm: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(model, Model):
            raise ValueError(
                f"Backbone: model must be a ViT or ResNet of fastvr's; got {type(model).__name__}"
            )
        given = model.default_out_indices if out_indices is None else out_indices
        # counted from the front before anything is taken off
        taken = take_indices("Backbone", "out_indices", given, len(model.feature_info))
        if sorted(set(taken)) != taken:
            raise ValueError(f"Backbone: out_indices must be in rising order; got {given!r}")
        self.feature_info = FeatureInfo(model.feature_info, taken)
        model.prune_intermediate_layers(taken, prune_norm=not norm)
        self.model = model
        self.out_indices = tuple(taken)
        self.norm = norm
        self.output_fmt = "NCHW"
        self.train(model.training)

    @property
    def generation(self) -> int:
        """The model's: what may have changed its weights, counted."""
        return self.model.generation

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The model's, without what is about its head."""
        config = self.model.pretrained_cfg
        return {key: value for key, value in config.items() if key not in ("num_classes", "classifier")}

    @property
    def default_cfg(self) -> dict[str, Any]:
        """Another name of :attr:`pretrained_cfg`."""
        return self.pretrained_cfg

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As :meth:`ViT.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of images.

        Args:
            x: images, as the model takes them.

        Returns:
            Of each of ``out_indices`` a map [B, channels, height / reduction, width / reduction].

        Raises:
            ValueError: x's rank, size, dtype or device.
        """
        maps: list[torch.Tensor] = self.model.forward_intermediates(
            x, indices=self.out_indices, norm=self.norm, intermediates_only=True
        )
        return maps
