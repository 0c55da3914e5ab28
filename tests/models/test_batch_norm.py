"""BatchNorm in training: the op in the place of the modules, beside the modules themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastvr
from fastvr import backend
from fastvr.nn.conv_bn_relu import conv_bn_relu
from fastvr.nn.residual import BasicBlock, conv1x1
from fastvr.ops.batch_norm_act import fuses_batch_norm_act
from fastvr.testing import assert_parity, truth_model

pytest.importorskip("triton")


class Layer(nn.Module):
    """A convolution with what follows it."""

    def __init__(self, channels: int = 6, **options: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(channels, **options)
        self.relu: nn.Module = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return conv_bn_relu(self.conv, self.bn, self.relu, x)


def moving(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if "running" in name}


def counts(model: nn.Module) -> list[int]:
    return [int(t) for name, t in model.state_dict().items() if "num_batches_tracked" in name]


def step(model: nn.Module, x: torch.Tensor, mode: str) -> dict[str, torch.Tensor]:
    """Every parameter's gradient of one step of training, taken."""
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with fastvr.use_backend(mode):
        y = model(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y))
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return found


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_three_steps_of_training(block, tiny_resnet, images, device) -> None:
    ours = tiny_resnet(block).to(device).train()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    for seed in range(3):
        x = images(4, seed=seed).to(device)
        # from the weights and statistics that ours has reached
        eager, truth = copy.deepcopy(ours), truth_model(ours)
        with backend.observe() as ran:
            actual = step(ours, x, "triton")
        # four blocks are one op each, whose gradient has that of what lies between convolutions
        for op in ("batch_norm_act_max_pool", "batch_norm_act_max_pool_backward"):
            assert ran[op, "triton"] == 1
        assert ran["residual_block", "triton"] == ran["residual_block_backward", "triton"] == 4
        assert ran["batch_norm_act_backward", "triton"] == 4 * {"basic": 1, "bottleneck": 2}[block]
        gradients = step(eager, x, "reference"), step(truth, x.double(), "reference")
        assert_parity(actual, *gradients, kind="gradient", sample_dim=None)
        assert_parity(moving(ours), moving(eager), moving(truth), sample_dim=None)
        assert counts(ours) == counts(eager) == [seed + 1] * norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.7}, {"track_running_stats": False}, {"eps": 0.3}],
    ids=str,
)
def test_statistics_move_as_pytorchs(options, training, dtype, device) -> None:
    ours = Layer(**options).to(device, dtype).train(training)
    theirs = copy.deepcopy(ours)
    truth = truth_model(ours)
    kept = {name: id(t) for name, t in ours.named_buffers()}
    for _ in range(3):
        x = torch.randn(2, 3, 9, 8).to(device, dtype)
        with backend.observe() as ran, fastvr.use_backend("triton"):
            y = ours(x)
        # in eval too: its weight is trained
        assert ran["batch_norm_act", "triton"] == 1
        with fastvr.use_backend("reference"):
            assert_parity(y, theirs(x), truth(x.double()))
    assert_parity(moving(ours), moving(theirs), moving(truth), sample_dim=None)
    assert counts(ours) == counts(theirs)
    # in place: others hold on to them
    assert {name: id(t) for name, t in ours.named_buffers()} == kept


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "bn", nn.BatchNorm2d(6, affine=False)),
        lambda layer: setattr(layer, "bn", nn.SyncBatchNorm(6)),
        lambda layer: layer.bn.eval().requires_grad_(False),
        lambda layer: layer.bn.register_forward_hook(lambda *args: None),
        lambda layer: layer.relu.register_forward_hook(lambda *args: None),
        lambda layer: setattr(layer, "relu", nn.SiLU()),
        lambda layer: setattr(layer, "bn", nn.GroupNorm(2, 6)),
    ],
    ids=["affine", "sync", "frozen", "hook", "hook-relu", "silu", "group"],
)
def test_other_modules_are_called(change, device) -> None:
    layer = Layer()
    change(layer)
    layer.to(device)
    if isinstance(layer.bn, nn.SyncBatchNorm):
        layer.bn.eval()  # it trains on a GPU only
    with fastvr.use_backend("triton"), backend.observe() as ran:
        layer(torch.randn(2, 3, 7, 7, device=device)).sum().backward()
    assert "batch_norm_act" not in {op for op, _ in ran}


def test_pytorchs_modules_run_where_nothing_was_measured() -> None:
    """Without a table a GPU runs PyTorch's BatchNorm itself, and so does a CPU."""
    bn = nn.BatchNorm2d(6, device="meta")
    x = torch.empty(2, 6, 5, 5, device="meta")
    assert not fuses_batch_norm_act(x, bn, None, "relu")
    with backend.assume_architecture("sm_90"):
        assert not fuses_batch_norm_act(x, bn, None, "relu")
        with fastvr.use_backend("triton"):
            assert fuses_batch_norm_act(x, bn, None, "relu")
            assert not fuses_batch_norm_act(x.double(), bn, None, "relu")
            assert not fuses_batch_norm_act(x, bn, x[:1], "relu")


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_one_pixel_a_channel_is_refused(mode, device) -> None:
    layer = Layer().to(device)
    with fastvr.use_backend(mode), pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 3, 3, 3, device=device))


