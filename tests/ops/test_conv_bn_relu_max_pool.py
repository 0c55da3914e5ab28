from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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

from fastvr import backend, tuning
from fastvr.ops.conv_bn_relu import BatchNorm
from fastvr.ops.conv_bn_relu_max_pool import CONV_BN_RELU_MAX_POOL, conv_bn_relu_max_pool
from fastvr.reference.conv_bn_relu import conv_bn_relu as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import conv_bn_relu_max_pool as kernels

OP = "conv_bn_relu_max_pool"
POOL = {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}
# n, c, height, width, o, window, stride, padding
SHAPES = [
    (2, 3, 33, 29, 64, 7, 2, 3),
    (1, 3, 20, 44, 24, 7, 2, 3),
    (3, 3, 1, 1, 8, 7, 2, 3),
    (2, 1, 9, 5, 65, 3, 1, 1),
    (1, 4, 7, 10, 16, 3, 2, 0),
    (2, 3, 8, 9, 16, (3, 5), (1, 3), (0, 2)),
]


def both(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def inputs(n, c, h, w, o, window, stride, padding, dtype, device, *, uint8=False):
    kh, kw = both(window)
    given = {"x": randn(n, c, h, w, dtype=dtype, device=device)}
    if uint8:
        given = {
            "x": torch.randint(0, 256, (n, c, h, w), dtype=torch.uint8, device=device),
            "mean": torch.rand(c, device=device),
            "std": torch.rand(c, device=device) + 0.2,
        }
    weight = randn(o, c, kh, kw, device=device) * (c * kh * kw) ** -0.5
    vectors = [randn(o, device=device) for _ in range(3)] + [torch.rand(o, device=device) + 0.5]
    return given | {
        "weight": weight.to(dtype).to(memory_format=torch.channels_last),
        "bn": BatchNorm(*vectors),
        "stride": stride,
        "padding": padding,
        **POOL,
    }


def twin(x, weight, bn, *, stride, padding, pool_size, pool_stride, pool_padding, mean=None, std=None):
    y = reference(x, weight, *bn, both(stride), both(padding), mean=mean, std=std)
    return F.max_pool2d(y, pool_size, pool_stride, pool_padding)


def check(given):
    with triton_forced(), backend.observe() as ran:
        check_op(conv_bn_relu_max_pool, twin, given, backward=False, name=OP)
    # its parts would be right too
    assert set(ran) == {(OP, "triton")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, device):
    check(inputs(*shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_uint8_images_are_normalised(shape, dtype, device):
    check(inputs(*shape, dtype, device, uint8=True))


@pytest.mark.parametrize("without", ["weight", "bias", "statistics", "everything"])
def test_every_vector_is_optional(without, device):
    given = inputs(1, 3, 9, 9, 16, 3, 2, 1, torch.float16, device)
    changes = {
        "weight": {"weight": None},
        "bias": {"bias": None},
        "statistics": {"running_mean": None, "running_var": None},
        "everything": dict.fromkeys(BatchNorm._fields[:4]),
    }
    check(given | {"bn": given["bn"]._replace(**changes[without])})


def test_vectors_in_the_weights_dtype_and_strided(device):
    given = inputs(1, 3, 9, 9, 16, 3, 2, 1, torch.bfloat16, device)
    bn = given["bn"]
    check(given | {"bn": bn._replace(weight=bn.weight.bfloat16(), bias=randn(32, device=device)[::2])})


def test_eps_counts(device):
    given = inputs(1, 3, 9, 9, 16, 3, 2, 1, torch.float32, device)
    check(given | {"bn": given["bn"]._replace(running_var=given["bn"].running_var * 1e-3, eps=1e-2)})


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, uint8, device):
    given = inputs(2, 3, 9, 8, 16, 3, 2, 1, dtype, device, uint8=uint8)
    for tensor in (given["weight"], *given["bn"][:2]) + (() if uint8 else (given["x"],)):
        tensor.requires_grad_()
    with triton_forced(), backend.observe() as ran:
        check_op(conv_bn_relu_max_pool, twin, given, name=OP)
    # by its parts, each of which keeps what its gradient reads
    parts = ("conv_bn_relu", "max_pool_training", "max_pool_backward")
    assert set(ran) == {(part, "triton") for part in parts}


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(dtype, uint8, device):
    # one column of y more than the narrowest tile makes, and a strip that ends past the last row
    given = inputs(1, 3, 6, 64, 24, (1, 3), (1, 2), (0, 1), dtype, device, uint8=uint8)
    tried = []
    for arch in ("interpreter", *GRID.architectures):
        for config in kernels.candidate_configs(dtype, arch, uint8=uint8):
            if config not in tried:
                tried.append(config)
                with tuning.force_config(OP, config):
                    check(given)


@pytest.mark.parametrize("uint8", [False, True])
def test_default_is_a_candidate(uint8):
    for arch in GRID.architectures:
        for dtype in DTYPES:
            for n in (1, 64):
                config = kernels.default_config(n, 56, 56, dtype, arch, uint8=uint8)
                assert config in kernels.candidate_configs(dtype, arch, uint8=uint8)


def layouts(t):
    """The same values in other layouts: channels_last, every other row and column of a larger tensor, an
    offset into one, H and W exchanged; and one sample for all."""
    n, c, h, w = t.shape
    yield t.to(memory_format=torch.channels_last)
    wide = torch.zeros(n, 2 * c, 2 * h, 2 * w, dtype=t.dtype, device=t.device)
    wide[:, ::2, ::2, ::2] = t
    yield wide[:, ::2, ::2, ::2]
    around = torch.zeros(n + 1, c + 3, h + 1, w + 2, dtype=t.dtype, device=t.device)
    around[1:, 3:, 1:, 2:] = t
    yield around[1:, 3:, 1:, 2:]
    yield t.transpose(2, 3).contiguous().transpose(2, 3)
    yield t[:1].expand(n, -1, -1, -1)


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("name", ["x", "pixels", "weight"])
def test_layouts(name, which, device):
    given = inputs(2, 3, 8, 7, 16, 3, 2, 1, torch.bfloat16, device, uint8=name == "pixels")
    key = "x" if name == "pixels" else name
    given[key] = list(layouts(given[key]))[which]
    check(given)


def test_result_is_channels_last_on_every_backend(device):
    given = inputs(2, 3, 8, 7, 16, 3, 2, 1, torch.float32, device)
    for mode in ("auto", "triton", "reference"):
        with backend.use_backend(mode):
            assert conv_bn_relu_max_pool(**given).is_contiguous(memory_format=torch.channels_last)


def test_empty_batch(device):
    with triton_forced():
        y = conv_bn_relu_max_pool(**inputs(0, 3, 17, 9, 16, 7, 2, 3, torch.float32, device))
    assert y.shape == (0, 16, 5, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (4, 5), (8, 8)])
def test_a_nan_in_a_window_is_its_maximum(value, place, device):
    given = inputs(1, 3, 9, 9, 16, 3, 1, 1, torch.float32, device)
    given["x"][0, 1, place[0], place[1]] = value
    check(given)


def test_negative_scales_and_all_negative_windows(device):
    given = inputs(1, 3, 9, 9, 16, 3, 1, 1, torch.float16, device)
    bn = given["bn"]
    check(given | {"bn": bn._replace(weight=-bn.weight.abs())})
    check(given | {"bn": bn._replace(bias=torch.full_like(bn.bias, -100.0))})


@pytest.mark.parametrize("uint8", [False, True])
def test_nan_stays_in_its_sample(uint8, device):
    given = inputs(3, 3, 9, 9, 16, 3, 2, 1, torch.float32, device)
    x = given.pop("x")
    if not uint8:
        assert_nan_stays_in_its_sample(lambda x: conv_bn_relu_max_pool(x, **given), x)
        return
    # no byte is NaN: a mean that is one reaches every window but through no padding
    given |= {
        "mean": torch.tensor([0.5, float("nan"), 0.5], device=device),
        "std": torch.ones(3, device=device),
    }
    pixels = torch.zeros_like(x, dtype=torch.uint8)
    with triton_forced():
        assert conv_bn_relu_max_pool(pixels, **given).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    given = inputs(3, 3, 9, 9, 16, 7, 2, 3, dtype, device)
    x = given.pop("x")
    with tuning.force_config(OP, kernels.candidate_configs(dtype, "sm_90")[-1]):
        assert_batch_invariant(lambda x: conv_bn_relu_max_pool(x, **given), x)


def test_the_order_of_programs_does_not_matter(device):
    given = inputs(2, 3, 12, 64, 40, 3, 2, 1, torch.float32, device)
    with tuning.force_config(OP, kernels.candidate_configs(torch.float32, "interpreter")[-1]):
        assert_order_does_not_matter(lambda: conv_bn_relu_max_pool(**given))


def schema(given):
    """The operator's arguments of a call of the public function."""
    taken = []
    parts = CONV_BN_RELU_MAX_POOL.parts
    CONV_BN_RELU_MAX_POOL.parts = lambda *args: taken.append(args)
    try:
        with torch.no_grad(), backend.use_backend("auto"):
            conv_bn_relu_max_pool(**given)
    finally:
        CONV_BN_RELU_MAX_POOL.parts = parts
    return taken[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pool_size": 2, "pool_padding": 0}, "a pool of size, stride and padding"),
        ({"pool_stride": 1}, "a pool of size, stride and padding"),
        ({"weight": torch.zeros(16, 18, 3, 3), "x": torch.zeros(1, 18, 9, 9)}, "windows of 162 elements"),
    ],
    ids=str,
)
def test_what_the_kernel_leaves_to_its_parts(change, reason, device):
    given = inputs(1, 3, 9, 9, 16, 3, 2, 1, torch.float32, device)
    given |= {
        name: randn(*v.shape, device=device) if isinstance(v, torch.Tensor) else v
        for name, v in change.items()
    }
    assert reason in CONV_BN_RELU_MAX_POOL.unsupported(*schema(given))
    with triton_forced(), backend.observe() as ran:
        check_op(conv_bn_relu_max_pool, twin, given, backward=False)
    assert set(ran) == {("conv_bn_relu", "triton"), ("max_pool", "triton")}


