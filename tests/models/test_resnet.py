"""ResNet beside torchvision's: keys, logits, features, methods."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.resnet import Bottleneck as TheirBottleneck

import fastvr
from fastvr import backend
from fastvr.models.resnet import PRESETS, ResNet
from fastvr.nn.residual import Bottleneck
from fastvr.testing import assert_parity, truth_model


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_torchvisions_keys_in_order(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = fastvr.create_model(name), getattr(torchvision.models, name)()
    expected = [(key, tensor.shape) for key, tensor in theirs.state_dict().items()]
    assert [(key, tensor.shape) for key, tensor in ours.state_dict().items()] == expected


@pytest.mark.parametrize(("name", "block"), [("resnet18", BasicBlock), ("resnet50", TheirBottleneck)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_logits_and_features_are_torchvisions(name, block, layout, randomise, images) -> None:
    theirs = randomise(getattr(torchvision.models, name)(num_classes=10)).eval()
    ours = fastvr.create_model(name, num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    # as ours lies: on a CPU PyTorch's error is another in each layout
    theirs = theirs.to(memory_format=torch.channels_last)
    x = images(2, size=48).contiguous(memory_format=layout)
    body = nn.Sequential(*list(theirs.children())[:-2])
    with torch.no_grad():
        assert_parity(ours(x), theirs(x), truth_model(theirs)(x.double()))
        features = ours.forward_features(x)
        assert_parity(features, body(x), truth_model(body)(x.double()), name="features")
        pooled = theirs.avgpool(features).flatten(1)
        torch.testing.assert_close(ours.forward_head(features, pre_logits=True), pooled, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_kernels_give_the_references_logits(block, dtype, tiny_resnet, images, device) -> None:
    model = tiny_resnet(block).to(device, dtype)
    x = images(2).to(device, dtype)
    with torch.no_grad():
        with fastvr.use_backend("reference"):
            eager, truth = model(x), truth_model(model)(x.double())
        with fastvr.use_backend("triton"), backend.observe() as ran:
            assert_parity(model(x), eager, truth)
    assert {implementation for _, implementation in ran} == {"triton"}


def test_convolutions_lie_in_channels_last(tiny_resnet) -> None:
    model = tiny_resnet()
    moved = model.double()
    moved.load_state_dict({name: t.contiguous() for name, t in model.state_dict().items()})
    for module in moved.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            # of 1x1 weights both are true, and PyTorch goes by the strides
            expected = torch.empty_like(module.weight, memory_format=torch.channels_last)
            assert module.weight.stride() == expected.stride()


def test_initial_weights_are_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    ours, theirs = fastvr.ResNet18(), torchvision.models.resnet18()
    for (name, mine), yours in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if "num_batches_tracked" in name:
            continue
        slack = 5 * float(yours.std()) / (2 * yours.numel()) ** 0.5 * 2**0.5
        assert abs(float(mine.std() - yours.std())) <= slack, name
        assert abs(float(mine.mean() - yours.mean())) <= 2 * slack, name


def test_zero_init_residual_starts_as_identity() -> None:
    model = fastvr.ResNet50(num_classes=2, zero_init_residual=True)
    blocks = [module for module in model.modules() if isinstance(module, fastvr.nn.residual.Bottleneck)]
    assert len(blocks) == 16
    assert all(not block.bn3.weight.any() for block in blocks)
    assert all(block.bn2.weight.all() for block in blocks)


def test_reset_classifier(tiny_resnet, images) -> None:
    model = tiny_resnet()
    assert model.get_classifier() is model.fc
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images()).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, model.num_features, 1, 1)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(5, "")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"num_classes": -1}, "num_classes"),
        ({"in_chans": 0}, "in_chans"),
        ({"width": 0}, "width"),
        ({"global_pool": "max"}, "global_pool"),
        ({"global_pool": ""}, "global_pool"),
    ],
    ids=str,
)
def test_wrong_configurations_are_named(overrides, named, tiny_resnet) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_resnet(**overrides)


@pytest.mark.parametrize(
    "replace",
    [
        lambda m: setattr(m.layer1[0], "bn1", nn.GroupNorm(2, 8)),
        lambda m: setattr(m, "maxpool", nn.Identity()),
        lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)),
        lambda m: setattr(m.layer2[0], "relu", nn.SiLU()),
        lambda m: setattr(m.layer1[0], "downsample", nn.Conv2d(8, 32, 1)),
        lambda m: setattr(m.layer1[0].downsample, "0", nn.Conv2d(8, 32, 1)),
        lambda m: setattr(m.layer1[0].downsample, "1", nn.GroupNorm(2, 32)),
        lambda m: setattr(m.layer1[0], "conv3", nn.Conv2d(8, 32, 3, padding=1, bias=False)),
        lambda m: setattr(m.layer3[0], "conv2", nn.Conv2d(32, 32, 3, stride=2, padding=2, dilation=2)),
        lambda m: setattr(m.layer2[0], "conv2", nn.Conv2d(16, 16, 3, 2, 1, padding_mode="reflect")),
        lambda m: setattr(m.layer4[0], "conv1", nn.Conv2d(128, 64, 1)),
        lambda m: setattr(m, "fc", nn.Sequential(nn.Linear(256, 5), nn.ReLU())),
    ],
    ids=[
        "norm",
        "maxpool",
        "avgpool",
        "relu",
        "shortcut",
        "shortcut-bias",
        "shortcut-norm",
        "conv3",
        "dilation",
        "reflect",
        "bias",
        "fc",
    ],
)
def test_replaced_modules_are_called(replace, tiny_resnet, images) -> None:
    model = tiny_resnet()
    replace(model)
    model.eval()
    x = images()

    def one_by_one(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = block.relu(block.bn1(block.conv1(x)))
        y = block.bn3(block.conv3(block.relu(block.bn2(block.conv2(y)))))
        return block.relu(y + (x if block.downsample is None else block.downsample(x)))

    def plainly(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in stage:
                x = one_by_one(block, x)
        return model.fc(model.avgpool(x).flatten(1))

    with torch.no_grad():
        assert_parity(model(x), plainly(model, x), plainly(truth_model(model), x.double()))


@pytest.fixture
def staged(randomise):
    """Two stages whose bottlenecks are as wide as the kernel takes them."""
    torch.manual_seed(0)
    model = ResNet(Bottleneck, (3, 2, 1, 1), num_classes=10, width=16)
    return randomise(model).eval()


def ran_in(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, int]]:
    with fastvr.use_backend("triton"), backend.observe() as ran:
        y = model(x)
    assert {implementation for _, implementation in ran} == {"triton"}
    return y, {op: n for (op, _), n in ran.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_computes_the_next_ones_first_convolution(dtype, staged, images, device) -> None:
    model, x = staged.to(device, dtype), images(2).to(device, dtype)
    with torch.no_grad():
        y, ran = ran_in(model, x)
        with fastvr.use_backend("reference"):
            assert_parity(y, model(x), truth_model(model)(x.double()))
    assert (ran["bottleneck_chain"], ran["bottleneck"]) == (3, 4)
    # each stage's first block's first
    assert ran["conv_bn_relu"] == 4


def test_convolutions_stand_alone_where_gradients_are_wanted(staged, images, device) -> None:
    """Each keeps what its gradient reads: a fused block would compute its forward pass again."""
    _, ran = ran_in(staged.to(device), images(2).to(device))
    assert not {"bottleneck", "bottleneck_chain", "dual_conv_bn_relu", "conv_bn_relu_max_pool"} & set(ran)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in staged.modules())
    assert ran["conv_bn_relu"] == ran["batch_norm_act"] == norms


@pytest.mark.parametrize(
    ("observed", "chains", "blocks"),
    [
        ("layer1", 1, 6),
        ("layer1.1", 1, 6),
        ("layer1.1.conv1", 2, 5),
        ("layer1.1.relu", 1, 5),
        ("layer1.1.conv3", 2, 4),
        # its result is a residual like any other
        ("layer1.0.downsample.1", 3, 4),
    ],
)
def test_what_somebody_observes_is_called(observed, chains, blocks, staged, images, device) -> None:
    model, x, seen = staged.to(device), images(2).to(device), []
    with torch.no_grad():
        with fastvr.use_backend("reference"):
            eager, truth = model(x), truth_model(model)(x.double())
        model.get_submodule(observed).register_forward_hook(lambda _, args, y: seen.append(y))
        y, ran = ran_in(model, x)
    assert_parity(y, eager, truth)
    assert len(seen) == (3 if "relu" in observed else 1)
    assert (ran["bottleneck_chain"], ran["bottleneck"]) == (chains, blocks)
