"""transformers' layout of ResNet, v1.5. The weights are torchvision's, only names differ."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from fastvr.weights.errors import CheckpointError
from fastvr.weights.names import Slot

_BLOCK = re.compile(
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|(shortcut))\.(convolution|normalization)\.(.+)"
)
_STEM = re.compile(r"embedder\.embedder\.(convolution|normalization)\.(.+)")
_OURS = re.compile(r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))\.(.+)")
_KINDS = ("convolution", "normalization")


def family(keys: Collection[str]) -> str | None:
    """ "ResNet" where the keys are of this layout, else None."""
    marks = ("embedder.embedder.", "encoder.stages.0.layers.0.layer.0.")
    return "ResNet" if any(mark in key for key in keys for mark in marks) else None


def rename(key: str) -> Slot:
    """fastvr's name for transformers' ``key``; an unknown key stays as it is."""
    inner = key.removeprefix("resnet.")
    if match := _BLOCK.fullmatch(inner):
        stage, block, number, shortcut, kind, rest = match.groups()
        if shortcut:
            module = f"downsample.{_KINDS.index(kind)}"
        else:
            module = f"{'conv' if kind == 'convolution' else 'bn'}{int(number) + 1}"
        return f"layer{int(stage) + 1}.{block}.{module}.{rest}"
    if match := _STEM.fullmatch(inner):
        return f"{'conv1' if match[1] == 'convolution' else 'bn1'}.{match[2]}"
    return re.sub(r"^classifier\.1\.", "fc.", inner) if inner.startswith("classifier.1.") else key


def export(name: str, with_head: bool) -> tuple[str, ...] | None:
    """The key that transformers saves for fastvr's ``name``; None where it has none."""
    prefix = "resnet." if with_head else ""
    if match := _OURS.fullmatch(name):
        stage, block, kind, number, shortcut, rest = match.groups()
        where = f"{prefix}encoder.stages.{int(stage) - 1}.layers.{block}"
        if shortcut is not None:
            return (f"{where}.shortcut.{_KINDS[int(shortcut)]}.{rest}",)
        return (f"{where}.layer.{int(number) - 1}.{_KINDS[kind == 'bn']}.{rest}",)
    module, _, rest = name.partition(".")
    if module in ("conv1", "bn1"):
        return (f"{prefix}embedder.embedder.{_KINDS[module == 'bn1']}.{rest}",)
    return (f"classifier.1.{rest}",) if module == "fc" else None


def unused(key: str) -> bool:
    """Whether the model's function does not need ``key``."""
    return False


def finish(state: dict[str, torch.Tensor], keys: Collection[str]) -> None:
    """Nothing in this layout has another form than in fastvr."""


def stated(family: str, config: Mapping[str, Any] | None, keys: Collection[str]) -> dict[str, Any]:
    """The weights say all there is to say, where the configuration asks for nothing else.

    Raises:
        CheckpointError: the configuration asks for what fastvr's ResNet does not compute.
    """
    expected = {
        "model_type": "resnet",
        "hidden_act": "relu",
        "downsample_in_bottleneck": False,
        "downsample_in_first_stage": False,
    }
    for name, value in expected.items():
        if config is not None and (got := config.get(name, value)) != value:
            raise CheckpointError(f"config.json: {name} must be {value!r}; got {got!r}")
    return {}
