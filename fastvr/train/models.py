"""The models that can be trained by name: the registry's, and one small one of each kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fastvr.compare.models import FAMILIES
from fastvr.models._model import Model
from fastvr.models.preprocessing import Preprocessing
from fastvr.models.registry import build_model, list_models
from fastvr.models.resnet import ResNet
from fastvr.models.vit import ViT
from fastvr.nn.residual import BasicBlock

# 451 and 482 thousand parameters: digits are learnt in a minute on a CPU
MINI = ("vit_mini", "resnet_mini")


def names() -> list[str]:
    """What :func:`create` takes."""
    return [*MINI, *list_models()]


def create(name: str, num_classes: int, in_chans: int, image_size: int) -> Model:
    """A model with fresh weights for square images.

    Raises:
        ValueError: no model has this name, or none of this kind takes images of this size.
    """
    if name == "vit_mini":
        if image_size % 4:
            raise ValueError(f"vit_mini: image_size must be a multiple of 4; got {image_size}")
        return ViT(image_size, image_size // 4, in_chans, num_classes, embed_dim=96, depth=4, num_heads=3)
    if name == "resnet_mini":
        return ResNet(BasicBlock, (1, 1, 1, 1), num_classes, in_chans, width=20)
    sizes: dict[str, Any] = {"img_size": image_size} if is_vit(name) else {}
    return build_model(name, num_classes=num_classes, in_chans=in_chans, **sizes)


def is_vit(name: str) -> bool:
    return "resne" not in name


def default_image_size(name: str, *, digits: bool) -> int:
    """The size at which a model is trained unless somebody asks for another."""
    if name == "vit_mini" and digits:
        return 8
    return 32 if name in MINI else 224


def preprocessing(name: str, image_size: int) -> Preprocessing:
    """How images are fed to ``name``: as its family's published weights were, scaled to ``image_size``."""
    return FAMILIES[0 if is_vit(name) else 1].preprocessing.at(image_size)


@contextlib.contextmanager
def one_thread(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """On a CPU, for the small models: too small for threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    if device.type == "cpu" and enabled:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
