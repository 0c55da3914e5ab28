"""Winograd's form of a 3x3 convolution, forced: the op's numbers, whatever the size."""

from __future__ import annotations

import pytest
import torch
from contract import randn

from fastvr import backend
from fastvr.ops.conv_bn_relu import conv_bn_relu
from fastvr.ops.cpu import mkldnn, winograd
from fastvr.reference.conv_bn_relu import conv_bn_relu as reference
from fastvr.testing import assert_parity


@pytest.fixture(autouse=True)
def _the_mode_of_users():
    """The ops take the vendor's call where the interpreter does not offer its kernels."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "kernels_possible", lambda device: False)
        yield


def _case(n=2, c=24, o=40, size=(14, 10), padding=(1, 1), *, act="relu", bn=True, residual=False) -> dict:
    """Arguments of the op; its weight is packed."""
    out = [extent + 2 * p - 2 for extent, p in zip(size, padding, strict=True)]
    case = {
        "x": randn(n, c, *size),
        "weight": randn(o, c, 3, 3) * (9 * c) ** -0.5,
        "bn_weight": torch.rand(o) + 0.5 if bn else None,
        "bn_bias": randn(o) if bn else None,
        "padding": padding,
        "act": act,
        "residual": randn(n, o, *out) if residual else None,
    }
    mkldnn.keep(case["weight"], winograd.pack(case["weight"], case["bn_weight"], case["bn_bias"]))
    return case


def _expected(case: dict, dtype: torch.dtype) -> torch.Tensor:
    def cast(name: str) -> torch.Tensor | None:
        value = case.get(name)
        return None if value is None else value.to(dtype)

    x = cast("x")
    vectors = cast("bn_weight"), cast("bn_bias"), None, None, 1e-5
    last = case["act"], cast("residual"), cast("mean"), cast("std")
    return reference(x, cast("weight"), *vectors, (1, 1), case["padding"], 1, *last)


def _check(case: dict) -> torch.Tensor:
    with backend.observe() as ran:
        actual = conv_bn_relu(**case)
    assert ran == {("conv_bn_relu", "winograd"): 1}
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
def test_epilogues_and_layouts(residual, bn, act, layout) -> None:
    case = _case(act=act, bn=bn, residual=residual)
    for name in ("x", "weight", "residual"):
        if case[name] is not None and name != "weight":
            case[name] = case[name].contiguous(memory_format=layout)
    before = {name: value.clone() for name, value in case.items() if isinstance(value, torch.Tensor)}
    _check(case)
    assert all(torch.equal(case[name], value) for name, value in before.items())


@pytest.mark.parametrize("padding", [(1, 1), (0, 0), (2, 1), (0, 3)], ids=str)
@pytest.mark.parametrize("size", [(3, 3), (7, 7), (4, 9), (13, 6)], ids=str)
def test_sizes_and_padding(size, padding) -> None:
    _check(_case(size=size, padding=padding))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 5)], ids=str)
def test_maps_of_few_pixels(size) -> None:
    _check(_case(size=size))


@pytest.mark.parametrize(("c", "o"), [(16, 1), (31, 7), (256, 256)])
def test_channels(c, o) -> None:
    _check(_case(c=c, o=o, size=(7, 7)))


@pytest.mark.parametrize("n", [0, 1, 9])
def test_batches(n) -> None:
    _check(_case(n=n))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_batch_in_parts(dtype, monkeypatch) -> None:
    case = _case(n=5)
    case["residual"] = randn(5, 40, 14, 10, dtype=dtype)
    whole = conv_bn_relu(**case)
    assert whole.dtype == torch.promote_types(dtype, torch.float32)
    monkeypatch.setattr(winograd, "_POINTS", 2 * 16 * 7 * 5 * 40)
    assert torch.equal(conv_bn_relu(**case), whole)


def test_values_far_from_zero() -> None:
    case = _case(act="none")
    case["x"] = case["x"] + 100
    _check(case)


def test_uint8_images() -> None:
    case = _case(c=16)
    case["x"] = torch.randint(0, 256, case["x"].shape, dtype=torch.uint8)
    case |= {"mean": torch.rand(16), "std": torch.rand(16) + 0.5}
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


def test_a_sample_does_not_depend_on_its_batch() -> None:
    case = _case(n=3, residual=True)
    whole = conv_bn_relu(**case)
    for i in range(3):
        one = case | {"x": case["x"][i : i + 1], "residual": case["residual"][i : i + 1]}
        assert torch.equal(conv_bn_relu(**one), whole[i : i + 1])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_sample_keeps_to_itself(poison) -> None:
    case = _case(n=3, act="none")
    clean = conv_bn_relu(**case)
    case["x"] = case["x"].clone()
    case["x"][1, 0, 6, 6] = poison
    dirty = conv_bn_relu(**case)
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
    # all that read it, nothing two pixels further away, and ReLU keeps a NaN
    assert not dirty[1, :, 5:8, 5:8].isfinite().any()
    assert conv_bn_relu(**case | {"act": "relu"})[1].isnan().any()
    away = torch.ones(14, 10, dtype=torch.bool)
    away[4:9, 4:9] = False
    assert torch.equal(dirty[1, :, away], clean[1, :, away])


def test_what_it_takes() -> None:
    weight = torch.ones(16, 16, 3, 3)
    assert winograd.takes(weight, (1, 1), 1)
    assert not winograd.takes(weight, (2, 2), 1)
    assert not winograd.takes(weight, (1, 1), 2)
    assert not winograd.takes(torch.ones(8, 8, 3, 3), (1, 1), 1)
    assert not winograd.takes(torch.ones(16, 16, 1, 1), (1, 1), 1)
    assert not winograd.takes(weight.bfloat16(), (1, 1), 1)
    assert not winograd.takes(weight.double(), (1, 1), 1)
