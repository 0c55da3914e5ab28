from __future__ import annotations

import pytest
import torch
from contract import DTYPES, assert_compiles, assert_order_does_not_matter, randn, triton_forced

from fastvr import backend, tuning
from fastvr.ops.batch_norm_act_max_pool import (
    BATCH_NORM_ACT_MAX_POOL,
    BATCH_NORM_ACT_MAX_POOL_BACKWARD,
    batch_norm_act_max_pool,
)
from fastvr.reference.batch_norm_act_max_pool import batch_norm_act_max_pool as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import batch_norm_stats as kernels

OPS = ("batch_norm_act_max_pool", "batch_norm_act_max_pool_backward")
SEVERAL = kernels.candidate_configs(64, torch.float32, "interpreter")[1]
POOL = {"kernel_size": 3, "stride": 2, "padding": 1}


def inputs(shape, dtype, device, *, parameters=None, **pool):
    channels = shape[1]
    given = {
        "x": randn(*shape, dtype=dtype, device=device).to(memory_format=torch.channels_last),
        "weight": (1 + randn(channels) / 2).to(parameters or dtype).to(device),
        "bias": randn(channels, dtype=parameters or dtype, device=device),
    }
    return {name: t.requires_grad_() for name, t in given.items()} | POOL | pool


def twin(x, weight, bias, *, kernel_size, stride, padding, eps=1e-5):
    sizes = ([n, n] if isinstance(n, int) else list(n) for n in (kernel_size, stride, padding))
    return reference(x, weight, bias, eps, *sizes)[:3]


def check(given):
    with triton_forced(), backend.observe() as ran:
        check_op(batch_norm_act_max_pool, twin, given, name="batch_norm_act_max_pool")
    assert {ran[op, "triton"] for op in OPS} == {1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 40, 9, 7), (1, 3, 15, 2)], ids=str)
def test_values_statistics_and_gradients(shape, dtype, device):
    check(inputs(shape, dtype, device))


@pytest.mark.parametrize(
    "pool",
    [
        {"kernel_size": 2, "stride": 2, "padding": 0},
        {"kernel_size": 2, "stride": 3, "padding": 1},
        {"kernel_size": 5, "stride": 1, "padding": 2},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1)},
    ],
    ids=str,
)
def test_windows(pool, device):
    check(inputs((2, 8, 9, 7), torch.float32, device, **pool))


def test_several_programs_and_parts(device):
    given = inputs((2, 48, 13, 11), torch.float16, device)
    with tuning.force_config(OPS[0], SEVERAL), tuning.force_config(OPS[1], SEVERAL):
        check(given)
        with triton_forced():
            assert_order_does_not_matter(lambda: batch_norm_act_max_pool(**given)[0])


def test_parameters_of_float32_and_an_image_that_is_not_channels_last(device):
    given = inputs((2, 6, 9, 7), torch.bfloat16, device, parameters=torch.float32)
    given["x"] = randn(2, 6, 9, 7, dtype=torch.bfloat16, device=device).requires_grad_()
    check(given)


def test_nan_is_the_maximum_and_lets_the_gradient_through(device):
    given = inputs((2, 8, 9, 7), torch.float32, device)
    with torch.no_grad():
        given["x"][1, 3, 4, 4] = float("nan")
    with triton_forced():
        y, *_ = batch_norm_act_max_pool(**given)
        (gradient,) = torch.autograd.grad(y, given["x"], torch.ones_like(y))
    # the channel's statistics are no numbers
    assert y[:, 3].isnan().all()
    assert gradient[:, 3].isnan().all()
    assert torch.isfinite(y[:, 4]).all()


@pytest.mark.parametrize("asked", ["x", "weight", "bias"])
def test_only_what_is_asked_for(asked, device):
    given = inputs((2, 8, 9, 7), torch.float32, device)
    upstream = randn(2, 8, 5, 4, device=device)
    with triton_forced():
        names = ("x", "weight", "bias")
        everything = torch.autograd.grad(
            batch_norm_act_max_pool(**given)[0], [given[name] for name in names], upstream
        )
        for name in names:
            given[name].requires_grad_(name == asked)
        (found,) = torch.autograd.grad(batch_norm_act_max_pool(**given)[0], given[asked], upstream)
    assert torch.equal(found, everything[names.index(asked)])


