"""timm's and torchvision's ResNets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastvr
from fastvr import backend
from fastvr.compare.traffic import count, eager_traffic
from fastvr.testing import assert_parity, truth_model

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def _torchvision(kind: str = "Bottleneck", **overrides: Any) -> nn.Module:
    from torchvision.models import resnet

    torch.manual_seed(0)
    return resnet.ResNet(getattr(resnet, kind), [1, 2, 1, 1], num_classes=10, **overrides)


def _timm(kind: str = "Bottleneck", **overrides: Any) -> nn.Module:
    from timm.models import resnet

    torch.manual_seed(0)
    sizes = {"channels": (8, 16, 16, 16), "num_classes": 10}
    return resnet.ResNet(getattr(resnet, kind), (1, 1, 1, 1), **{**sizes, **overrides})


@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("make", [_timm, _torchvision], ids=["timm", "torchvision"])
def test_parity_and_ops(make, kind, hold, images) -> None:
    report, ran = hold(make(kind), images)
    assert ran["conv_bn_relu_max_pool", "reference"] == 1
    assert ran["avg_pool_linear", "reference"] == (make is _torchvision)
    blocks, convolutions = (4 if make is _timm else 5), (2 if kind == "BasicBlock" else 3)
    shortcuts = 3 if make is _torchvision and kind == "BasicBlock" else 4
    assert ran["conv_bn_relu", "reference"] == blocks * convolutions + shortcuts
    assert len(report.notes) == 1
    assert "channels_last" in report.notes[0]


@pytest.mark.parametrize("make", [_timm, _torchvision], ids=["timm", "torchvision"])
def test_kernels(make, hold, images) -> None:
    # the wide last stages add minutes in the interpreter, and nothing else
    model = make("BasicBlock")
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(8 if make is _timm else 64, 10)
    _, ran = hold(model, images[:1], mode="triton")
    assert {implementation for _, implementation in ran} == {"triton"}
    assert ran["conv_bn_relu_max_pool", "triton"] == 1


@pytest.mark.parametrize(("library", "launches"), [("timm", 39), ("torchvision", 38)])
def test_traffic(library, launches) -> None:
    """As many launches as fastvr's own ResNet-50 makes, and as few bytes; timm's head stays PyTorch's."""
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    with torch.device("meta"):
        model = make("resnet50").to(torch.bfloat16).eval().to(memory_format=torch.channels_last)
        x = torch.empty(64, 3, 224, 224, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    eager = eager_traffic(model, x)
    fastvr.accelerate(model)
    traffic = count(model, x)
    assert traffic is not None
    assert (eager.launches, traffic.launches) == (174, launches)
    assert traffic.bytes < 0.24 * eager.bytes


@pytest.mark.parametrize(
    "overrides",
    [
        {"cardinality": 2, "base_width": 64},
        {"base_width": 128},
        {"stem_type": "deep", "stem_width": 8, "avg_down": True},
        {"block_args": {"attn_layer": "se"}},
        {"block_args": {"attn_layer": "eca"}, "act_layer": nn.SiLU},
        {"aa_layer": timm.layers.BlurPool2d},
        {"output_stride": 8},
        {"drop_path_rate": 0.2, "drop_block_rate": 0.2},
        {"replace_stem_pool": True},
        {"norm_layer": timm.layers.GroupNorm1},
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_timm_configurations(overrides, hold, images) -> None:
    _, ran = hold(_timm(**overrides), images)
    assert ran["conv_bn_relu", "reference"] >= 12


@pytest.mark.parametrize(
    "overrides",
    [
        {"groups": 2, "width_per_group": 64},
        {"width_per_group": 128},
        {"replace_stride_with_dilation": [False, True, True]},
        {"norm_layer": torchvision.ops.FrozenBatchNorm2d},
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_torchvision_configurations(overrides, hold, images) -> None:
    _, ran = hold(_torchvision(**overrides), images)
    assert ran["conv_bn_relu", "reference"] >= 10


@pytest.mark.parametrize("make", [_timm, _torchvision], ids=["timm", "torchvision"])
def test_gradients(make, hold_gradients) -> None:
    """By the batch's own statistics. In channels_last, where PyTorch's convolutions are the reference's:
    other rounding would turn other ReLUs on, and each of those is a gradient more or less."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    images = images.to(memory_format=torch.channels_last)
    ran = hold_gradients(make("BasicBlock").to(memory_format=torch.channels_last), images)
    assert ran["conv_bn_relu", "reference"] >= 12


def test_running_statistics_move_as_before() -> None:
    layout, images = torch.channels_last, torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    eager, model = (_torchvision("BasicBlock").train().to(memory_format=layout) for _ in range(2))
    truth = truth_model(eager)
    fastvr.accelerate(model)
    with torch.no_grad(), fastvr.use_backend("reference"):
        model(images)
        eager(images)
        truth(images.double())
    buffers = [dict(each.named_buffers()) for each in (model, eager, truth)]
    assert_parity(*buffers, sample_dim=None)


def test_running_statistics_of_a_checkpointed_model_move_as_before() -> None:
    """With timm's checkpointing twice, the second time where a block is made again for its gradient."""
    layout, images = torch.channels_last, torch.randn(3, 3, 32, 32).to(memory_format=torch.channels_last)
    eager, model = (_timm("BasicBlock", channels=(8, 8, 8, 8)).train().to(memory_format=layout) for _ in "ab")
    truth = truth_model(eager)
    fastvr.accelerate(model)
    for each, mode in ((model, "triton"), (eager, "reference"), (truth, "reference")):
        each.set_grad_checkpointing()
        with fastvr.use_backend(mode), backend.observe() as ran:
            each(images.to(next(each.parameters()).dtype)).square().sum().backward()
        assert ran["residual_block", "triton"] == (8 if each is model else 0)
    buffers = [dict(each.named_buffers()) for each in (model, eager, truth)]
    assert model.layer1[0].bn1.num_batches_tracked == 2
    assert_parity(*buffers, sample_dim=None)


def test_segmentation_by_parts(hold, images) -> None:
    """Its backbone's children are called one by one, from a dilated ResNet."""
    from torchvision.models.segmentation import fcn_resnet50

    torch.manual_seed(0)
    model = fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)
    # as the ops write: on a CPU PyTorch's error is another in each layout
    model = model.to(memory_format=torch.channels_last)
    report, ran = hold(model, images[:1], get=lambda output: output["out"])
    assert report.counts["torchvision Bottleneck"] == 16
    assert ran["conv_bn_relu", "reference"] > 40


def test_features_out_of_timm(images) -> None:
    eager = timm.create_model("resnet18", pretrained=False, features_only=True).eval()
    model = timm.create_model("resnet18", pretrained=False, features_only=True).eval()
    model.load_state_dict(eager.state_dict())
    report = fastvr.accelerate(model)
    assert report.counts["timm BasicBlock"] == 8
    with torch.no_grad(), fastvr.use_backend("reference"):
        assert_parity(model(images), eager(images), truth_model(eager)(images.double()))
