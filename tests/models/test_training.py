"""Gradients, batch statistics, dropout: training beside timm's ViT and torchvision's ResNet."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import fastvr
from fastvr.backend import observe
from fastvr.models.resnet import ResNet
from fastvr.nn import residual
from fastvr.nn.block import Block, DropPath
from fastvr.testing import assert_parity, truth_model


def gradients(model: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter, and of the images."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).backward(upstream.to(x.dtype))
    found = {name: p.grad for name, p in model.named_parameters()}
    assert None not in found.values()
    return {**found, "x": x.grad}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, backend: str) -> None:
    """What is drawn is drawn from the same seed."""
    truth = truth_model(theirs)
    upstream = torch.randn(theirs.eval()(x).shape)
    for model in (ours, theirs, truth):
        model.train()
    found, after = [], []
    for model, how in ((ours, backend), (theirs, "reference"), (truth, "reference")):
        torch.manual_seed(11)
        with fastvr.use_backend(how):
            found.append(gradients(model, x.double() if model is truth else x, upstream))
        after.append(torch.rand(1))
    assert after[0] == after[1] == after[2]
    assert_parity(*found, kind="gradient", sample_dim=None)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    "variant",
    [
        {"depth": 1},
        {"depth": 1, "init_values": 0.1, "reg_tokens": 4, "no_embed_class": True},
        {"depth": 1, "global_pool": "avg"},
        {"drop_path_rate": 0.5, "global_pool": "avg"},
        {"drop_path_rate": 0.5, "init_values": 0.1},
    ],
    ids=["plain", "layerscale-registers", "avg", "drop path", "drop path, class token alone"],
)
def test_vit_gradients_are_timms(variant, backend, tiny_vit, tiny_timm, images, device) -> None:
    theirs, ours = tiny_timm(**variant).to(device), tiny_vit(**variant).to(device)
    ours.load_state_dict(theirs.state_dict())
    assert_same_gradients(ours, theirs, images(4).to(device), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_drop_path_draws_what_timms_draws(dtype) -> None:
    from timm.layers import DropPath as Timms

    x, kept = torch.ones(64, 2, 3, dtype=dtype), []
    for rate in (0.1, 0.7, 1.0):
        for module in (DropPath(rate).train(), Timms(rate).train()):
            torch.manual_seed(2)
            kept.append((module(x), torch.rand(1)))
        (ours, ours_after), (theirs, theirs_after) = kept[-2:]
        assert torch.equal(ours, theirs)
        assert torch.equal(ours_after, theirs_after)


def test_training_with_drops_compiles(device) -> None:
    block = Block(64, 2, mlp_ratio=1, drop_path=0.5, attn_drop=0.3, proj_drop=0.2).to(device)
    x = torch.randn(3, 5, 64, device=device)
    upstream, found = torch.randn(3, 5, 64, device=device), []
    with fastvr.use_backend("triton"):
        for model in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(3)
            found.append(gradients(model, x, upstream))
    assert all(torch.equal(*pair) for pair in zip(*map(dict.values, found), strict=True))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnet_gradients_and_statistics_are_torchvisions(block, randomise, images) -> None:
    kind, ours_kind = {
        "basic": (BasicBlock, residual.BasicBlock),
        "bottleneck": (Bottleneck, residual.Bottleneck),
    }[block]
    # in our layout: PyTorch's convolutions round differently in the other one
    theirs = randomise(torchvision.models.ResNet(kind, [1, 1, 1, 1], num_classes=10))
    theirs = theirs.to(memory_format=torch.channels_last)
    ours = ResNet(ours_kind, (1, 1, 1, 1), num_classes=10)
    ours.load_state_dict(theirs.state_dict())
    truth = truth_model(theirs)
    assert_same_gradients(ours, theirs, images(4, size=64), "reference")
    truth.train()(images(4, size=64).double())
    statistics = [
        {name: tensor for name, tensor in model.state_dict().items() if "running" in name}
        for model in (ours, theirs, truth)
    ]
    assert_parity(*statistics, sample_dim=None)
    counts = {int(t) for name, t in ours.state_dict().items() if "num_batches_tracked" in name}
    assert counts == {1}


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnet_gradients_through_kernels(block, tiny_resnet, images, device) -> None:
    ours, twin = tiny_resnet(block).to(device), tiny_resnet(block).to(device)
    assert_same_gradients(ours, twin, images(4).to(device), "triton")


def test_frozen_batch_norm_in_training(tiny_resnet, images) -> None:
    """A frozen BatchNorm normalises by its running statistics, and its gradients flow."""
    ours, theirs = tiny_resnet(), tiny_resnet()
    for model in (ours, theirs):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    before = copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        expected = theirs.eval()(images())
    assert torch.equal(ours(images()), expected)
    ours(images()).square().mean().backward()
    assert all(p.grad is not None for p in ours.parameters())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("affine", [True, False], ids=["trained", "constant"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_frozen_batch_norm_through_kernels(block, affine, tiny_resnet, images, device) -> None:
    """By statistics that stay, with and without BatchNorm's own parameters: no convolution is made twice."""
    pytest.importorskip("triton")
    ours, found = tiny_resnet(block).to(device), []
    norms = [module for module in ours.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.requires_grad_(affine)
    eager, truth = copy.deepcopy(ours), truth_model(ours)
    x, upstream = images(2).to(device), torch.randn(2, 10, device=device)
    for model, mode in ((ours, "triton"), (eager, "reference"), (truth, "reference")):
        with fastvr.use_backend(mode), observe() as ran:
            model(x.to(model.fc.weight.dtype)).backward(upstream.to(model.fc.weight.dtype))
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        if model is ours:
            assert {how for _, how in ran} == {"triton"}
            for op in ("conv_bn_relu", "conv_bn_relu_backward"):
                assert ran[op, "triton"] == len(norms)
            for op in ("batch_norm_act", "batch_norm_act_backward"):
                assert ran[op, "triton"] == affine * len(norms)
    assert_parity(*found, kind="gradient", sample_dim=None)


def test_only_what_is_asked_for_gets_a_gradient(tiny, images, device) -> None:
    for kind in ("vit", "bottleneck"):
        model = tiny(kind).to(device).requires_grad_(False)
        model.get_classifier().requires_grad_(True)
        with fastvr.use_backend("triton"):
            model(images().to(device)).square().mean().backward()
        got = {name for name, p in model.named_parameters() if p.grad is not None}
        assert got == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["vit", "basic", "bottleneck"])