def test_an_empty_batch_moves_nothing_but_the_count(device) -> None:
    ours, theirs = Layer().to(device), Layer().to(device)
    x = torch.zeros(0, 3, 7, 7, device=device)
    with fastvr.use_backend("triton"):
        assert ours(x).shape == theirs.relu(theirs.bn(theirs.conv(x))).shape
    for name, statistic in moving(theirs).items():
        assert torch.equal(moving(ours)[name], statistic)
    assert counts(ours) == counts(theirs) == [1]


@pytest.fixture
def block(randomise) -> BasicBlock:
    torch.manual_seed(0)
    # with 4 channels PyTorch's backward pass of such a 1x1 convolution writes past its memory on a CPU
    shortcut = nn.Sequential(conv1x1(8, 16, 2), nn.BatchNorm2d(16))
    return randomise(BasicBlock(8, 16, 2, shortcut)).to(memory_format=torch.channels_last).train()


def test_evaluation_after_training_is_not_stale(block, device) -> None:
    model, x = block.to(device), torch.randn(2, 8, 6, 6).to(device)
    fresh = copy.deepcopy(model)
    with fastvr.use_backend("triton"):
        with torch.no_grad():
            before = model.eval()(x)
        step(model.train(), x, "triton")
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(model.eval()(x), fresh.eval()(x))
            assert not torch.equal(model(x), before)


def test_autocast_is_eagers(block, device) -> None:
    ours = block.to(device)
    eager, truth = copy.deepcopy(ours), truth_model(ours)
    # enough pixels that a few zeros of the ReLU more or less, by rounding, decide nothing
    x = torch.randn(8, 8, 24, 24).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        with backend.observe() as ran:
            actual = step(ours, x, "triton")
        assert ran["batch_norm_act", "triton"] == 3
        expected = step(eager, x, "reference")
    exact = step(truth, x.double(), "reference")
    assert_parity(actual, expected, exact, kind="gradient", sample_dim=None)
    assert_parity(moving(ours), moving(eager), moving(truth), sample_dim=None)


def test_a_step_compiles_into_one_graph(block, device) -> None:
    ours = block.to(device)
    compiled, truth = copy.deepcopy(ours), truth_model(ours)
    x = torch.randn(2, 8, 6, 6).to(device)
    plain = step(ours, x, "triton")
    found = step(torch.compile(compiled, fullgraph=True, backend="aot_eager"), x, "triton")
    for name, gradient in plain.items():
        assert torch.equal(found[f"_orig_mod.{name}"], gradient), name
    # the compiler may contract a product and a sum where PyTorch does not
    step(truth, x.double(), "reference")
    assert_parity(moving(compiled), moving(ours), moving(truth), sample_dim=None)
    assert counts(compiled) == counts(ours) == [1] * 3


def _in_eval(block: nn.Module) -> None:
    block.bn2.eval()


def _hooked(name: str) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        block.get_submodule(name).register_forward_hook(lambda *args: None)

    return change


def _frozen(block: nn.Module) -> None:
    for parameter in block.parameters():
        parameter.requires_grad_(False)


BLOCK_CHANGES = {
    "hook-shortcut": (_hooked("downsample.1"), 3),
    "frozen norm": (_in_eval, 3),
    "frozen parameters": (_frozen, 4),
    "not affine": (lambda block: setattr(block, "bn1", nn.BatchNorm2d(16, affine=False)), 3),
}


@pytest.mark.parametrize("change", BLOCK_CHANGES)
def test_a_block_that_somebody_changed_is_its_modules(change, tiny_resnet, images, device) -> None:
    """Where a module is observed, replaced or frozen it is called; the other blocks are one op, and all
    gradients and statistics are the same by the parity rule."""
    apply, fused = BLOCK_CHANGES[change]
    ours = tiny_resnet("bottleneck").to(device).train()
    apply(ours.layer2[0])
    eager, truth = copy.deepcopy(ours), truth_model(ours)
    x, found = images(4).to(device), []
    for model, mode in ((ours, "triton"), (eager, "reference"), (truth, "reference")):
        with fastvr.use_backend(mode), backend.observe() as ran:
            y = model(x.double() if model is truth else x)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y))
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if model is ours:
            assert ran["residual_block", "triton"] == fused
    assert_parity(*found, kind="gradient", sample_dim=None)
    assert_parity(moving(ours), moving(eager), moving(truth), sample_dim=None)
    assert counts(ours) == counts(eager)
