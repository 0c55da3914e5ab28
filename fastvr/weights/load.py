"""Loading a checkpoint: recognise its layout, check all of it, then write."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastvr.weights import timm, torchvision
from fastvr.weights.errors import CheckpointError
from fastvr.weights.read import read_file, shorten, unwrap

_LAYOUTS = {"timm": timm, "torchvision": torchvision}
_HEADS = ("head.weight", "head.bias", "fc.weight", "fc.bias")


class LoadReport(NamedTuple):
    """What :func:`load_checkpoint` did."""

    layout: str
    """ "timm" or "torchvision"; a ResNet's names are the same in both, and called timm's."""
    missing: tuple[str, ...]
    """The model's names that the checkpoint did not hold; they keep their values."""
    unexpected: tuple[str, ...]
    """The checkpoint's names that the model does not have."""


def load_checkpoint(
    model: nn.Module, path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True
) -> LoadReport:
    """Load timm's or torchvision's weights into a ViT or ResNet.

    Everything is checked before the first parameter is written: after an error the model is what it was.
    Weights are cast to the model's dtypes; its devices and memory formats stay.

    Args:
        model: a ViT or ResNet, or any module with their names.
        path_or_state_dict: a ``.safetensors`` file, a PyTorch file (read with ``weights_only=True``), or what
            such a file holds: a state dict, also inside {"state_dict": ...} or {"model": ...}, also with the
            prefixes of ``DataParallel`` or ``torch.compile``. Of weights beside their moving average
            ("state_dict_ema", "model_ema") the average is taken.
        strict: False lets names be missing or unexpected, and reports them; shapes, dtypes and values must
            always be right.

    Returns:
        The layout, and the names that were missing or unexpected.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be read, or does not fit the model; names all that is wrong.
    """
    if isinstance(path_or_state_dict, Mapping):
        source, loaded = "the state dict", path_or_state_dict
    elif isinstance(path_or_state_dict, (str, os.PathLike)):
        source, loaded = str(Path(path_or_state_dict)), read_file(path_or_state_dict)
    else:
        raise ValueError(
            "load_checkpoint: path_or_state_dict must be a path or a state dict; "
            f"got {type(path_or_state_dict).__name__}"
        )
    state = unwrap(loaded, source)
    target = model.state_dict()
    layout = _layout(state, target, source)
    renamed = {_LAYOUTS[layout].rename(key): key for key in state}
    if len(renamed) < len(state):
        twice = sorted(key for key in state if renamed[_LAYOUTS[layout].rename(key)] != key)
        raise CheckpointError(f"{source}: holds the same weights twice: {shorten(twice)}")
    # files from before PyTorch 0.4.1 do not count batches
    missing = [name for name in target if name not in renamed and not name.endswith(".num_batches_tracked")]
    unexpected = [key for name, key in renamed.items() if name not in target]
    known = {name: state[key] for name, key in renamed.items() if name in target}
    problems: list[str] = []
    if strict and missing:
        problems.append(f"missing: {shorten(missing)}")
    if strict and unexpected:
        problems.append(f"unknown: {shorten(unexpected)}")
    problems += _shapes(known, target, renamed)
    ready: dict[str, torch.Tensor] = {}
    if not problems:
        ready, problems = _values(known, target, renamed)
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointError(f"{source} does not fit {type(model).__name__}:\n  {lines}")
    with torch.no_grad():
        for name, tensor in ready.items():
            target[name].copy_(tensor)
    if callable(changed := getattr(model, "changed", None)):
        changed()
    return LoadReport(layout, tuple(missing), tuple(unexpected))


def _layout(state: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], source: str) -> str:
    wanted = timm.family(target)
    if wanted is None:
        raise ValueError("load_checkpoint: model must be a ViT or ResNet, or have such names; got others")
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError("load_checkpoint: model must hold memory (model.to_empty); got tensors on meta")
    for layout, module in _LAYOUTS.items():
        found = module.family(state)
        if found == wanted:
            return layout
        if found is not None:
            raise CheckpointError(f"{source}: holds a {found} in {layout}'s layout, the model is a {wanted}")
    if foreign := _foreign(state):
        raise CheckpointError(
            f"{source}: holds the layout of {foreign}, which is not supported; timm's and torchvision's are"
        )
    raise CheckpointError(
        f"{source}: neither timm's nor torchvision's layout of a {wanted}; keys: {shorten(list(state))}"
    )


def _foreign(keys: Collection[str]) -> str | None:
    if any(key.startswith("transformer_encoder.layers.") for key in keys):
        return "a plain nn.TransformerEncoder"
    marks = ("embeddings.patch_embeddings.", "vit.layers.", "resnet.embedder.", "embedder.embedder.")
    return "transformers" if any(mark in key for key in keys for mark in marks) else None


def _shapes(
    known: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], origin: Mapping[str, str]
) -> list[str]:
    wrong = {name for name, tensor in known.items() if tensor.shape != target[name].shape}
    problems = [
        f"shape of {origin[name]}: {list(known[name].shape)}, the model's is {list(target[name].shape)}"
        for name in known
        if name in wrong
    ]
    if problems[10:]:
        problems[10:] = [f"shapes of {len(problems) - 10} more"]
    # of a model of another width the number of classes, or of positions, may well be right
    if heads := [name for name in _HEADS if name in wrong and _differ(known[name], target[name], 0)]:
        classes = known[heads[0]].shape[0]
        problems.append(
            f"the checkpoint has {classes} classes: construct the model with num_classes={classes}, load, "
            "then reset_classifier to your own number"
        )
    if "pos_embed" in wrong and _differ(known["pos_embed"], target["pos_embed"], 1):
        problems.append(
            "the checkpoint has other positions: construct the model with its img_size, patch_size and tokens"
        )
    return problems


def _differ(tensor: torch.Tensor, target: torch.Tensor, dim: int) -> bool:
    """Whether both have dimension ``dim``, of different sizes."""
    return min(tensor.dim(), target.dim()) > dim and tensor.shape[dim] != target.shape[dim]


def _values(
    known: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], origin: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights in the model's dtypes, and what is wrong with them."""
    ready: dict[str, torch.Tensor] = {}
    dtypes: list[str] = []
    infinite: list[str] = []
    for name, tensor in known.items():
        dtype = target[name].dtype
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            dtypes.append(f"{origin[name]} (no plain tensor)")
        elif tensor.is_floating_point() != dtype.is_floating_point or tensor.is_complex():
            dtypes.append(f"{origin[name]} ({tensor.dtype})")
        else:
            # after the cast: what is finite in float32 may not be in float16
            ready[name] = tensor.detach().to(dtype)
            if dtype.is_floating_point and not bool(torch.isfinite(ready[name]).all()):
                infinite.append(origin[name])
    problems = [f"not floating, or not an integer where one belongs: {shorten(dtypes)}"] if dtypes else []
    if infinite:
        problems.append(f"NaN or Inf in the model's dtype: {shorten(infinite)}")
    return ready, problems