def test_eval_train_eval(kind, tiny, images) -> None:
    model, x = tiny(kind), images()
    with torch.no_grad():
        before = model(x)
        state = copy.deepcopy(model.state_dict())
        model.train()(x)
        model.load_state_dict(state)
        assert torch.equal(model.eval()(x), before)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(x).square().mean().backward()
    optimizer.step()
    fresh = tiny(kind)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), fresh(x))
        assert not torch.equal(model(x), before)


RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


@pytest.mark.parametrize("rate", RATES)
def test_dropout_is_on_in_training_and_off_in_eval(rate, tiny_vit, images) -> None:
    plain, dropping, x = tiny_vit(init_values=0.5), tiny_vit(init_values=0.5, **{rate: 0.5}), images()
    dropping.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(dropping(x), plain(x))
        dropping.train()
        torch.manual_seed(0)
        first, second = dropping(x), dropping(x)
        torch.manual_seed(0)
        assert torch.equal(dropping(x), first)
    assert not torch.equal(first, second)
    dropping(x).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in dropping.parameters())


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("norm_first", [True, False])
def test_dropout_of_everything_or_nothing(rate, norm_first, tiny_vit, images) -> None:
    """What remains where a rate is almost 0 is the model; where it is 1, the model without that part."""
    model, x = tiny_vit(norm_first=norm_first, depth=1, **{rate: 1e-300}), images()
    exact = truth_model(model)
    with torch.no_grad():
        eager = model(x)
        assert_parity(model.train()(x), eager, exact(x.double()))
        for module in model.modules():
            if rate == "drop_path_rate" and isinstance(module, DropPath):
                module.drop_prob = 1.0
            elif isinstance(module, nn.Dropout) and module.p > 0:
                module.p = 1.0
        gone = model(x)
    assert torch.isfinite(gone).all()
    assert not torch.equal(gone, eager) or rate == "drop_path_rate"  # depth 1 has rate 0


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    drop = DropPath(0.25).train()
    y = drop(torch.ones(4000, 3, 2))
    assert {round(v, 4) for v in y.unique().tolist()} == {0.0, round(1 / 0.75, 4)}
    assert (y == y[:, :1, :1]).all()
    # 5 standard errors of the mean of 4,000 draws
    assert abs(float(y[:, 0, 0].mean()) - 1) < 5 * math.sqrt(0.25 / 0.75 / 4000)


def test_autocast_is_eagers(tiny, tiny_timm, images, device) -> None:
    theirs, ours, x = tiny_timm().to(device), tiny("vit").to(device), images().to(device)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        actual, eager = ours(x), theirs(x)
        assert actual.dtype == eager.dtype == torch.bfloat16
        with fastvr.use_backend("triton"):
            kernels = ours(x)
    with torch.no_grad():
        exact = truth_model(theirs)(x.double())
    assert_parity(actual, eager, exact)
    assert_parity(kernels, eager, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["vit", "basic", "bottleneck"])
def test_gradients_under_autocast_with_a_scaler(kind, dtype, tiny_vit, tiny_resnet, images, device) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return (tiny_vit(depth=2) if kind == "vit" else tiny_resnet(kind)).to(device).train()

    def step(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
        optimizer = torch.optim.SGD(model.parameters())
        with torch.autocast(device.type, dtype):
            y = model(images)
        scaler.scale((y * upstream.to(torch.promote_types(y.dtype, torch.float32))).sum()).backward()
        scaler.unscale_(optimizer)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        return {name: p.grad for name, p in model.named_parameters()}

    ours, theirs = make(), make()
    truth = truth_model(theirs)
    x = images(4, size=64).to(device) if kind != "vit" else images(3).to(device)
    upstream = torch.randn(len(x), ours(x).shape[1], device=device)
    with fastvr.use_backend("triton"):
        actual = step(ours, x)
    with fastvr.use_backend("reference"):
        eager, exact = step(theirs, x), step(truth, x.double())
    assert_parity(actual, eager, exact, kind="gradient", sample_dim=None)
