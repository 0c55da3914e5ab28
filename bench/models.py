"""ViTs and ResNet-50 (small ones for a CPU) as people use them now, and as fastvr has them.

The eager baseline is timm's ViT and torchvision's ResNet with the same weights; where those are not installed
it is our model on the reference backend, which is PyTorch call for call.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of ours, and the same function in PyTorch (``baseline`` names whose)."""

    name: str
    ours: Any  # a ViT or ResNet
    eager: nn.Module
    baseline: str
    image: int

    def example(self, batch: int, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> Tensor:
        """Random images; channels_last for ResNet, on both sides."""
        shape = (batch, 3, self.image, self.image)
        if device.type == "meta":
            x = torch.empty(shape, dtype=dtype, device=device)
        else:
            generator = torch.Generator(device).manual_seed(seed)
            x = torch.randn(shape, generator=generator, device=device).to(dtype)
        return x.to(memory_format=torch.channels_last) if self.name == "resnet50" else x


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


_VITS: dict[str, dict[str, Any]] = {
    "vit_s_16": {"embed_dim": 384, "num_heads": 6},
    "vit_b_16": {},
    "vit_l_16": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def _vit_sizes(name: str, small: bool) -> dict[str, Any]:
    if small:
        return {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 96,
            "depth": 2,
            "num_heads": 3,
            "num_classes": 10,
        }
    return _VITS[name]


def _ours(name: str, small: bool, train: bool) -> nn.Module:
    import fastvr

    if name in _VITS:
        return fastvr.ViT(**_vit_sizes(name, small))
    if small and train:
        # ResNet-50's blocks, shallow and narrow: the interpreter runs them backward too
        return fastvr.ResNet(fastvr.nn.residual.Bottleneck, (1, 1, 1, 1), num_classes=10, width=8)
    return fastvr.ResNet18(num_classes=10) if small else fastvr.ResNet50()


def _peer(name: str, small: bool, train: bool) -> tuple[nn.Module | None, str]:
    if name in _VITS and _installed("timm"):
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(**_vit_sizes(name, small)), "timm"
    # torchvision's begin with 64 channels, whatever follows
    if name == "resnet50" and _installed("torchvision") and not (small and train):
        from torchvision.models import resnet18, resnet50

        return (resnet18(num_classes=10) if small else resnet50()), "torchvision"
    return None, "fastvr on the reference backend"


def _randomise(model: nn.Module) -> None:
    """Running statistics and biases as a trained model has them: none is zero or one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight, mean=1.0, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.02)


def _damp(model: nn.Module) -> None:
    """What a block adds is small beside its shortcut, as after training (or by zero initialisation, Goyal et
    al., 2017): from blocks as large as their shortcuts a deep ResNet's gradients are rounding errors only."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bn3.weight"):
            nn.init.normal_(parameter, mean=0.2, std=0.05)


def build(
    name: str, dtype: torch.dtype, device: torch.device | str, *, small: bool = False, train: bool = False
) -> Pair:
    """Both models of ``name``, eval mode, the same random weights; on meta only their shapes. ``train`` where
    gradients are wanted: a small ResNet is then smaller still, and every one better conditioned."""
    device = torch.device(device)
    torch.manual_seed(0)
    if device.type == "meta":
        with device:
            ours, (peer, baseline) = _ours(name, small, train), _peer(name, small, train)
    else:
        ours, (peer, baseline) = _ours(name, small, train), _peer(name, small, train)
        _randomise(ours)
        if train:
            _damp(ours)
        if peer is not None:
            peer.load_state_dict(ours.state_dict())

    def placed(model: nn.Module) -> nn.Module:
        layout = torch.channels_last if name == "resnet50" else torch.preserve_format
        return model.to(device, dtype).to(memory_format=layout).eval()

    ours = placed(ours)
    eager = ours if peer is None else placed(peer)
    # from a single pixel of a few images BatchNorm's gradients are chance in 16 bits
    image = 64 if train and name == "resnet50" else 32
    return Pair(name, ours, eager, baseline, image if small else 224)


def truth(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    """(eager's result in the model's dtype, the result of the same weights in float64)."""
    import copy

    from fastvr import use_backend

    with torch.no_grad(), use_backend("reference"):
        return pair.eager(x), copy.deepcopy(pair.eager).double()(x.double())


def cost(pair: Pair, x: Tensor, *, arch: str = "sm_90") -> tuple[int, int] | None:
    """(FLOPs, bytes) of one forward pass of ours, from its launches; None where Triton is not installed."""
    from fastvr.compare.traffic import count, flops

    traffic = count(pair.ours, x, arch=arch)
    return None if traffic is None else (flops(pair.ours, x), traffic.bytes)


def call(model: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: model(x)
