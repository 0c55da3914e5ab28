from __future__ import annotations

import pytest
import torch
from contract import (
    DTYPES,
    GRID,
    assert_autocast,
    assert_batch_invariant,
    assert_compiles,
    assert_nan_stays_in_its_sample,
    assert_order_does_not_matter,
    randn,
    triton_forced,
)
from convolutions import VECTORS, check, inputs, layouts, twin

from fastvr import backend, tuning
from fastvr.ops.conv_bn_relu import CONV_BN_RELU, conv_bn_relu
from fastvr.reference.conv_bn_relu import conv_bn_relu as reference

pytest.importorskip("triton")
from fastvr.kernels import conv_bn_relu as kernels

# n, c, height, width, o, window, stride, padding, groups
SHAPES = [
    (2, 3, 31, 31, 64, 7, 2, 3, 1),
    (2, 64, 7, 7, 64, 3, 1, 1, 1),
    (1, 64, 14, 7, 31, 3, 2, 1, 1),
    (2, 64, 7, 14, 64, 1, 1, 0, 1),
    (2, 64, 7, 7, 96, 1, 2, 0, 1),
    (2, 31, 7, 7, 31, 1, 1, 1, 1),
    (2, 31, 14, 14, 3, 3, 1, 0, 1),
    (3, 1, 14, 14, 1, 3, 2, 1, 1),
    (3, 512, 1, 1, 64, 1, 1, 0, 1),
    (1, 64, 1, 1, 64, 3, 1, 1, 1),
    (1, 64, 5, 5, 64, 3, 1, 1, 32),
    (2, 8, 5, 5, 8, 3, 2, 1, 8),
    (1, 128, 3, 3, 128, 1, 1, 0, 2),
    (1, 128, 3, 3, 128, 3, 1, 1, 2),
    (1, 3, 9, 11, 8, (3, 1), (1, 2), (0, 3), 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, device):
    check(inputs(*shape, dtype, device))


@pytest.mark.parametrize(
    "missing",
    [
        ("residual",),
        ("bn_weight",),
        ("bn_bias",),
        ("bn_weight", "bn_bias"),
        ("running_mean", "running_var"),
        ("bn_weight", "running_mean", "running_var"),
        ("bn_bias", "running_mean", "running_var"),
        (*VECTORS, "residual"),
    ],
    ids=str,
)
@pytest.mark.parametrize("act", ["none", "relu"])
def test_every_part_is_optional(missing, act, device):
    shape = (2, 16, 5, 5, 24, 3, 1, 1, 1)
    check(inputs(*shape, torch.float16, device, act=act, **dict.fromkeys(missing, False)))


@pytest.mark.parametrize("vector_dtype", DTYPES)
def test_vectors_in_either_dtype(vector_dtype, device):
    dtype = torch.bfloat16 if vector_dtype == torch.float32 else vector_dtype
    check(inputs(2, 16, 5, 5, 24, 3, 1, 1, 1, dtype, device, vector_dtype=vector_dtype))


def test_vectors_of_two_dtypes_and_strides(device):
    given = inputs(2, 16, 5, 5, 24, 3, 1, 1, 1, torch.bfloat16, device)
    given["bn_weight"] = given["bn_weight"].bfloat16()
    given["bn_bias"] = randn(48, device=device)[::2]
    given["running_var"] = torch.ones(1, device=device).expand(24)
    check(given)


def test_eps_counts(device):
    given = inputs(2, 16, 5, 5, 24, 1, 1, 0, 1, torch.float32, device)
    given["running_var"] = given["running_var"] * 1e-3
    check(given | {"eps": 1e-2})


@pytest.mark.parametrize(
    ("shape", "gathered"), [((1, 64, 7, 5, 72, 3, 2, 1, 1), False), ((1, 5, 7, 5, 20, 3, 1, 1, 1), True)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(shape, gathered, dtype, device):
    given = inputs(*shape, dtype, device)
    tried = []
    for arch in ("interpreter", *GRID.architectures):
        for config in kernels.candidate_configs(dtype, arch, gathered=gathered):
            if config not in tried:
                tried.append(config)
                with tuning.force_config("conv_bn_relu", config):
                    check(given)


@pytest.mark.parametrize("rows", [1, 64, 65, 3136, 200_704])
@pytest.mark.parametrize(("gathered", "boxes"), [(False, False), (True, False), (False, True)])
def test_default_is_a_candidate(rows, gathered, boxes):
    for arch in GRID.architectures:
        for dtype in DTYPES:
            for n in (1, 64, 2048):
                options = {"gathered": gathered, "boxes": boxes}
                candidates = kernels.candidate_configs(dtype, arch, **options, m=rows)
                for k in (64, 4608):
                    assert kernels.default_config(rows, n, dtype, arch, **options, k=k) in candidates


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 64, 7, 7, 72, 3, 1, 1, 1),
        (3, 128, 4, 4, 130, 1, 2, 0, 1),
        (1, 64, 5, 4, 64, 3, 1, 1, 4),
        (1, 96, 3, 3, 31, 3, 2, 0, 1),
    ],
    ids=str,
)
def test_a_split_product(shape, dtype, device):
    given = inputs(*shape, dtype, device)
    # as few blocks of K as parts, and fewer
    for config in kernels.candidate_configs(torch.bfloat16, "sm_90", m=1):
        if "SPLIT_K" in config:
            with tuning.force_config("conv_bn_relu", config):
                check(given)
                check({**given, "residual": None, "act": "none"} | dict.fromkeys(VECTORS))


