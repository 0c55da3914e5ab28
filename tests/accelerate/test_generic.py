"""The patterns that fastvr knows in any model, and the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastvr
from fastvr import backend
from fastvr.testing import assert_parity, truth_model


def _convolutions(*last: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False, groups=2),
        nn.BatchNorm2d(16),
        *last,
    )


class _Viewed(nn.Module):
    """What many classifiers do with a map."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(16 * 16 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class _View(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.size(0), -1)


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_convolutions_in_sequence(mode, hold, images) -> None:
    report, ran = hold(_convolutions(nn.ReLU()), images, mode=mode)
    assert ran["conv_bn_relu", mode] == 2
    assert report.counts == {"torch Sequential": 1, "torch MaxPool2d": 1}
    assert not report.left


@pytest.mark.parametrize(
    "model", [_Viewed(_convolutions()), _convolutions(_View()), _convolutions(nn.ReLU6(), _View())], ids=str
)
def test_a_map_lies_as_pytorch_leaves_it(model, hold, images) -> None:
    """So that a view of it is one, where nothing was channels_last."""
    _, ran = hold(model, images)
    assert ran["conv_bn_relu", "reference"] == 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_layouts_as_pytorch_has_them(channels_last, images) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    eager, model = _convolutions().eval(), _convolutions().eval().to(memory_format=layout)
    eager = eager.to(memory_format=layout)
    fastvr.accelerate(model)
    x = images.to(memory_format=layout)
    with torch.no_grad(), fastvr.use_backend("reference"):
        assert model(x).stride() == eager(x).stride()


@pytest.mark.parametrize(
    "layers",
    [
        (nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Dropout(0.1), nn.Linear(96, 64), nn.Dropout(0.1)),
        (nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU("tanh"), nn.Linear(96, 64)),
        (nn.LayerNorm(64), nn.Linear(64, 96), nn.ReLU()),
        (nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.SiLU(), nn.Linear(64, 5)),
        (
            nn.Identity(),
            nn.Linear(64, 96, bias=False),
            nn.GELU(),
            nn.Linear(96, 64, bias=False),
            nn.Softmax(-1),
        ),
    ],
    ids=["dropout", "tanh", "half", "silu", "no_bias"],
)
def test_linear_layers_in_sequence(layers, hold, tokens) -> None:
    _, ran = hold(nn.Sequential(*layers), tokens)
    assert sum(ran.values()) > 0
    whole = isinstance(layers[0], nn.LayerNorm) and len(layers) > 3
    assert ran["layernorm_mlp", "reference"] == whole


def test_a_sequence_in_training_drops_what_it_dropped(tokens) -> None:
    layers = [nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Dropout(0.5), nn.Linear(96, 64)]
    model = nn.Sequential(*layers).train()
    torch.manual_seed(7)
    expected = model(tokens)
    fastvr.accelerate(model)
    torch.manual_seed(7)
    with fastvr.use_backend("reference"), backend.observe() as ran:
        assert torch.equal(model(tokens), expected)
    assert ran["linear", "reference"] == 2


def test_a_sequence_that_changes_later(hold, tokens) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    fastvr.accelerate(model)
    model[1] = nn.Tanh()
    model.append(nn.Tanh())
    with torch.no_grad(), fastvr.use_backend("reference"):
        eager = nn.Sequential(*model)
        assert_parity(model(tokens), eager(tokens), truth_model(eager)(tokens.double()))
        assert torch.equal(nn.Sequential()(tokens), tokens)
    for _ in range(4):
        del model[0]
    assert torch.equal(model(tokens), tokens)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.LayerNorm(64), torch.randn(7, 64)),
        (nn.LayerNorm(64, bias=False), torch.randn(2, 3, 4, 64)),
        (nn.MaxPool2d(3, 2, 1), torch.randn(1, 8, 9, 9).to(memory_format=torch.channels_last)),
        (nn.MaxPool2d((2, 3)), torch.randn(1, 8, 9, 9).to(memory_format=torch.channels_last)),
        (nn.Conv2d(3, 32, 8, 8), torch.randn(2, 3, 20, 16)),
        (nn.Conv2d(3, 32, (4, 8), (4, 8), bias=False), torch.randn(2, 3, 16, 16)),
    ],
    ids=["layer_norm", "no_bias", "max_pool", "oblong_pool", "patches", "oblong_patches"],
)
def test_single_modules(module, x, hold) -> None:
    _, ran = hold(module, x, mode="triton")
    assert {implementation for _, implementation in ran} == {"triton"}


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.MaxPool2d(2), torch.randn(1, 8, 8, 8)),
        (nn.MaxPool2d(2), torch.randn(8, 8, 8)),
        (nn.Conv2d(3, 32, 8, 8), torch.randn(3, 16, 16)),
        (nn.LayerNorm(64, dtype=torch.float64), torch.randn(2, 64).double()),
    ],
    ids=["contiguous_pool", "unbatched_pool", "unbatched_patches", "float64"],
)
def test_what_single_modules_leave_to_pytorch(module, x, hold) -> None:
    report, ran = hold(module, x)
    assert report.swapped
    assert not ran or module.weight.dtype == torch.float64


