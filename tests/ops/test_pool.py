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
from fastvr.ops.pool import AVG_POOL_LINEAR, MAX_POOL, avg_pool_linear, max_pool
from fastvr.reference import pool as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import pool as kernels

# c, height, width, window, stride, padding
WINDOWS = [
    (64, 14, 14, 3, 2, 1),
    (31, 7, 9, 3, 2, 1),
    (3, 31, 14, 2, None, 0),
    (1, 7, 7, 7, 1, 3),
    (512, 1, 1, 1, 1, 0),
    (20, 9, 7, (3, 2), (1, 2), (0, 1)),
]


def both(value):
    return (value, value) if isinstance(value, int) else value


def max_pool_twin(x, kernel_size, stride=None, padding=0):
    return reference.max_pool(
        x, both(kernel_size), both(kernel_size if stride is None else stride), both(padding)
    )


def check_max_pool(x, window, stride, padding):
    given = {"x": x, "kernel_size": window, "stride": stride, "padding": padding}
    with triton_forced():
        return check_op(max_pool, max_pool_twin, given, backward=False, name="max_pool")


def head(b, c, h, w, n, dtype, device, *, bias=True):
    given = {
        "x": randn(b, c, h, w, dtype=dtype, device=device).to(memory_format=torch.channels_last),
        "weight": (randn(n, c, device=device) * c**-0.5).to(dtype),
        "bias": randn(n, dtype=dtype, device=device),
    }
    return given if bias else {"x": given["x"], "weight": given["weight"]}


def check_head(given):
    with triton_forced():
        return check_op(
            avg_pool_linear, reference.avg_pool_linear, given, backward=False, name="avg_pool_linear"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WINDOWS, ids=str)
def test_max_pool_windows(shape, dtype, device):
    c, h, w, *window = shape
    check_max_pool(
        randn(2, c, h, w, dtype=dtype, device=device).to(memory_format=torch.channels_last), *window
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_max_pool_keeps_what_is_not_finite(value, dtype, device):
    x = randn(2, 20, 7, 6, dtype=dtype, device=device)
    x[0, :, 3, 3] = value
    x[1, 5] = value
    check_max_pool(x, 3, 2, 1)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_max_pool_every_configuration(arch, dtype, device):
    x = randn(2, 21, 9, 8, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    for config in kernels.max_pool_candidate_configs(dtype, arch):
        with tuning.force_config("max_pool", config):
            check_max_pool(x, 3, 2, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 64, 7, 7, 100), (3, 31, 1, 1, 5), (17, 70, 3, 5, 1), (2, 512, 4, 4, 130)]
)
def test_head_shapes(shape, dtype, device):
    check_head(head(*shape, dtype, device))


