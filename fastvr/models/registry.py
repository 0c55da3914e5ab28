"""Models by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from fastvr.models import resnet, vit
from fastvr.models._model import Model

_MODELS: dict[str, Callable[..., Model]] = {
    "vit_tiny": vit.vit_tiny,
    "vit_small": vit.vit_small,
    "vit_base": vit.vit_base,
    "vit_large": vit.vit_large,
    "vit_huge": vit.vit_huge,
    "resnet18": resnet.ResNet18,
    "resnet34": resnet.ResNet34,
    "resnet50": resnet.ResNet50,
    "resnet101": resnet.ResNet101,
    "resnet152": resnet.ResNet152,
}


def list_models() -> list[str]:
    """The names that :func:`create_model` takes."""
    return list(_MODELS)


def create_model(name: str, **overrides: Any) -> Model:
    """A model with fresh weights.

    Args:
        name: one of :func:`list_models`.
        overrides: arguments of the model (:class:`ViT`, :class:`ResNet50`, ...).

    Raises:
        ValueError: no model has this name.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"create_model: name must be one of {', '.join(_MODELS)}; got {name!r}{hint}")
    return _MODELS[name](**overrides)