@pytest.mark.parametrize("name", ["grad", "mean", "var", "taps"])
def test_what_the_gradient_is_given_in_any_layout(name, device):
    x, weight, bias = (
        given.detach()
        for given in inputs((2, 8, 9, 7), torch.float32, device).values()
        if isinstance(given, torch.Tensor)
    )
    sizes = (1e-5, [3, 3], [2, 2], [1, 1])
    with triton_forced():
        y, mean, var, taps = BATCH_NORM_ACT_MAX_POOL(x, weight, bias, *sizes)
        given = {"grad": randn(*y.shape, device=device), "mean": mean, "var": var, "taps": taps}

        def gradients():
            rest = [given[name] for name in ("mean", "var", "taps")]
            return BATCH_NORM_ACT_MAX_POOL_BACKWARD(given["grad"], x, weight, bias, *rest, *sizes, True)

        expected, t = gradients(), given[name]
        given[name] = torch.stack([t, torch.zeros_like(t)], -1)[..., 0]
        assert all(map(torch.equal, gradients(), expected))


def test_what_is_kept(device):
    given, kept = inputs((2, 24, 9, 7), torch.bfloat16, device), []
    with triton_forced(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda i: i):
        y, *_ = batch_norm_act_max_pool(**given)
    maps = [(t.dtype, t.numel()) for t in kept if t.dim() == 4]
    assert maps == [(torch.bfloat16, given["x"].numel()), (torch.uint8, y.numel())]


def test_compiles_and_exports(device):
    given = inputs((2, 6, 9, 7), torch.float32, device)
    tensors = [given[name] for name in ("x", "weight", "bias")]
    assert_compiles(lambda x, w, b: batch_norm_act_max_pool(x, w, b, **POOL)[0], tensors)
    pool = (1e-5, [3, 3], [2, 2], [1, 1])
    with triton_forced():
        torch.library.opcheck(BATCH_NORM_ACT_MAX_POOL.overload, (*tensors, *pool))
        results = [t.detach() for t in BATCH_NORM_ACT_MAX_POOL(*tensors, *pool)]
        bare = [t.detach() for t in tensors]
        for needs_x in (True, False):
            args = (torch.randn_like(results[0]), *bare, *results[1:], *pool, needs_x)
            torch.library.opcheck(BATCH_NORM_ACT_MAX_POOL_BACKWARD.overload, args)


def test_gradcheck_of_the_reference(device):
    given = inputs((2, 2, 5, 4), torch.float64, device)
    tensors = [given[name] for name in ("x", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda *t: batch_norm_act_max_pool(*t, **POOL)[0], tensors)


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 9)}, r"x must be \[N, C, H, W\]; got \[2, 8, 9\]"),
        ({"weight": torch.zeros(7)}, r"weight must have shape \[8\]"),
        ({"bias": torch.zeros(8).half()}, "bias must be torch.float32"),
        ({"eps": 0.0}, "eps must be above 0; got 0.0"),
        ({"padding": 2}, r"padding must be at most half of kernel_size \[3, 3\]; got \[2, 2\]"),
        ({"stride": 0}, "stride must be one or two integers of at least 1; got 0"),
        ({"kernel_size": 12}, r"x must be at least \[12, 12\] \(the window\)"),
        ({"x": torch.zeros(1, 8, 1, 1)}, "Expected more than 1 value per channel when training"),
    ],
)
def test_bad_input_names_the_argument(change, message, mode):
    given = inputs((2, 8, 9, 7), torch.float32, torch.device("cpu")) | change
    with backend.use_backend(mode), pytest.raises(ValueError, match=message):
        batch_norm_act_max_pool(**given)


def test_what_has_no_kernel(device):
    with triton_forced(), pytest.raises(backend.BackendError, match="float64"):
        batch_norm_act_max_pool(**inputs((2, 8, 9, 7), torch.float64, device))
    with triton_forced(), pytest.raises(backend.BackendError, match="windows of 256 taps"):
        batch_norm_act_max_pool(**inputs((2, 8, 16, 16), torch.float32, device, kernel_size=16))
