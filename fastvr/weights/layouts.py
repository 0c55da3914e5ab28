"""Which of the layouts a checkpoint has, and its weights under fastvr's names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fastvr.weights import encoder, timm, torchvision, transformers, transformers_clip, transformers_resnet
from fastvr.weights.describe import read_description
from fastvr.weights.errors import CheckpointError
from fastvr.weights.names import Slot
from fastvr.weights.read import METADATA_KEY, is_dense, shorten

# a layout that another one's marks also fit comes after it
_LAYOUTS = {
    "timm": (timm,),
    "torchvision": (torchvision,),
    "encoder": (encoder,),
    "transformers": (transformers_resnet, transformers_clip, transformers),
}
_TITLES = {"encoder": "a plain nn.TransformerEncoder's"}
_PARTS = {"attn.qkv": ("query", "key", "value"), "mlp.fc1": ("gate", "value")}


class Recognised(NamedTuple):
    """A checkpoint's weights under fastvr's names."""

    layout: str
    """ "timm", "torchvision", "encoder" (a plain ``nn.TransformerEncoder``) or "transformers"."""
    family: str
    """ "ViT" or "ResNet"."""
    state: dict[str, torch.Tensor]
    origin: dict[str, str]
    """What the checkpoint calls each of them."""
    unused: tuple[str, ...]
    """The checkpoint's names that the model's function does not need."""
    stated: dict[str, Any]
    """Arguments of the model that its configuration or its layout say beside the weights."""

    @property
    def title(self) -> str:
        return _TITLES.get(self.layout, f"{self.layout}'s")

    @property
    def classes(self) -> int:
        """How many its head tells apart; 0 where it has none."""
        heads = [self.state[name] for name in ("head.weight", "fc.weight") if name in self.state]
        return len(heads[0]) if heads and heads[0].ndim else 0


def layout_names() -> str:
    return "timm's, torchvision's, transformers' and that of a plain nn.TransformerEncoder"


def family_of(keys: Collection[str]) -> str | None:
    """ "ViT" or "ResNet" where the keys are fastvr's, else None."""
    return timm.family(keys)


def recognise(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None, source: str
) -> Recognised | None:
    """The weights under fastvr's names, query, key and value joined, SwiGLU's gate and value too; None where
    no layout fits.

    Raises:
        CheckpointError: the same weights twice, a query without its key or value, a gate without its value,
            parts that do not fit together, a configuration that fastvr has no model for.
    """
    for layout, modules in _LAYOUTS.items():
        for module in modules:
            if (family := module.family(state)) is not None:
                # first, since what a configuration rules out need not fit together
                stated = _stated(module, family, config, state, source)
                slots = {key: module.rename(key) for key in state if not module.unused(key)}
                renamed, origin = _joined(state, slots, source)
                module.finish(renamed, state)
                unused = tuple(key for key in state if key not in slots)
                return Recognised(layout, family, renamed, origin, unused, stated)
    return None


def _stated(
    module: ModuleType, family: str, config: Mapping[str, Any] | None, keys: Collection[str], source: str
) -> dict[str, Any]:
    """What the configuration says, fastvr's own before the library's; checked, since it is only data."""
    try:
        own = None if config is None else config.get(METADATA_KEY)
        found = own if isinstance(own, Mapping) else module.stated(family, config, keys)
        return read_description(found)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _joined(
    state: Mapping[str, torch.Tensor], slots: Mapping[str, Slot], source: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    joined: dict[str, torch.Tensor] = {}
    origin: dict[str, str] = {}
    parts: dict[str, dict[int, str]] = {}
    first: dict[Slot, str] = {}
    if twice := [key for key, slot in slots.items() if first.setdefault(slot, key) != key]:
        raise CheckpointError(f"{source}: holds the same weights twice: {shorten(sorted(twice))}")
    for key, slot in slots.items():
        if isinstance(slot, str):
            joined[slot], origin[slot] = state[key], key
        else:
            parts.setdefault(slot[0], {})[slot[1]] = key
    problems: list[str] = []
    for name, keys in parts.items():
        kinds = next(kinds for packed, kinds in _PARTS.items() if f".{packed}." in name)
        if lacking := [part for number, part in enumerate(kinds) if number not in keys]:
            problems.append(f"{next(iter(keys.values()))} is there without its {' and '.join(lacking)}")
            continue
        ordered = [keys[number] for number in range(len(kinds))]
        tensors = [state[key] for key in ordered]
        if (
            not all(map(is_dense, tensors))
            or len({(t.shape, t.dtype) for t in tensors}) > 1
            or not tensors[0].dim()
        ):
            shapes = ", ".join(f"{key} {list(t.shape)}" for key, t in zip(ordered, tensors, strict=True))
            problems.append(f"cannot be joined: {shapes}")
            continue
        joined[name], origin[name] = torch.cat(tensors), ", ".join(ordered)
    if problems:
        raise CheckpointError(f"{source}:\n  " + "\n  ".join(problems))
    return joined, origin
