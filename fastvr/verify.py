"""A checkpoint in its own library and in fastvr: the error of each against float64, by the parity rule."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastvr.models._model import Model
from fastvr.models.resnet import ResNet
from fastvr.models.vit import ViT
from fastvr.testing import ParityReport, measure_parity, truth_model
from fastvr.weights import configs, transformers_clip
from fastvr.weights.build import build
from fastvr.weights.describe import describe
from fastvr.weights.errors import CheckpointError
from fastvr.weights.layouts import Recognised, recognise
from fastvr.weights.load import unknown_layout
from fastvr.weights.read import Checkpoint, read_checkpoint

_ARCHITECTURES = {
    **{
        name + task: name + task
        for name in ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "ResNet")
        for task in ("Model", "ForImageClassification", "ForImageClassificationWithTeacher")
    },
    **{
        name: name
        for name in (
            "CLIPVisionModel",
            "CLIPVisionModelWithProjection",
            "CLIPForImageClassification",
            "SiglipVisionModel",
            "SiglipForImageClassification",
        )
    },
    # of two towers the one that sees
    "CLIPModel": "CLIPVisionModelWithProjection",
    "SiglipModel": "SiglipVisionModel",
}
"""transformers' models, and which of its classes runs their images."""

_PREFIXES = {
    "vit": "ViT",
    "deit": "DeiT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "resnet": "ResNet",
    "clip": "CLIP",
    "clip_vision_model": "CLIPVision",
    "siglip": "Siglip",
    "siglip_vision_model": "SiglipVision",
}


class Verdict(NamedTuple):
    """How far each implementation is from the truth."""

    library: str
    """Whose model it is: "timm", "torchvision", "transformers" or "torch.nn"."""
    layout: str
    model: Model
    theirs: ParityReport
    """The library's own error against float64."""
    ours: ParityReport
    """fastvr's, with the bounds that the library's own error sets."""


def verify(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 4,
    seed: int = 0,
    num_heads: int | None = None,
) -> Verdict:
    """Run random images through a checkpoint's own library and through fastvr, on a GPU where there is one.

    Args:
        path: as for :func:`fastvr.load_checkpoint`.
        dtype: of weights and images in both.
        batch: number of images.
        seed: of the images.
        num_heads: of both models, where the checkpoint does not say it.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be loaded, here or there, or its library is not installed.
    """
    checkpoint = read_checkpoint(path)
    model = build(checkpoint, **({} if num_heads is None else {"num_heads": num_heads}))
    found = recognise(checkpoint.state, checkpoint.config, checkpoint.source)
    assert found is not None, unknown_layout(checkpoint, "model")
    try:
        library, peer = _peer(checkpoint, found, model)
    except ImportError as error:
        raise CheckpointError(f"{checkpoint.source}: comparing needs its own library: {error}") from error
    except CheckpointError:
        raise
    except Exception as error:  # each has errors of its own for a configuration that it does not know
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{checkpoint.source}: its own library cannot load it: {reason}") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = model.img_size if isinstance(model, ViT) else (224, 224)
    x = torch.randn(batch, model.in_chans, *size, generator=torch.Generator().manual_seed(seed))
    peer, model = _Output(peer).to(device, dtype).eval(), model.to(device, dtype)
    x = x.to(device, dtype)
    with torch.no_grad():
        expected, exact = peer(x), truth_model(peer)(x.double())
        theirs = measure_parity(expected, expected, exact, name=library)
        ours = measure_parity(model(x), expected, exact, name="fastvr")
    return Verdict(library, found.layout, model, theirs, ours)


