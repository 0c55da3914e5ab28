"""The two kinds of model that are compared, with their weights, and PyTorch's version of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastvr
from fastvr.backend import use_backend
from fastvr.compare import UsageError
from fastvr.models.preprocessing import Preprocessing
from fastvr.models.resnet import ResNet
from fastvr.models.vit import ViT
from fastvr.weights import preprocessing
from fastvr.weights.errors import CheckpointError
from fastvr.weights.layouts import recognise
from fastvr.weights.load import fill, unknown_layout
from fastvr.weights.read import read_checkpoint

_CLASSES = 1000


@dataclass(frozen=True)
class Family:
    """One column group of the comparison."""

    key: str
    title: str
    build: Callable[[int], ViT | ResNet]  # takes the number of classes
    peer: Callable[[int], nn.Module | None]  # the same from the library that people use now, if installed
    peer_name: str
    preprocessing: Preprocessing
    marks: tuple[str, ...]  # weights, by fastvr's names, that only checkpoints of this family have
    memory_format: torch.memory_format = torch.contiguous_format

    def input(self, x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        return x.to(device, dtype).contiguous(memory_format=self.memory_format)


def _timm_vit(num_classes: int) -> nn.Module | None:
    try:
        import timm
    except ImportError:
        return None
    model: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=num_classes)
    return model


def _torchvision_resnet(num_classes: int) -> nn.Module | None:
    try:
        import torchvision
    except ImportError:
        return None
    model: nn.Module = torchvision.models.resnet50(num_classes=num_classes)
    return model


FAMILIES = (
    Family(
        key="vit_b_16",
        title="ViT-B/16",
        build=lambda num_classes: fastvr.ViT(num_classes=num_classes),
        peer=_timm_vit,
        peer_name="timm",
        preprocessing=Preprocessing(224, 248, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), interpolation="bicubic"),
        marks=("patch_embed.proj.weight",),
    ),
    Family(
        key="resnet50",
        title="ResNet-50",
        build=lambda num_classes: fastvr.ResNet50(num_classes),
        peer=_torchvision_resnet,
        peer_name="torchvision",
        preprocessing=Preprocessing(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        marks=("layer1.0.conv1.weight",),
        memory_format=torch.channels_last,
    ),
)


class InPyTorch(nn.Module):
    """One of our models with every op on its PyTorch twin: eager PyTorch, call for call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with use_backend("reference"):
            logits: Tensor = self.model(x)
        return logits


def by_family(paths: Sequence[Path], families: Sequence[Family]) -> dict[str, Path]:
    """Which model each checkpoint is for, by the names of its weights.

    Raises:
        UsageError: a file is missing, damaged, for none of the families, or the second for one.
    """
    found: dict[str, Path] = {}
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
            known = recognise(checkpoint.state, checkpoint.config, checkpoint.source)
            names = set(checkpoint.state if known is None else known.state)
        except (ValueError, OSError) as error:
            raise UsageError(f"--weights: {' '.join(str(error).split())}") from None
        key = next((family.key for family in families if names & set(family.marks)), None)
        if key is None:
            titles = " nor ".join(family.title for family in families)
            raise UsageError(f"--weights: {path} is a checkpoint of neither {titles}")
        if key in found:
            raise UsageError(f"--weights: {found[key]} and {path} are for the same model")
        found[key] = path
    return found


def build(family: Family, weights: Path | None, photographs: Tensor, *, seed: int) -> ViT | ResNet:
    """The family's model in eval, with the weights of a checkpoint, or random ones.

    Where the checkpoint says how its images were prepared, ``model.preprocessing`` does.

    Random weights get BatchNorm statistics of ``photographs``: with the initial ones (mean 0, variance 1)
    activations would grow from layer to layer as they do in no trained model.

    Raises:
        UsageError: the checkpoint is missing, damaged, or for another model.
    """
    torch.manual_seed(seed)
    if weights is None:
        model = family.build(_CLASSES)
        calibrate(model, photographs)
        return model.eval()
    try:
        checkpoint = read_checkpoint(weights)
        found = recognise(checkpoint.state, checkpoint.config, checkpoint.source)
        if found is None:
            raise CheckpointError(unknown_layout(checkpoint, family.title))
        # a fine-tuned one needs no option of its own
        model = family.build(found.classes or _CLASSES)
        fill(model, found, checkpoint.source)
        how = preprocessing.read(checkpoint.config, checkpoint.preprocessor, checkpoint.source)
    except (ValueError, OSError) as error:
        raise UsageError(f"{family.title}: {' '.join(str(error).split())}") from None
    if how is not None and how.size == family.preprocessing.size:
        model.preprocessing = how
    return model.eval()


def eager(family: Family, model: ViT | ResNet) -> tuple[nn.Module, str]:
    """What people run now, with ``model``'s weights, and its name: timm's or torchvision's model where that
    is installed, else ours on the reference backend."""
    peer = family.peer(model.num_classes)
    if peer is None:
        return InPyTorch(model), "PyTorch"
    peer.load_state_dict(model.state_dict())
    like = next(model.parameters())
    peer = peer.to(like.device, like.dtype).to(memory_format=family.memory_format)
    return peer.eval(), family.peer_name


def calibrate(model: nn.Module, x: Tensor) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the average of what it sees from now on
        norm.reset_running_stats()
    model.train()
    with torch.no_grad(), use_backend("reference"):
        model(x)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
