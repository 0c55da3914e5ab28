"""Vision Transformers and ResNets on fused Triton kernels: the same models, weights and numbers, faster."""

from __future__ import annotations

from fastvr import ops
from fastvr.accelerate import accelerate, restore
from fastvr.backend import BackendError, current_backend, use_backend
from fastvr.models.features import Backbone
from fastvr.models.registry import list_models
from fastvr.models.resnet import ResNet, ResNet18, ResNet34, ResNet50, ResNet101, ResNet152
from fastvr.models.vit import ViT, vit_base, vit_huge, vit_large, vit_small, vit_tiny
from fastvr.models.vit_distilled import DistilledViT
from fastvr.ops._decompose import decompositions
from fastvr.prepare import PreparedModel, prepare
from fastvr.weights.build import load_model
from fastvr.weights.errors import CheckpointError
from fastvr.weights.hub import create_model
from fastvr.weights.load import load_checkpoint
from fastvr.weights.save import save_model

__all__ = [
    "Backbone",
    "BackendError",
    "CheckpointError",
    "DistilledViT",
    "PreparedModel",
    "ResNet",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNet101",
    "ResNet152",
    "ViT",
    "__version__",
    "accelerate",
    "create_model",
    "current_backend",
    "decompositions",
    "list_models",
    "load_checkpoint",
    "load_model",
    "ops",
    "prepare",
    "restore",
    "save_model",
    "use_backend",
    "vit_base",
    "vit_huge",
    "vit_large",
    "vit_small",
    "vit_tiny",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        # reading the metadata takes longer than all of the above
        from importlib.metadata import version

        return version("fastvr")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