class _Output(nn.Module):
    """The tensor that ours gives, of what a library's model returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.inner(x)
        if isinstance(made, torch.Tensor):
            return made
        for name in ("logits", "image_embeds"):
            if name in made:
                result: torch.Tensor = made[name]
                return result
        # a ViT's pooler is of no use to its classifier; that of CLIP and SigLIP gives the tower's result
        model_type = self.inner.config.model_type  # type: ignore[union-attr]
        tower = model_type in transformers_clip.MODEL_TYPES
        pooled: torch.Tensor = made.pooler_output if tower else made.last_hidden_state[:, 0]
        # SigLIP's without its pooling gives every token
        return made.last_hidden_state if pooled is None else pooled


def _peer(checkpoint: Checkpoint, found: Recognised, model: Model) -> tuple[str, nn.Module]:
    makers: dict[str, Callable[[Checkpoint, Model], tuple[str, nn.Module]]] = {
        "timm": _timm,
        "torchvision": _torchvision,
        "transformers": _transformers,
        "encoder": _encoder,
    }
    with torch.random.fork_rng(devices=[]):
        return makers[found.layout](checkpoint, model)


def _timm(checkpoint: Checkpoint, model: Model) -> tuple[str, nn.Module]:
    import timm.layers.mlp
    import timm.models.deit
    import timm.models.resnet
    import timm.models.vision_transformer

    config = checkpoint.config or {}
    peer: nn.Module
    if "architecture" in config:
        arguments = dict(config.get("model_args") or {})
        peer = timm.create_model(config["architecture"], num_classes=model.num_classes, **arguments)
    else:
        arguments = {"num_classes": model.num_classes, **configs.timm_arguments(model, describe(model))}
        if isinstance(model, ResNet):
            bottleneck = "layer1.0.conv3.weight" in checkpoint.state
            block: Any = timm.models.resnet.Bottleneck if bottleneck else timm.models.resnet.BasicBlock
            peer = timm.models.resnet.ResNet(block, in_chans=model.in_chans, **arguments)
        else:
            kind: Any = timm.models.vision_transformer.VisionTransformer
            if "dist_token" in checkpoint.state:
                kind = timm.models.deit.VisionTransformerDistilled
            if describe(model)["act"] == "swiglu":
                arguments |= {"mlp_layer": timm.layers.mlp.SwiGLUPacked, "act_layer": nn.SiLU}
            norm_layer = functools.partial(nn.LayerNorm, eps=describe(model)["norm_eps"])
            peer = kind(norm_layer=norm_layer, **arguments)
    state = checkpoint.state
    if any(key == "mask_token" or key.endswith((".gamma_1", ".gamma_2")) for key in state):
        # DINOv2's and DeiT-III's own files, which timm reads by this; it takes entries out of its argument
        read: Any = timm.models.vision_transformer.checkpoint_filter_fn
        state = read(dict(state), peer, adapt_layer_scale=True)
    peer.load_state_dict(state)
    return "timm", peer


def _torchvision(checkpoint: Checkpoint, model: Model) -> tuple[str, nn.Module]:
    import torchvision

    assert isinstance(model, ViT)
    peer = torchvision.models.VisionTransformer(
        model.img_size[0],
        model.patch_size[0],
        len(list(model.blocks.children())),
        describe(model)["num_heads"],
        model.embed_dim,
        model.state_dict()["blocks.0.mlp.fc1.weight"].shape[0],
        num_classes=model.num_classes,
    )
    peer.load_state_dict(checkpoint.state)
    return "torchvision", peer


def _transformers(checkpoint: Checkpoint, model: Model) -> tuple[str, nn.Module]:
    import transformers
    from safetensors.torch import save_file

    config = checkpoint.config
    if config is None or "model_type" not in config:
        if isinstance(model, ViT) and transformers_clip.holds(model):
            config = transformers_clip.config(model, describe(model))
        elif isinstance(model, ViT):
            config = configs.transformers_vit(model, describe(model))
        else:
            assert isinstance(model, ResNet)
            config = configs.transformers_resnet(model)
    name = (config.get("architectures") or [_architecture(config["model_type"], checkpoint.state)])[0]
    if name not in _ARCHITECTURES:
        raise CheckpointError(
            f"{checkpoint.source}: config.json: architectures must name a known model; got {name!r}"
        )
    state, kind = checkpoint.state, _ARCHITECTURES[name]
    if kind != name:
        # the tower alone, with what its configuration has one level higher
        projected = {key: config[key] for key in ("projection_dim",) if key in config}
        config = {**config["vision_config"], **projected}
        state = {key: tensor for key, tensor in state.items() if not transformers_clip.unused(key)}
    # from a folder, since its names in memory and on disk differ
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(
            {key: tensor.contiguous() for key, tensor in state.items()},
            Path(folder) / "model.safetensors",
            metadata={"format": "pt"},
        )
        peer: nn.Module = getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    return "transformers", peer


def _architecture(model_type: str, keys: Collection[str]) -> str:
    """transformers' class for weights whose configuration names none."""
    if "distillation_classifier.weight" in keys:
        task = "ForImageClassificationWithTeacher"
    elif "classifier.weight" in keys or "classifier.1.weight" in keys:
        task = "ForImageClassification"
    else:
        projected = model_type == "clip_vision_model" and "visual_projection.weight" in keys
        task = "ModelWithProjection" if projected else "Model"
    return _PREFIXES.get(model_type, model_type) + task


def _encoder(checkpoint: Checkpoint, model: Model) -> tuple[str, nn.Module]:
    assert isinstance(model, ViT)
    peer = _EncoderViT(model, describe(model))
    peer.load_state_dict(checkpoint.state)
    return "torch.nn", peer


class _EncoderViT(nn.Module):
    """The layout's own model, with attention over the tokens."""

    def __init__(self, model: ViT, described: dict[str, Any]) -> None:
        super().__init__()
        width = model.embed_dim
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(
            model.in_chans, width, kernel_size=model.patch_size, stride=model.patch_size
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(model.pos_embed.shape))
        layer = nn.TransformerEncoderLayer(
            width,
            described["num_heads"],
            model.state_dict()["blocks.0.mlp.fc1.weight"].shape[0],
            batch_first=True,
        )
        depth = len(list(model.blocks.children()))
        self.transformer_encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, model.num_classes) if model.num_classes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)  # type: ignore[operator]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        logits: torch.Tensor = self.head(self.norm(self.transformer_encoder(x))[:, 0])
        return logits
