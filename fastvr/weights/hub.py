"""Models by name, with weights from Hugging Face's hub where somebody asks for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from fastvr.models._model import Model
from fastvr.models.features import Backbone
from fastvr.models.registry import build_model, find, repository
from fastvr.weights.build import load_model
from fastvr.weights.errors import CheckpointError
from fastvr.weights.read import PREPROCESSORS

_HUB = "hf-hub:"
# a name without an owner is one of the first models there
_REPOSITORY = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_CONFIGS = ["config.json", *PREPROCESSORS]
# of what a repository holds twice, the first
_WEIGHTS = (
    ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"],
)


@overload
def create_model(
    name: str, pretrained: bool = False, *, features_only: Literal[False] = False, **overrides: Any
) -> Model: ...


@overload
def create_model(
    name: str,
    pretrained: bool = False,
    *,
    features_only: Literal[True],
    out_indices: int | Sequence[int] | None = None,
    **overrides: Any,
) -> Backbone: ...


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **overrides: Any,
) -> Model | Backbone:
    """A model by timm's name, with fresh weights or those of the hub.

    Args:
        name: one of :func:`list_models`; with ``pretrained`` also with a tag, as timm has them
            (``"vit_base_patch16_224.augreg_in1k"``). ``"hf-hub:OWNER/NAME"`` is a repository of the hub with
            weights that :func:`load_model` takes, and always comes with them; with ``@REVISION`` behind it
            one state of that.
        pretrained: fetch the weights that timm publishes for the model, through ``huggingface_hub``, which
            keeps them in its cache. Nothing is fetched otherwise.
        features_only: a :class:`Backbone` that gives feature maps.
        out_indices: its; for it alone.
        overrides: arguments of the model (:class:`ViT`, :class:`ResNet`); with weights as for
            :func:`load_model`.

    Returns:
        A model in training mode; with weights from the hub in eval mode.

    Raises:
        ValueError: no model has this name, none of its weights are published, or ``out_indices`` do not fit.
        CheckpointError: the weights cannot be fetched, which says what to do instead, or loaded.
    """
    if features_only:
        model: Any = _create(name, pretrained, overrides)
        return Backbone(model, out_indices)
    if out_indices is not None:
        raise ValueError(f"create_model: out_indices must be None without features_only; got {out_indices!r}")
    return _create(name, pretrained, overrides)


def _create(name: str, pretrained: bool, overrides: dict[str, Any]) -> Model:
    if not isinstance(name, str):
        raise ValueError(f"create_model: name must be a string; got {type(name).__name__}")
    if name.startswith(_HUB):
        return load_model(download(name.removeprefix(_HUB)), **overrides)
    name, _, tag = name.partition(".")
    if not pretrained:
        return build_model(name, **overrides)
    tag = tag or find(name).tag or ""
    if not tag:
        raise ValueError(f"create_model: pretrained must be False for {name}: no weights of it are published")
    # files from before timm had names for activations say another one
    stated = {key: value for key, value in find(name).arguments.items() if key == "act"}
    return load_model(download(repository(name, tag)), **{**stated, **overrides})


def download(repository: str) -> Path:
    """The folder with a repository's weights and configurations, fetched where the cache does not have them.

    Raises:
        ValueError: ``repository`` is not OWNER/NAME, or OWNER/NAME@REVISION.
        CheckpointError: ``huggingface_hub`` is missing, or the hub cannot be reached or has no such weights.
    """
    if not (match := _REPOSITORY.fullmatch(repository)):
        raise ValueError(f"create_model: name must be hf-hub:OWNER/NAME; got {_HUB + repository!r}")
    repository, revision = match["name"], match["revision"]
    source = f"{repository} --revision {revision}" if revision else repository
    instead = (
        f"without a network, run `hf download {source} --local-dir DIR` where there is one, bring DIR here "
        "and call fastvr.load_model(DIR)"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{repository}: fetching it needs huggingface_hub (pip install huggingface_hub); {instead}"
        ) from None
    for weights in _WEIGHTS:
        try:
            folder = Path(snapshot_download(repository, allow_patterns=_CONFIGS + weights, revision=revision))
        except Exception as error:  # its errors are of many kinds, and those of its network library
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            raise CheckpointError(
                f"{repository}: cannot be fetched from the hub ({type(error).__name__}: {reason}); {instead}"
            ) from error
        if any(list(folder.glob(pattern)) for pattern in weights):
            return folder
    raise CheckpointError(f"{repository}: holds neither model.safetensors nor pytorch_model.bin")
