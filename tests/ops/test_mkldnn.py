"""PyTorch's fused oneDNN calls, forced: the ops' numbers, whatever a weight was packed for."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from contract import needs_onednn, randn

from fastvr import backend
from fastvr.ops.conv_bn_relu import conv_bn_relu
from fastvr.ops.cpu import layouts, mkldnn
from fastvr.ops.linear import linear
from fastvr.reference.conv_bn_relu import conv_bn_relu as conv_reference
from fastvr.reference.linear import linear as linear_reference
from fastvr.testing import GELU_TAIL, assert_parity

pytestmark = needs_onednn

DTYPES = [d for d in (torch.float32, torch.bfloat16, torch.float16) if mkldnn.supports(d)]
ACTS = ["none", "relu", "gelu", "gelu_tanh"]


@pytest.fixture(autouse=True)
def _the_mode_of_users():
    """The ops take the vendor's call where the interpreter does not offer its kernels."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "kernels_possible", lambda device: False)
        yield


def _double(values):
    return [v.double() if isinstance(v, torch.Tensor) else v for v in values]


def _rows(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x [B, N, K] as other strides."""
    if layout == "strided":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gamma", [False, True], ids=["", "gamma"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed", "expanded"])
def test_linear(layout, residual, gamma, act, dtype) -> None:
    x = _rows(randn(3, 50, 72, dtype=dtype), layout)
    weight, bias = randn(96, 72, dtype=dtype) * 72**-0.5, randn(96, dtype=dtype)
    args = (
        x,
        weight,
        bias,
        randn(96, dtype=dtype) if gamma else None,
        _rows(randn(3, 50, 96, dtype=dtype), layout) if residual else None,
        act,
    )
    eager, exact = linear_reference(*args), linear_reference(*_double(args))
    floor = GELU_TAIL * (args[3].abs().double() if gamma else 1) if act == "gelu" else 0.0
    packed = mkldnn.pack_linear(weight, 150)
    for candidate in (packed, dataclasses.replace(packed, gelu=False)):
        mkldnn.keep(weight, candidate)
        with backend.observe() as ran:
            actual = linear(x, weight, bias, gamma=args[3], residual=args[4], act=act)
        assert ran == {("linear", "mkldnn"): 1}
        assert_parity(actual, eager, exact, absolute_floor=floor)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gamma", [False, True], ids=["", "gamma"])
@pytest.mark.parametrize("residual", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("columns", "most"), [(100, 48), (96, 32), (130, 129), (17, 16)])
def test_linear_in_parts(columns, most, residual, gamma, act) -> None:
    x, weight, bias = randn(3, 20, columns), randn(40, columns) * columns**-0.5, randn(40)
    other = None if residual is None else randn(3, 20, 40, dtype=residual)
    args = (x, weight, bias, randn(40) if gamma else None, other, act)
    packed = mkldnn.pack_linear(weight, 60, most_terms=most)
    assert len(packed.parts) == -(-columns // packed.terms) > 1
    assert packed.terms % 16 == 0
    mkldnn.keep(weight, packed)
    with backend.observe() as ran:
        actual = linear(x, weight, bias, gamma=args[3], residual=other, act=act)
    assert ran == {("linear", "mkldnn"): 1}
    floor = GELU_TAIL * (args[3].abs().double() if gamma else 1) if act == "gelu" else 0.0
    assert_parity(actual, linear_reference(*args), linear_reference(*_double(args)), absolute_floor=floor)


def test_parts_have_the_smaller_error() -> None:
    x, weight = randn(64, 3072), randn(128, 3072) * 3072**-0.5
    exact = x.double() @ weight.double().T

    def error(packed) -> float:
        return float((mkldnn.linear(x, packed, None, None, None, "none") - exact).square().mean())

    whole = mkldnn.pack_linear(weight, 64)
    assert error(mkldnn.pack_linear(weight, 64, most_terms=256)) < error(whole)
    # nothing to cut
    assert not mkldnn.pack_linear(weight, 64, most_terms=3072).parts


@pytest.mark.parametrize("rows", [(0,), (1,), (7,), (2, 0), (1, 1), (300,), ()])
def test_any_number_of_rows(rows) -> None:
    weight, bias = randn(40, 24), randn(40)
    mkldnn.keep(weight, mkldnn.pack_linear(weight, 64))
    x = randn(*rows, 24)
    expected, exact = torch.nn.functional.linear(x, weight, bias), None
    actual = linear(x, weight, bias)
    assert actual.shape == expected.shape
    if actual.numel():
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        assert_parity(actual, expected, exact, sample_dim=0 if actual.dim() > 1 else None)


CONVOLUTIONS = {
    "7x7 stride 2": (3, 32, 7, 2, 3, 1),
    "1x1": (32, 64, 1, 1, 0, 1),
    "1x1 stride 2": (32, 64, 1, 2, 0, 1),
    "3x3": (32, 32, 3, 1, 1, 1),
    "3x3 in groups": (32, 32, 3, 1, 1, 8),
    "odd channels": (13, 7, 3, 2, 1, 1),
}


def _convolution(kind: str, dtype: torch.dtype, *, residual: bool, act: str = "relu", n: int = 2) -> list:
    """Arguments of the op's reference, scale and shift in float32 as ``prepare`` has them."""
    c, o, k, s, p, groups = CONVOLUTIONS[kind]
    x, weight = randn(n, c, 14, 10, dtype=dtype), randn(o, c // groups, k, k, dtype=dtype) * 0.1
    size = [(14 + 2 * p - k) // s + 1, (10 + 2 * p - k) // s + 1]
    scale, shift = torch.rand(o) + 0.5, torch.randn(o)
    other = randn(n, o, *size, dtype=dtype) if residual else None
    return [x, weight, scale, shift, None, None, 1e-5, (s, s), (p, p), groups, act, other, None, None]


def _packed(args: list, size: tuple[int, ...] | None = None) -> mkldnn.Packed:
    return mkldnn.pack_convolution(*args[1:4], *args[7:10], size or args[0].shape)


def _op(args: list) -> torch.Tensor:
    x, weight, scale, shift, _, _, _, stride, padding, groups, act, residual, mean, std = args
    return conv_bn_relu(
        x,
        weight,
        scale,
        shift,
        stride=stride,
        padding=padding,
        groups=groups,
        act=act,
        residual=residual,
        mean=mean,
        std=std,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution(kind, residual, act, layout, dtype) -> None:
    args = _convolution(kind, dtype, residual=residual, act=act)
    for i in (0, 1, 11):
        if args[i] is not None:
            args[i] = args[i].contiguous(memory_format=layout)
    eager, exact = conv_reference(*args), conv_reference(*_double(args))
    for onto in (False, True):
        mkldnn.keep(args[1], dataclasses.replace(_packed(args), onto_residual=onto))
        given = list(args)
        if residual:
            given[11] = args[11].clone()
        with backend.observe() as ran:
            actual = _op(given)
        assert ran == {("conv_bn_relu", "mkldnn"): 1}
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert_parity(actual, eager, exact)
        if residual:
            written = onto and layout == torch.channels_last
            assert (actual.data_ptr() == given[11].data_ptr()) == written
            assert written or torch.equal(given[11], args[11])


@pytest.mark.parametrize("n", [0, 1, 2, 9])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_any_batch_and_size(kind, n) -> None:
    args = _convolution(kind, torch.float32, residual=True, n=n)
    mkldnn.keep(args[1], _packed(args, (4, args[0].shape[1], 56, 56)))
    actual, eager = _op(args), conv_reference(*args)
    assert actual.shape == eager.shape
    if n:
        assert_parity(actual, eager, conv_reference(*_double(args)))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_maps_of_few_pixels(n, onto, size) -> None:
    args = _convolution("1x1", torch.float32, residual=False, n=n)
    args[0], args[11] = randn(n, 32, *size), randn(n, 64, *size)
    eager, exact = conv_reference(*args), conv_reference(*_double(args))
    mkldnn.keep(args[1], dataclasses.replace(_packed(args), onto_residual=onto))
    assert_parity(_op(args), eager, exact)


def test_sizes_share_the_layouts_that_they_want() -> None:
    asked = []

    def pack(size):
        asked.append(size)
        return torch.ops.mkldnn._reorder_linear_weight(torch.ones(64, 32), *size)

    several = layouts.Layouts(pack, (8,))
    first = several.of((8,))
    kinds = {id(several.of((rows,))) for rows in range(300) for _ in range(2)}
    # 0 rows have no layout of their own, and beyond the most sizes no new one is asked for
    assert len(asked) == len(set(asked)) == layouts._MOST_SIZES
    assert id(first) in kinds
    described = {layouts._layout(pack((rows,))) for rows in range(1, 20)}
    assert len(kinds) <= len(described) + 1


def test_uint8_images() -> None:
    args = _convolution("7x7 stride 2", torch.float32, residual=False)
    args[0] = torch.randint(0, 256, args[0].shape, dtype=torch.uint8)
    args[12:] = [torch.rand(3), torch.rand(3) + 0.5]
    mkldnn.keep(args[1], _packed(args))
    assert_parity(_op(args), conv_reference(*args), conv_reference(*_double(args)))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_a_poisoned_sample_keeps_to_itself(residual, poison) -> None:
    args = _convolution("3x3", torch.float32, residual=residual, n=3)
    mkldnn.keep(args[1], _packed(args))
    clean = _op(args)
    args[0] = args[0].clone()
    args[0][1] = poison
    dirty = _op(args)
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
    assert not dirty[1].isfinite().all()
    if poison != poison:
        # every output of the sample reads a NaN, and ReLU keeps it
        assert dirty[1].isnan().all()
    for act in ACTS:
        weight, rows = randn(32, 16), randn(3, 5, 16)
        mkldnn.keep(weight, mkldnn.pack_linear(weight, 15))
        clean = linear(rows, weight, act=act)
        rows[1] = poison
        dirty = linear(rows, weight, act=act)
        assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
        assert not dirty[1].isfinite().all()


def test_a_sample_does_not_depend_on_its_batch() -> None:
    for kind, residual in itertools.product(CONVOLUTIONS, (False, True)):
        args = _convolution(kind, torch.float32, residual=residual, n=3)
        mkldnn.keep(args[1], _packed(args))
        whole = _op(args)
        for i in range(3):
            one = list(args)
            one[0], one[11] = args[0][i : i + 1], args[11][i : i + 1] if residual else None
            assert torch.equal(_op(one), whole[i : i + 1]), kind


def test_what_takes_the_plain_way() -> None:
    x, weight = randn(4, 16), randn(8, 16)
    mkldnn.keep(weight, mkldnn.pack_linear(weight, 4))

    def implementations(run) -> set[str]:
        with backend.observe() as ran:
            run()
        return {name for _, name in ran}

    assert implementations(lambda: linear(x, weight)) == {"mkldnn"}
    with backend.use_backend("reference"):
        assert implementations(lambda: linear(x, weight)) == {"reference"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # the cast weight is another tensor
        assert implementations(lambda: linear(x, weight)) == {"reference"}
    with torch.enable_grad():
        needs = x.clone().requires_grad_()
        assert implementations(lambda: linear(needs, weight)) == {"reference"}
        linear(needs, weight).sum().backward()
        assert needs.grad is not None
    # another scale than the one that was multiplied in
    args = _convolution("1x1", torch.float32, residual=False)
    mkldnn.keep(args[1], _packed(args))
    assert implementations(lambda: _op(args)) == {"mkldnn"}
    args[2] = args[2].clone()
    assert implementations(lambda: _op(args)) == {"reference"}


def test_a_missing_operator_is_named(monkeypatch) -> None:
    mkldnn.missing.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    try:
        assert mkldnn.missing() == "this PyTorch is built without oneDNN"
        assert not mkldnn.supports(torch.float32)
    finally:
        mkldnn.missing.cache_clear()


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_what_onednn_emulates_is_not_taken(monkeypatch) -> None:
    assert not mkldnn.supports(torch.float64)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False, raising=False)
        assert not mkldnn.supports(dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not mkldnn.supports(torch.float32)
