"""Loading a checkpoint: recognise its layout, check all of it, then write."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fastvr.nn.attention import Attention
from fastvr.nn.block import Block
from fastvr.nn.glu import GluMlp
from fastvr.nn.mlp import Mlp
from fastvr.weights.describe import activation
from fastvr.weights.errors import CheckpointError
from fastvr.weights.layouts import Recognised, family_of, layout_names, recognise
from fastvr.weights.read import Checkpoint, grouped, is_dense, read_checkpoint, shorten, unwrap

_HEADS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias", "fc.weight", "fc.bias")


class LoadReport(NamedTuple):
    """What :func:`load_checkpoint` did."""

    layout: str
    """ "timm", "torchvision", "transformers" or "encoder" (a plain ``nn.TransformerEncoder``). The names of a
    ResNet are the same in timm and torchvision, and called timm's."""
    missing: tuple[str, ...]
    """The model's names that the checkpoint did not hold; they keep their values."""
    unexpected: tuple[str, ...]
    """The checkpoint's names that the model does not have."""
    unused: tuple[str, ...] = ()
    """The checkpoint's names that no forward pass needs: transformers' pooler, DINOv2's mask token."""


def load_checkpoint(
    model: nn.Module, path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True
) -> LoadReport:
    """Load timm's, torchvision's, transformers' or a plain ``nn.TransformerEncoder``'s weights.

    Everything is checked before the first parameter is written: after an error the model is what it was.
    Weights are cast to the model's dtypes; its devices and memory formats stay. Query, key and value that are
    separate in the checkpoint are joined. :func:`load_model` builds the model that a checkpoint is for.

    Args:
        model: a ViT or ResNet, or any module with their names; also inside ``torch.compile`` or
            ``DistributedDataParallel``.
        path_or_state_dict: a ``.safetensors`` file, a PyTorch file (read with ``weights_only=True``), the
            ``.index.json`` of sharded ones, or a folder as Hugging Face's hub has them; or what such a file
            holds: a state dict, also inside {"state_dict": ...}, {"model_state_dict": ...} or {"model": ...},
            also with a prefix of all names ("module.", "_orig_mod.", "model.", "backbone."). Of weights
            beside their moving average ("state_dict_ema", "model_ema") the average is taken, of DINO's
            {"teacher": ..., "student": ...} the teacher's backbone.
        strict: False lets names be missing or unexpected, and reports them, and lets the model have another
            activation, eps or order of its norms than the checkpoint's; shapes, dtypes and values must always
            be right.

    Returns:
        The layout, and the names that were missing, unexpected or of no use.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be read, or does not fit the model; names all that is wrong.
    """
    checkpoint = as_checkpoint(path_or_state_dict, "load_checkpoint")
    model = _unwrapped(model)
    found = _recognise(checkpoint, model)
    return fill(model, found, checkpoint.source, strict=strict)


def as_checkpoint(given: str | os.PathLike[str] | Mapping[str, Any], caller: str) -> Checkpoint:
    """What :func:`load_checkpoint` takes, read."""
    if isinstance(given, Mapping):
        return Checkpoint("the state dict", unwrap(given, "the state dict"))
    if isinstance(given, (str, os.PathLike)):
        return read_checkpoint(given)
    raise ValueError(
        f"{caller}: path_or_state_dict must be a path or a state dict; got {type(given).__name__}"
    )


def fill(model: nn.Module, found: Recognised, source: str, *, strict: bool = True) -> LoadReport:
    """Write recognised weights into ``model``, after all checks of :func:`load_checkpoint`."""
    ready, report = check(model, found, source, strict=strict)
    write(model, ready)
    return report