def test_images_that_32_bits_cannot_address():
    meta = torch.zeros(1, device="meta")
    given = {"weight": meta.expand(1, 1, 3, 3), "bn": BatchNorm(), "stride": 1, "padding": 1, **POOL}
    wide = torch.empty_strided((1, 1, 2**12, 8), (0, 0, 2**20, 1), device="meta")
    assert "an image spans" in CONV_BN_RELU_MAX_POOL.unsupported(*schema(given | {"x": wide}))
    many = meta.expand(2**22, 1, 64, 64)
    assert "elements of the result" in CONV_BN_RELU_MAX_POOL.unsupported(*schema(given | {"x": many}))


def test_compiles_and_exports(device):
    # a pool that the kernel leaves to its parts, which a compiled graph always has
    given = inputs(2, 3, 9, 9, 16, 3, 2, 1, torch.float32, device) | {"pool_stride": 1}
    tensors = [given.pop(name).requires_grad_() for name in ("x", "weight")]
    assert_compiles(lambda x, weight: conv_bn_relu_max_pool(x, weight, **given), tensors)


@pytest.mark.parametrize("uint8", [False, True])
def test_the_operator_is_described_right(uint8, device):
    x, weight, *others = schema(inputs(2, 3, 9, 9, 16, 3, 2, 1, torch.float32, device, uint8=uint8))
    with triton_forced():
        weight = weight.detach().requires_grad_()
        torch.library.opcheck(CONV_BN_RELU_MAX_POOL.overload, (x, weight, *others))