@pytest.mark.parametrize("arch", ["interpreter", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_every_configuration(arch, dtype, device):
    given = head(3, 72, 5, 3, 40, dtype, device)
    for config in kernels.avg_pool_linear_candidate_configs(dtype, arch):
        with tuning.force_config("avg_pool_linear", config):
            check_head(given)


@pytest.mark.parametrize("size", [1, 8, 64, 1000])
def test_default_is_a_candidate(size):
    for arch in GRID.architectures:
        for dtype in DTYPES:
            config = kernels.max_pool_default_config(size * 3136, size, dtype, arch)
            assert config in kernels.max_pool_candidate_configs(dtype, arch)
            config = kernels.avg_pool_linear_default_config(size, 1000, dtype, arch)
            assert config in kernels.avg_pool_linear_candidate_configs(dtype, arch)


def layouts(device):
    """[3, 20, 6, 5]: contiguous, channels_last, strided, an offset, H and W exchanged in memory, expanded."""
    yield randn(3, 20, 6, 5, device=device)
    yield randn(3, 20, 6, 5, device=device).to(memory_format=torch.channels_last)
    yield randn(6, 40, 12, 10, device=device)[::2, ::2, ::2, ::2]
    yield randn(4, 23, 8, 6, device=device).to(memory_format=torch.channels_last)[1:, 3:, 2:, 1:]
    yield randn(3, 20, 5, 6, device=device).transpose(2, 3)
    yield randn(1, 20, 6, 1, device=device).expand(3, 20, 6, 5)


@pytest.mark.parametrize("which", range(6))
def test_layouts(which, device):
    x = list(layouts(device))[which]
    check_max_pool(x, 3, 2, 1)
    check_head({"x": x, "weight": randn(8, 20, device=device), "bias": randn(16, device=device)[::2]})
    check_head({"x": x, "weight": randn(20, 8, device=device).t()})


def test_empty_batch_and_one_sample(device):
    with triton_forced():
        assert max_pool(randn(0, 8, 6, 6, device=device), 3, 2, 1).shape == (0, 8, 3, 3)
        given = head(0, 8, 6, 6, 5, torch.float32, device)
        assert avg_pool_linear(**given).shape == (0, 5)
    check_max_pool(randn(1, 8, 6, 6, device=device), 3, 2, 1)


def test_nan_stays_in_its_sample(device):
    x = randn(4, 20, 6, 6, device=device)
    weight = randn(8, 20, device=device)
    assert_nan_stays_in_its_sample(lambda x: max_pool(x, 3, 2, 1), x)
    assert_nan_stays_in_its_sample(lambda x: avg_pool_linear(x, weight), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    x = randn(4, 20, 6, 6, dtype=dtype, device=device)
    weight = randn(8, 20, dtype=dtype, device=device)
    with tuning.force_config("max_pool", kernels.max_pool_candidate_configs(dtype, "sm_90")[0]):
        assert_batch_invariant(lambda x: max_pool(x, 3, 2, 1), x)
    with tuning.force_config("avg_pool_linear", kernels.avg_pool_linear_candidate_configs(dtype, "sm_90")[0]):
        assert_batch_invariant(lambda x: avg_pool_linear(x, weight), x)


def test_the_order_of_programs_does_not_matter(device):
    x, weight = randn(20, 64, 4, 4, device=device), randn(80, 64, device=device)
    with tuning.force_config("max_pool", kernels.max_pool_candidate_configs(x.dtype, "sm_90")[-1]):
        assert_order_does_not_matter(lambda: max_pool(x, 3, 2, 1))
    config = kernels.avg_pool_linear_candidate_configs(x.dtype, "sm_90")[-1]
    with tuning.force_config("avg_pool_linear", config):
        assert_order_does_not_matter(lambda: avg_pool_linear(x, weight))


def test_compile_and_export(device):
    x = randn(2, 8, 5, 5, device=device).to(memory_format=torch.channels_last).requires_grad_()
    weight = randn(6, 8, device=device, requires_grad=True)
    bias = randn(6, device=device, requires_grad=True)
    assert_compiles(lambda x: max_pool(x, 3, 2, 1), [x])
    assert_compiles(avg_pool_linear, [x, weight, bias])
    with triton_forced():
        torch.library.opcheck(MAX_POOL.overload, (x, [3, 3], [2, 2], [1, 1]))
        torch.library.opcheck(AVG_POOL_LINEAR.overload, (x, weight, bias))
        torch.library.opcheck(AVG_POOL_LINEAR.overload, (x, weight, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_eagers(dtype, device):
    def eager(x, weight):
        return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight)

    x, weight = randn(8, 20, 6, 6, dtype=dtype, device=device), randn(16, 20, device=device)
    assert_autocast(avg_pool_linear, eager, x=x, weight=weight)
    assert_autocast(lambda x: max_pool(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1), x=x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 1}, "x must be a torch.Tensor; got int"),
        (
            {"x": torch.zeros(2, 8, 5, 5, dtype=torch.int64)},
            "x must be float32, float16, bfloat16 or float64",
        ),
        ({"x": torch.zeros(8, 5, 5)}, r"x must be \[N, C, H, W\] with C > 0; got \[8, 5, 5\]"),
        ({"x": torch.zeros(2, 8, 1, 5), "padding": 0}, r"x must be at least 3 x 3 \(the window\)"),
        ({"kernel_size": 0}, "kernel_size must be one or two integers of at least 1; got 0"),
        ({"stride": (2,)}, "stride must be one or two integers of at least 1"),
        ({"padding": -1}, "padding must be one or two integers of at least 0; got -1"),
        ({"padding": 2}, r"padding must be at most half of kernel_size \[3, 3\]; got \[2, 2\]"),
    ],
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_bad_input_to_max_pool_names_the_argument(change, message, mode):
    given = {"x": torch.zeros(2, 8, 5, 5), "kernel_size": 3, "stride": 2, "padding": 1} | change
    with backend.use_backend(mode), pytest.raises(ValueError, match=f"max_pool: {message}"):
        max_pool(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x must be a torch.Tensor; got NoneType"),
        ({"x": torch.zeros(2, 8)}, r"x must be \[N, 8, H, W\] for a weight of \[6, 8\]; got \[2, 8\]"),
        ({"x": torch.zeros(2, 8, 0, 3)}, r"x must be \[N, 8, H, W\]"),
        (
            {"x": torch.zeros(2, 7, 3, 3)},
            r"x must be \[N, 8, H, W\] for a weight of \[6, 8\]; got \[2, 7, 3, 3\]",
        ),
        ({"weight": torch.zeros(6)}, r"weight must be \[out_features, C\]; got \[6\]"),
        ({"weight": torch.zeros(6, 8).half()}, "weight must be torch.float32, as the operands are"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \[6\]; got \[5\]"),
        ({"bias": torch.zeros(6).half()}, "bias must be torch.float32, as the operands are"),
        ({"bias": torch.zeros(6, device="meta")}, "bias must be on cpu, where x is; got meta"),
    ],
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_bad_input_to_the_head_names_the_argument(change, message, mode):
    given = {"x": torch.zeros(2, 8, 3, 3), "weight": torch.zeros(6, 8), "bias": torch.zeros(6)} | change
    with backend.use_backend(mode), pytest.raises(ValueError, match=f"avg_pool_linear: {message}"):
        avg_pool_linear(**given)


def test_float64_has_no_kernel(device):
    x, weight = randn(2, 8, 4, 4, device=device).double(), randn(6, 8, device=device).double()
    with (
        triton_forced(),
        pytest.raises(backend.BackendError, match="max_pool: no Triton kernel runs here: dtype"),
    ):
        max_pool(x, 3)
    with triton_forced(), pytest.raises(backend.BackendError, match="avg_pool_linear: no Triton kernel runs"):
        avg_pool_linear(x, weight)
    assert torch.equal(max_pool(x, 3), max_pool_twin(x, 3))
    assert torch.equal(avg_pool_linear(x, weight), reference.avg_pool_linear(x, weight))


def test_flops_are_the_classifiers(device):
    from torch.utils.flop_counter import FlopCounterMode

    x = randn(3, 8, 4, 4, device=device)
    with triton_forced(), FlopCounterMode(display=False) as counter:
        max_pool(x, 3)
        avg_pool_linear(x, randn(5, 8, device=device))
    assert counter.get_total_flops() == 2 * 3 * 8 * 5
