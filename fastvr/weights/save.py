"""Writing a model's weights in another library's layout, with what belongs to them."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastvr.models._model import Model
from fastvr.models.resnet import ResNet
from fastvr.models.vit import ViT
from fastvr.models.vit_distilled import DistilledViT
from fastvr.tuning.table import replacing
from fastvr.weights import (
    configs,
    preprocessing,
    torchvision,
    transformers,
    transformers_clip,
    transformers_resnet,
)
from fastvr.weights.describe import describe
from fastvr.weights.read import METADATA_KEY, PREPROCESSORS

LAYOUTS = ("timm", "torchvision", "transformers")
_SUFFIXES = (".safetensors", ".pt", ".pth")
# of files that nobody means as a folder's name
_FOREIGN = (".bin", ".ckpt", ".h5", ".json", ".msgpack", ".npz", ".onnx", ".pkl", ".pt2", ".tar", ".zip")


def save_model(model: Model, path: str | os.PathLike[str], layout: str = "timm") -> Path:
    """Write ``model``'s weights so that ``layout``'s library, and :func:`load_model`, can read them.

    Args:
        model: a ViT or ResNet.
        path: a ``.safetensors`` file, a ``.pt`` or ``.pth`` file with the state dict alone, or a folder: it
            gets ``model.safetensors`` and ``config.json`` (``timm.create_model("local-dir:...")`` takes it,
            transformers' ``from_pretrained`` does) and what is known of the images' preprocessing. What is
            there already is replaced when all is written, and another model's preprocessing taken away.
        layout: "timm", "torchvision", or "transformers", which takes a folder.

    Returns:
        The file or folder.

    Raises:
        ValueError: an argument is wrong, or the layout has no such model; nothing is written.
        OSError: it cannot be written, by which nothing is changed.
    """
    if not isinstance(model, (ViT, ResNet)):
        raise ValueError(f"save_model: model must be a ViT or ResNet; got {type(model).__name__}")
    if layout not in LAYOUTS:
        raise ValueError(f"save_model: layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    path = Path(path)
    check_path(path, layout)
    folder = path.suffix not in _SUFFIXES
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if any(t.is_meta for t in model.state_dict().values()):
        raise ValueError("save_model: model must hold memory (model.to_empty); got tensors on meta")
    described = describe(model)
    config: dict[str, Any] = {}
    if layout == "timm":
        config = configs.timm_config(model, described)
    elif layout == "torchvision":
        configs.check_torchvision(model, described)
        state = _renamed(state, torchvision.export) if isinstance(model, ViT) else state
    elif isinstance(model, ViT) and transformers_clip.holds(model):
        config = transformers_clip.config(model, described)
        projected = bool(model.num_classes)
        state = _renamed(
            transformers_clip.written(state), lambda name: transformers_clip.export(name, projected)
        )
    elif isinstance(model, ViT):
        config = configs.transformers_vit(model, described)
        gated = bool(config.get("use_swiglu_ffn"))
        state = _transformers_state(state, model, config["model_type"], gated)
    else:
        config = configs.transformers_resnet(model)
        with_head = bool(model.num_classes)
        state = _renamed(state, lambda name: transformers_resnet.export(name, with_head))
    how = model.preprocessing
    if layout == "transformers":
        config |= {METADATA_KEY: described} if described else {}
    else:
        own = own_config(model)
        config |= {**own, "pretrained_cfg": own.get("pretrained_cfg", {}) | config.get("pretrained_cfg", {})}
    if not folder:
        with replacing(path) as file:
            file.write(_serialised(path.suffix, state, {METADATA_KEY: json.dumps(config)}))
        return path
    files = {"config.json": _json(config)}
    if how is not None and layout == "transformers":
        files["preprocessor_config.json"] = _json(preprocessing.for_transformers(how))
    files["model.safetensors"] = _serialised(".safetensors", state, {})
    _write_folder(path, files)
    return path


def check_path(path: Path, layout: str) -> None:
    """Raise a ValueError where ``layout`` cannot be written to ``path``."""
    if path.suffix in _SUFFIXES:
        if layout == "transformers":
            raise ValueError(f"save_model: path must be a folder for transformers' layout; got {path}")
        if not path.parent.is_dir():
            raise ValueError(f"save_model: path must lie in a folder that exists; got {path}")
        if path.is_dir():
            raise ValueError(f"save_model: path must not be a folder with such a name; got {path}")
    elif path.suffix in _FOREIGN or (path.exists() and not path.is_dir()):
        kinds = f"end in {', '.join(_SUFFIXES)}, or be a folder"
        raise ValueError(f"save_model: path must {kinds}; got {path}")


def _write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """All of them, or none: each is put in place when all of them are on the disk."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as written:
            opened = [written.enter_context(replacing(path / name)) for name in files]
            for file, data in zip(opened, files.values(), strict=True):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else's files may be in it by now
                folder.rmdir()
        raise
    for name in PREPROCESSORS:
        if name not in files:
            (path / name).unlink(missing_ok=True)


def own_config(model: Model) -> dict[str, Any]:
    """What :func:`load_model` needs beside the weights in fastvr's own names, and timm's preprocessing.

    Raises:
        ValueError: somebody put other modules into the model.
    """
    how, described = model.preprocessing, describe(model)
    config: dict[str, Any] = {METADATA_KEY: described} if described else {}
    return config if how is None else config | {"pretrained_cfg": how.for_timm()}


def _transformers_state(
    state: dict[str, torch.Tensor], model: ViT, model_type: str, gated: bool
) -> dict[str, torch.Tensor]:
    state = dict(state)
    if model_type == "deit" and "reg_token" in state:
        state["dist_token"] = state.pop("reg_token")
    if model_type == "dinov2_with_registers":
        # the class token has its position in it already
        state["pos_embed"] = torch.cat([torch.zeros_like(state["cls_token"]), state["pos_embed"]], dim=1)
    with_head = bool(model.num_classes)

    def export(name: str) -> tuple[str, ...] | None:
        keys = transformers.export(name, model_type, with_head, gated)
        if isinstance(model, DistilledViT) and name.startswith("head."):
            return (name.replace("head", "cls_classifier", 1),)
        return keys

    renamed = _renamed(state, export)
    if model_type == "dinov2_with_registers":
        # its model has one always, at first of zeros, and reads it where patches are hidden
        renamed["embeddings.mask_token"] = state["cls_token"].new_zeros(1, model.embed_dim)
    return renamed


def _renamed(
    state: dict[str, torch.Tensor], export: Callable[[str], tuple[str, ...] | None]
) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        keys = export(name)
        if keys is None:
            raise ValueError(f"save_model: the layout has no name for {name}")
        parts = tensor.chunk(len(keys)) if len(keys) > 1 else (tensor,)
        renamed |= {key: part.clone() for key, part in zip(keys, parts, strict=True)}
    return renamed


def _serialised(suffix: str, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    if suffix == ".safetensors":
        from safetensors.torch import save as serialise

        return serialise(state, metadata={"format": "pt", **metadata})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _json(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()