def test_a_split_product_is_summed_in_one_order(device):
    given = inputs(2, 128, 5, 5, 96, 3, 1, 1, 1, torch.float32, device)
    config = kernels.candidate_configs(torch.bfloat16, "sm_90", m=1)[-2]
    assert config["SPLIT_K"] > 1
    with tuning.force_config("conv_bn_relu", config):
        assert_order_does_not_matter(lambda: conv_bn_relu(**given))


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_layouts(name, window, which, device):
    given = inputs(2, 16, 6, 5, 24, window, 1, window // 2, 1, torch.bfloat16, device)
    given[name] = list(layouts(given[name]))[which]
    check(given)


def test_expanded(device):
    given = inputs(3, 16, 6, 5, 24, 3, 1, 1, 1, torch.float32, device)
    check(given | {"x": given["x"][:1].expand(3, -1, -1, -1)})
    check(given | {"residual": given["residual"][:, :, :1, :1].expand(-1, -1, 6, 5)})
    check(given | {"residual": given["residual"][:1, :1, :1, :1].expand(3, 24, 6, 5)})


def test_result_is_channels_last_on_every_backend(device):
    given = inputs(2, 16, 6, 5, 24, 3, 1, 1, 1, torch.float32, device)
    given["x"], given["weight"] = given["x"].contiguous(), given["weight"].contiguous()
    for mode in ("triton", "reference"):
        with backend.use_backend(mode):
            assert conv_bn_relu(**given).is_contiguous(memory_format=torch.channels_last)


def test_empty_batch(device):
    given = inputs(0, 16, 6, 5, 24, 3, 2, 1, 1, torch.float32, device)
    with triton_forced():
        assert conv_bn_relu(**given).shape == (0, 24, 3, 3)


def test_float32_residual_beside_bfloat16(device):
    given = inputs(2, 16, 5, 5, 24, 3, 1, 1, 1, torch.bfloat16, device)
    given["residual"] = given["residual"].float()
    check(given)
    with triton_forced():
        assert conv_bn_relu(**given).dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_relu_keeps_nan(value, device):
    given = inputs(2, 16, 4, 4, 24, 1, 1, 0, 1, torch.float16, device)
    given["bn_bias"] = torch.full((24,), value, device=device)
    check(given)


@pytest.mark.parametrize("shape", [(4, 64, 5, 5, 24, 3, 1, 1, 1), (4, 3, 7, 7, 24, 3, 2, 1, 1)], ids=str)
def test_nan_stays_in_its_sample(shape, device):
    given = inputs(*shape, torch.float32, device, residual=False, act="none")
    x = given.pop("x")
    assert_nan_stays_in_its_sample(lambda x: conv_bn_relu(x, **given), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    given = inputs(4, 64, 5, 5, 24, 3, 1, 1, 1, dtype, device, residual=False)
    x = given.pop("x")
    with tuning.force_config("conv_bn_relu", kernels.candidate_configs(dtype, "sm_90")[-1]):
        assert_batch_invariant(lambda x: conv_bn_relu(x, **given), x)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_order_of_programs_does_not_matter(groups, device):
    given = inputs(2, 64, 7, 7, 96, 3, 1, 1, groups, torch.float32, device)
    with tuning.force_config("conv_bn_relu", kernels.candidate_configs(torch.float32, "sm_90")[-1]):
        assert_order_does_not_matter(lambda: conv_bn_relu(**given))


def test_compiles_and_exports(device):
    given = inputs(2, 8, 5, 5, 12, 3, 2, 1, 1, torch.float32, device)
    mean, var = given["running_mean"], given["running_var"]
    names = ("x", "weight", "bn_weight", "bn_bias", "residual")

    def call(x, weight, bn_weight, bn_bias, residual):
        return conv_bn_relu(x, weight, bn_weight, bn_bias, mean, var, stride=2, padding=1, residual=residual)

    tensors = [given[name].requires_grad_() for name in names]
    assert_compiles(call, tensors)
    x, weight, scale, shift, residual = tensors
    options = (1e-5, [2, 2], [1, 1], 1, "relu")
    with triton_forced():
        for given in ((scale, shift, mean, var, *options, residual), (*[None] * 4, *options, None)):
            torch.library.opcheck(CONV_BN_RELU.overload, (x, weight, *given, None, None))


@pytest.mark.parametrize("with_residual", [True, False])
def test_autocast_is_eagers(with_residual, device):
    given = inputs(2, 8, 9, 9, 12, 3, 1, 1, 1, torch.float32, device, residual=with_residual)
    assert_autocast(conv_bn_relu, twin, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x must be a torch.Tensor; got NoneType"),
        (
            {"x": torch.zeros(2, 8, 5, 5, dtype=torch.int32)},
            "x must be float32, float16, bfloat16 or float64",
        ),
        ({"x": torch.zeros(2, 8, 5, 5).byte()}, "mean must be given for uint8 images; got None"),
        (
            {"x": torch.zeros(2, 8, 5, 5).byte(), "mean": torch.zeros(8)},
            "std must be given for uint8 images; got None",
        ),
        ({"mean": torch.zeros(8)}, "mean is for uint8 images only; got torch.float32"),
        (
            {"x": torch.zeros(2, 8, 5, 5).byte(), "mean": torch.zeros(8), "std": torch.ones(7)},
            r"std must have shape \[8\]; got \[7\]",
        ),
        (
            {"x": torch.zeros(2, 7, 5, 5)},
            r"x must be \[N, 8, H, W\] for a weight of \[12, 8, 3, 3\] in 1 groups",
        ),
        ({"x": torch.zeros(8, 5, 5)}, r"x must be \[N, 8, H, W\]"),
        ({"x": torch.zeros(2, 8, 2, 5)}, r"x must be at least 3 x 3 \(the window\) with its padding"),
        (
            {"weight": torch.zeros(12, 8)},
            r"weight must be \[out_channels, C / groups, kh, kw\]; got \[12, 8\]",
        ),
        ({"weight": torch.zeros(12, 8, 3, 3).half()}, "weight must be torch.float32, as the operands are"),
        ({"bn_weight": torch.zeros(11)}, r"bn_weight must have shape \[12\]; got \[11\]"),
        ({"bn_bias": torch.zeros(12).half()}, "bn_bias must be float32 or torch.float32, as weight is; got"),
        ({"running_var": None}, "running_var must be given with its companion"),
        ({"running_mean": None}, "running_mean must be given with its companion"),
        (
            {"running_mean": torch.zeros(12, device="meta")},
            "running_mean must be on cpu, where x is; got meta",
        ),
        ({"residual": torch.zeros(2, 12, 5, 5)}, r"residual must have shape \[2, 12, 3, 3\]; got"),
        ({"stride": 0}, "stride must be one or two integers of at least 1; got 0"),
        ({"stride": (1, 2, 3)}, "stride must be one or two integers"),
        ({"padding": -1}, "padding must be one or two integers of at least 0; got -1"),
        ({"padding": 0.5}, "padding must be one or two integers"),
        ({"groups": 5}, "groups must be a divisor of weight's 12 output channels; got 5"),
        ({"act": "gelu"}, "act must be one of 'none', 'relu'; got 'gelu'"),
    ],
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_bad_input_names_the_argument(change, message, mode):
    vectors = {name: torch.ones(12) for name in VECTORS}
    given = {"x": torch.zeros(2, 8, 5, 5), "weight": torch.zeros(12, 8, 3, 3), **vectors} | change
    with backend.use_backend(mode), pytest.raises(ValueError, match=f"conv_bn_relu: {message}"):
        conv_bn_relu(**given)


def test_float64_has_no_kernel(device):
    given = inputs(2, 8, 5, 5, 12, 3, 1, 1, 1, torch.float64, device)
    with (
        triton_forced(),
        pytest.raises(backend.BackendError, match="conv_bn_relu: no Triton kernel runs here: dtype"),
    ):
        conv_bn_relu(**given)
    assert torch.equal(conv_bn_relu(**given), twin(**given))


def test_more_pixels_than_32_bits_count(device):
    x = torch.zeros(1, 1, 1, 1, device="meta").expand(2**17, 1, 128, 128)
    weight = torch.zeros(1, 1, 1, 1, device="meta")
    options = (None, None, None, None, 1e-5, [1, 1], [0, 0], 1, "none", None, None, None)
    assert "output pixels" in CONV_BN_RELU.unsupported(x, weight, *options)


def test_flops_and_bytes(device):
    from torch.utils.flop_counter import FlopCounterMode

    given = inputs(2, 8, 6, 6, 12, 1, 2, 0, 2, torch.float32, device, residual=False)
    with triton_forced(), FlopCounterMode(display=False) as counter:
        conv_bn_relu(**given)
    assert counter.get_total_flops() == 2 * (2 * 9 * 12) * 4
    vectors = [given[name] for name in VECTORS]
    options = (1e-5, [2, 2], [0, 0], 2, "relu", None, None, None)
    cost = CONV_BN_RELU.cost(given["x"], given["weight"], *vectors, *options)
    # a quarter of x
    assert cost.bytes == 4 * (2 * 8 * 9 + 12 * 4 + 4 * 12 + 2 * 12 * 9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("vectors", [None, torch.float32], ids=["own", "float32"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference_without_gradients_is_the_reference_with_them(dtype, vectors, affine, layout) -> None:
    for size in ((2, 8, 6, 5), (1, 8, 1, 1), (0, 8, 4, 4)):
        x, weight = (randn(*s, dtype=dtype).contiguous(memory_format=layout) for s in (size, (13, 8, 1, 1)))
        pair = [randn(13, dtype=vectors or dtype) if affine else None for _ in range(2)]
        moments = [randn(13, dtype=vectors or dtype), torch.rand(13).add(0.5).to(vectors or dtype)]
        before = x.clone()
        expected = reference(x, weight, *pair, *moments)
        with torch.no_grad():
            actual = reference(x, weight, *pair, *moments)
        assert torch.equal(actual, expected)
        assert torch.equal(x, before)