def check(
    model: nn.Module, found: Recognised, source: str, *, strict: bool = True, fresh: Collection[str] = ()
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Recognised weights in ``model``'s dtypes, after all checks of :func:`load_checkpoint`.

    Args:
        model: it may be on meta.
        found, source, strict: as for :func:`fill`.
        fresh: the model's names that the checkpoint need not hold.
    """
    target = model.state_dict()
    # files from before PyTorch 0.4.1 do not count batches
    missing = [
        name
        for name in target
        if name not in found.state and name not in fresh and not name.endswith("num_batches_tracked")
    ]
    unexpected = [found.origin.get(name, name) for name in found.state if name not in target]
    known = {name: tensor for name, tensor in found.state.items() if name in target}
    problems: list[str] = []
    if strict and missing:
        problems.append(f"missing: {_named(missing)}")
    if strict and unexpected:
        problems.append(f"unknown: {_named(unexpected)}")
    if strict:
        problems += _other_function(model, found)
    problems += _shapes(known, target, found.origin)
    ready, wrong = _values(known, target, found.origin)
    if problems := problems + wrong:
        what = f"{source} ({found.title} layout of a {found.family})"
        raise CheckpointError("\n  ".join([f"{what} does not fit {type(model).__name__}:", *problems]))
    return ready, LoadReport(found.layout, tuple(missing), tuple(unexpected), found.unused)


def write(model: nn.Module, ready: Mapping[str, torch.Tensor]) -> None:
    """Write what :func:`check` gave into ``model``."""
    target = model.state_dict()
    with torch.no_grad():
        for name, tensor in ready.items():
            target[name].copy_(tensor)
    if callable(changed := getattr(model, "changed", None)):
        changed()


def _unwrapped(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` and ``DistributedDataParallel`` hold, and nothing beside it."""
    for name in ("_orig_mod", "module"):
        inner = model._modules.get(name) if isinstance(model, nn.Module) else None
        if inner is not None and all(key.startswith(f"{name}.") for key in model.state_dict()):
            return _unwrapped(inner)
    return model


def _recognise(checkpoint: Checkpoint, model: nn.Module) -> Recognised:
    if not isinstance(model, nn.Module):
        raise ValueError(f"load_checkpoint: model must be a ViT or ResNet; got {type(model).__name__}")
    target = model.state_dict()
    wanted = family_of(target)
    if wanted is None:
        raise ValueError(
            "load_checkpoint: model must be a ViT or ResNet, or have such names; got a "
            f"{type(model).__name__} with others (weights go into a model before it goes into a Backbone)"
        )
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError("load_checkpoint: model must hold memory (model.to_empty); got tensors on meta")
    found = recognise(checkpoint.state, checkpoint.config, checkpoint.source)
    if found is None:
        raise CheckpointError(unknown_layout(checkpoint, wanted))
    if found.family != wanted:
        raise CheckpointError(
            f"{checkpoint.source}: holds a {found.family} in {found.title} layout, the model is a {wanted}"
        )
    return found


def unknown_layout(checkpoint: Checkpoint, wanted: str) -> str:
    """The message for a checkpoint of no known layout."""
    return (
        f"{checkpoint.source}: has no layout of a {wanted} that is known ({layout_names()}); "
        f"keys: {shorten(list(checkpoint.state))}"
    )


def _other_function(model: nn.Module, found: Recognised) -> list[str]:
    """Where ``model`` computes something else with these weights than what they were trained in."""
    blocks = list(getattr(model, "blocks", ()))
    if not blocks or not isinstance(blocks[0], Block):
        return []
    block = blocks[0]
    attn, mlp, norm = block.attn, block.mlp, block.norm1
    ours: dict[str, Any] = {"norm_first": block.norm_first}
    if isinstance(attn, Attention):
        ours["num_heads"] = attn.num_heads
    if isinstance(mlp, (Mlp, GluMlp)):
        ours["act"] = activation(mlp)
    if isinstance(norm, nn.LayerNorm):
        ours["norm_eps"] = norm.eps
    return [
        f"{name}: the checkpoint's is {theirs!r}, the model's {ours[name]!r}: construct the model with "
        f"{name}={theirs!r}, or by load_model"
        for name, theirs in found.stated.items()
        if name in ours and ours[name] not in (theirs, None)
    ]


def _shapes(
    known: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], origin: Mapping[str, str]
) -> list[str]:
    wrong: dict[str, str] = {
        name: f"{list(tensor.shape)}, the model's is {list(target[name].shape)}"
        for name, tensor in known.items()
        if tensor.shape != target[name].shape
    }
    problems = [
        f"shape of {_named(origin.get(name, name) for name in wrong if wrong[name] == shapes)}: {shapes}"
        for shapes in dict.fromkeys(wrong.values())
    ]
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


def _named(names: Iterable[str]) -> str:
    """All of them; what has more kinds of weights than any model is foreign, and its beginning is enough."""
    return shorten(grouped(names), most=60)


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
        if not is_dense(tensor):
            dtypes.append(f"{origin.get(name, name)} (no plain tensor)")
        elif tensor.is_floating_point() != dtype.is_floating_point or tensor.is_complex():
            dtypes.append(f"{origin.get(name, name)} ({tensor.dtype})")
        elif tensor.shape == target[name].shape:  # of another one nothing is written
            # after the cast: what is finite in float32 may not be in float16
            ready[name] = tensor.detach().to(dtype)
            if dtype.is_floating_point and not bool(torch.isfinite(ready[name]).all()):
                infinite.append(origin.get(name, name))
    problems = [f"not floating, or not an integer where one belongs: {_named(dtypes)}"] if dtypes else []
    if infinite:
        problems.append(f"NaN or Inf in the model's dtype: {_named(infinite)}")
    return ready, problems