def test_a_stride_that_changes_later(images) -> None:
    conv = nn.Conv2d(3, 32, 8, 8)
    fastvr.accelerate(conv)
    conv.stride = (4, 4)
    with torch.no_grad():
        expected = nn.functional.conv2d(images, conv.weight, conv.bias, stride=4)
        with fastvr.use_backend("triton"):
            assert torch.equal(conv(images), expected)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LayerNorm((4, 8)), "normalises more than the last dimension"),
        (nn.LayerNorm(8, elementwise_affine=False), "has no weight"),
        (nn.Conv2d(3, 8, 3), "neither patches nor followed by BatchNorm: one launch already"),
        (nn.Conv2d(3, 8, 4, 4, dilation=2), "neither patches nor followed by BatchNorm: one launch already"),
        (nn.Linear(8, 8), "one matrix product with nothing around it: one launch already"),
        (nn.BatchNorm2d(8), "no convolution before it in the same nn.Sequential or known block"),
        (nn.GroupNorm(2, 8), "fastvr has no op for it"),
        (fastvr.nn.mlp.Mlp(8, 8), "fastvr's own: it runs on its ops already"),
        (torch.jit.script(nn.LayerNorm(8)), "TorchScript"),
    ],
    ids=["wide", "plain", "3x3", "dilated", "linear", "batch_norm", "group_norm", "fastvr", "script"],
)
def test_reasons(module, reason) -> None:
    report = fastvr.accelerate(module)
    assert not report.swapped
    assert [entry.what for entry in report.left] == [reason]
    assert str(report).startswith("nothing to accelerate here\n")


def test_a_class_that_uses_the_same_names_is_left() -> None:
    class Mine(nn.Sequential):
        runs = 3

    model = Mine(nn.Linear(8, 8), nn.ReLU())
    fastvr.accelerate(model)
    assert type(model) is Mine


def test_a_sequence_with_a_module_twice_in_it(hold, tokens) -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(64, 64), act, nn.Linear(64, 64), act, nn.Linear(64, 64), act)
    _, ran = hold(model, tokens)
    assert ran["linear", "reference"] == 3


def test_a_sequence_by_another_name(hold, images) -> None:
    class ConvBNReLU(nn.Sequential):
        pass

    model = nn.Sequential(ConvBNReLU(*_convolutions(nn.ReLU())), nn.Flatten(), nn.Linear(16 * 16 * 16, 3))
    report, ran = hold(model, images)
    assert ran["conv_bn_relu", "reference"] == 2
    assert any("ConvBNReLU" in kind for kind in report.counts)


def test_nothing_to_accelerate() -> None:
    report = fastvr.accelerate(nn.Sequential(nn.ReLU(), nn.Flatten()))
    assert not report.swapped
    assert not report.left
    assert str(report) == "nothing to accelerate here"


def test_the_report(capsys: Any) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8))
    report = fastvr.accelerate(model)
    assert not capsys.readouterr().out
    assert report.counts == {"torch LayerNorm": 2}
    assert str(report).splitlines() == [
        "on fastvr: 2",
        "  2 x torch LayerNorm  0, ...  layer_norm",
        "",
        "left to PyTorch: 1",
        "  1 x torch Linear  2  one matrix product with nothing around it: one launch already",
    ]