@pytest.mark.parametrize("uint8", [False, True])
def test_autocast_is_eagers(uint8, device):
    given = inputs(2, 3, 9, 9, 16, 3, 2, 1, torch.float32, device, uint8=uint8)
    if not uint8:
        assert_autocast(conv_bn_relu_max_pool, twin, **given)
        return
    with triton_forced():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            cast = conv_bn_relu_max_pool(**given)
        assert torch.equal(cast, conv_bn_relu_max_pool(**given | {"weight": given["weight"].bfloat16()}))


PIXELS = torch.zeros(2, 3, 9, 9, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x must be a torch.Tensor; got NoneType"),
        ({"x": torch.zeros(2, 4, 9, 9)}, r"x must be \[N, 3, H, W\] for a weight of \[16, 3, 3, 3\]; got"),
        ({"x": torch.zeros(2, 3, 1, 9), "padding": 0}, r"x must be at least 3 x 3 \(the window\)"),
        ({"x": PIXELS}, "mean must be given for uint8 images; got None"),
        ({"mean": torch.zeros(3)}, "mean is for uint8 images only; got torch.float32"),
        (
            {"x": PIXELS, "mean": torch.zeros(3), "std": torch.zeros(2)},
            r"std must have shape \[3\]; got \[2\]",
        ),
        ({"weight": torch.zeros(16, 3)}, r"weight must be \[out_channels, C, kh, kw\]; got \[16, 3\]"),
        ({"weight": torch.zeros(16, 3, 3, 3).half()}, "weight must be torch.float32, as the operands are"),
        ({"bn": BatchNorm(torch.zeros(15))}, r"bn.weight must have shape \[16\]; got \[15\]"),
        ({"bn": BatchNorm(running_var=torch.zeros(16))}, "bn.running_mean must be given with its companion"),
        ({"stride": 0}, "stride must be one or two integers of at least 1; got 0"),
        ({"padding": -1}, "padding must be one or two integers of at least 0; got -1"),
        ({"pool_size": 0}, "pool_size must be one or two integers of at least 1; got 0"),
        ({"pool_padding": 2}, r"pool_padding must be at most half of pool_size \[3, 3\]; got \[2, 2\]"),
        (
            {"pool_size": 9},
            r"x must give a map of at least \[9, 9\] \(pool_size\) with pool_padding \[1, 1\]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_bad_input_names_the_argument(change, message, mode):
    given = {"x": torch.zeros(2, 3, 9, 9), "weight": torch.zeros(16, 3, 3, 3), "bn": BatchNorm()}
    given |= {"stride": 2, "padding": 1, **POOL}
    with backend.use_backend(mode), pytest.raises(ValueError, match=f"{OP}: {message}"):
        conv_bn_relu_max_pool(**(given | change))


def test_float64_runs_in_pytorch(device):
    given = inputs(1, 3, 9, 9, 16, 3, 2, 1, torch.float64, device)
    assert "dtype" in CONV_BN_RELU_MAX_POOL.unsupported(*schema(given))
    assert torch.equal(conv_bn_relu_max_pool(**given), twin(**given))


def test_flops_and_bytes(device):
    from torch.utils.flop_counter import FlopCounterMode

    given = inputs(2, 3, 9, 9, 16, 3, 2, 1, torch.float32, device)
    with triton_forced(), FlopCounterMode(display=False) as counter:
        conv_bn_relu_max_pool(**given)
    assert counter.get_total_flops() == 2 * (2 * 5 * 5 * 16) * 27
    moved = 2 * 3 * 81 + 16 * 27 + 4 * 16 + 2 * 16 * 3 * 3
    assert CONV_BN_RELU_MAX_POOL.cost(*schema(given)).bytes == 4 * moved
