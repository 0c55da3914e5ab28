"""Winograd's form of a 3x3 convolution, forced: the op's numbers, whatever the size."""

from __future__ import annotations

import pytest
import torch
from contract import needs_onednn, randn

from fastvr import backend
from fastvr.ops.conv_bn_relu import conv_bn_relu
from fastvr.ops.cpu import mkldnn, winograd
from fastvr.reference.conv_bn_relu import conv_bn_relu as reference
from fastvr.testing import assert_parity

pytestmark = needs_onednn


@pytest.fixture(autouse=True)
def _the_mode_of_users():
    """The ops take the vendor's call where the interpreter does not offer its kernels."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "kernels_possible", lambda device: False)
        yield


@pytest.fixture(params=winograd.TILES, ids=str)
def tile(request) -> tuple[int, int]:
    return request.param


def _case(
    tile, n=2, c=64, o=40, size=(14, 10), padding=(1, 1), *, act="relu", bn=True, residual=False
) -> dict:
    """Arguments of the op; its weight is packed."""
    out = [extent + 2 * p - 2 for extent, p in zip(size, padding, strict=True)]
    case = {
        "x": randn(n, c, *size),
        # as the weights of models lie; eager's error is another in another layout
        "weight": (randn(o, c, 3, 3) * (9 * c) ** -0.5).contiguous(memory_format=torch.channels_last),
        "bn_weight": torch.rand(o) + 0.5 if bn else None,
        "bn_bias": randn(o) if bn else None,
        "padding": padding,
        "act": act,
        "residual": randn(n, o, *out) if residual else None,
    }
    weight, vectors, given = case["weight"], (case["bn_weight"], case["bn_bias"]), (padding, case["x"].shape)
    direct = mkldnn.pack_convolution(weight, *vectors, (1, 1), padding, 1, case["x"].shape)
    mkldnn.keep(weight, winograd.pack(weight, *vectors, tile, *given, direct))
    return case


def _expected(case: dict, dtype: torch.dtype) -> torch.Tensor:
    def cast(name: str) -> torch.Tensor | None:
        value = case.get(name)
        return None if value is None else value.to(dtype)

    x = cast("x")
    vectors = cast("bn_weight"), cast("bn_bias"), None, None, 1e-5
    last = case["act"], cast("residual"), cast("mean"), cast("std")
    return reference(x, cast("weight"), *vectors, (1, 1), case["padding"], 1, *last)


def _check(case: dict, ran: str = "winograd") -> torch.Tensor:
    with backend.observe() as observed:
        actual = conv_bn_relu(**case)
    assert observed == {("conv_bn_relu", ran): 1}
    assert actual.is_contiguous(memory_format=torch.channels_last)
    eager = _expected(case, torch.float32)
    assert actual.shape == eager.shape
    if actual.numel():
        assert_parity(actual, eager, _expected(case, torch.float64))
    return actual


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("bn", [False, True], ids=["", "bn"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_epilogues_and_layouts(residual, bn, act, layout, tile) -> None:
    case = _case(tile, act=act, bn=bn, residual=residual)
    for name in ("x", "weight", "residual"):
        if case[name] is not None and name != "weight":
            case[name] = case[name].contiguous(memory_format=layout)
    before = {name: value.clone() for name, value in case.items() if isinstance(value, torch.Tensor)}
    _check(case)
    assert all(torch.equal(case[name], value) for name, value in before.items())


@pytest.mark.parametrize("padding", [(1, 1), (0, 0), (1, 0), (0, 1)], ids=str)
@pytest.mark.parametrize("size", [(7, 7), (8, 9), (13, 8)], ids=str)
def test_sizes_and_padding(size, padding, tile) -> None:
    _check(_case(tile, size=size, padding=padding))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 5), (4, 9), (9, 4)], ids=str)
def test_maps_of_few_pixels(size, tile) -> None:
    """What reads mostly padding is summed directly where tiles of 4x2 are too coarse for it."""
    _check(_case(tile, size=size), "mkldnn" if tile == (4, 2) else "winograd")


@pytest.mark.parametrize(("c", "o"), [(16, 1), (31, 7), (64, 1), (97, 7), (256, 256)])
def test_channels(c, o, tile) -> None:
    if c >= 64 or tile == (2, 2):
        _check(_case(tile, c=c, o=o, size=(7, 7)))


@pytest.mark.parametrize("n", [0, 1, 9])
def test_batches(n, tile) -> None:
    # of fewer numbers PyTorch makes a matrix product, with half the error of its convolution
    _check(_case(tile, n=n, size=(20, 18)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_batch_in_parts(dtype, monkeypatch, tile) -> None:
    case = _case(tile, n=5)
    case["residual"] = randn(5, 40, 14, 10, dtype=dtype)
    whole = conv_bn_relu(**case)
    assert whole.dtype == torch.promote_types(dtype, torch.float32)
    points = (tile[0] + 2) * (tile[1] + 2)
    for numbers in (2 * points * (-(-14 // tile[0])) * 5 * 40, 1):
        monkeypatch.setattr(winograd, "_NUMBERS", numbers)
        assert torch.equal(conv_bn_relu(**case), whole)


def test_values_far_from_zero(tile) -> None:
    case = _case(tile, act="none")
    case["x"] = case["x"] + 100
    _check(case)


def test_uint8_images(tile) -> None:
    case = _case(tile)
    case["x"] = torch.randint(0, 256, case["x"].shape, dtype=torch.uint8)
    case |= {"mean": torch.rand(64), "std": torch.rand(64) + 0.5}
    given = dict(case)
    actual = conv_bn_relu(**given)
    x, vectors = (
        case["x"],
        (case["bn_weight"], case["bn_bias"], None, None, 1e-5, (1, 1), (1, 1), 1, "relu", None),
    )
    eager = reference(x, case["weight"], *vectors, case["mean"], case["std"])
    double = [v.double() if isinstance(v, torch.Tensor) else v for v in vectors]
    exact = reference(x, case["weight"].double(), *double, case["mean"].double(), case["std"].double())
    assert_parity(actual, eager, exact)


def test_a_sample_does_not_depend_on_its_batch(tile) -> None:
    case = _case(tile, n=3, residual=True)
    whole = conv_bn_relu(**case)
    for i in range(3):
        one = case | {"x": case["x"][i : i + 1], "residual": case["residual"][i : i + 1]}
        assert torch.equal(conv_bn_relu(**one), whole[i : i + 1])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_sample_keeps_to_itself(poison, tile) -> None:
    case = _case(tile, n=3, act="none")
    clean = conv_bn_relu(**case)
    case["x"] = case["x"].clone()
    case["x"][1, 0, 6, 6] = poison
    dirty = conv_bn_relu(**case)
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
    # all that read it, nothing outside of the tiles that do, and ReLU keeps a NaN
    assert not dirty[1, :, 5:8, 5:8].isfinite().any()
    assert conv_bn_relu(**case | {"act": "relu"})[1].isnan().any()
    away = torch.ones(14, 10, dtype=torch.bool)
    away[4:8, 4:8] = False
    assert torch.equal(dirty[1, :, away], clean[1, :, away])


def test_what_it_takes(tile) -> None:
    def takes(weight, stride=(1, 1), padding=(1, 1), groups=1, size=(2, 64, 7, 7)) -> bool:
        return winograd.takes(weight, tile, stride, padding, groups, size)

    weight = torch.ones(16, 64, 3, 3)
    assert takes(weight)
    assert not takes(weight, stride=(2, 2))
    assert not takes(weight, padding=(2, 1))
    assert not takes(weight, groups=2)
    assert not takes(torch.ones(8, 8, 3, 3))
    assert not takes(torch.ones(16, 64, 1, 1))
    assert not takes(weight.bfloat16())
    assert not takes(weight.double())
    assert takes(weight, size=(2, 64, 4, 7)) == takes(torch.ones(16, 16, 3, 3)) == (tile == (2, 2))
