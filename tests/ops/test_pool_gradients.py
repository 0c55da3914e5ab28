"""The gradients of max_pool and avg_pool_linear, and what is kept for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import DTYPES, assert_order_does_not_matter, randn, triton_forced

from fastvr import backend, tuning
from fastvr.ops.pool import AVG_POOL_LINEAR_TRAINING, MAX_POOL, MAX_POOL_TRAINING, avg_pool_linear, max_pool
from fastvr.ops.pool_backward import AVG_POOL_LINEAR_BACKWARD, MAX_POOL_BACKWARD
from fastvr.reference import pool as reference
from fastvr.testing import assert_parity, check_op

pytest.importorskip("triton")
from fastvr.kernels import pool as kernels
from fastvr.kernels import pool_backward as backward_kernels

MAX_POOL_OPS = ("max_pool_training", "max_pool_backward")
HEAD_OPS = ("avg_pool_linear_training", "avg_pool_linear_backward")
NAN, INF = float("nan"), float("inf")


def pairs(*values):
    return [[value, value] if isinstance(value, int) else list(value) for value in values]


def max_pool_twin(x, kernel_size, stride, padding):
    return reference.max_pool(x, *pairs(kernel_size, stride, padding))


def image(*shape, dtype=torch.float32, device="cpu"):
    x = randn(*shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    return x.requires_grad_()


def check_max_pool(x, window, stride, padding):
    given = {"x": x, "kernel_size": window, "stride": stride, "padding": padding}
    with triton_forced(), backend.observe() as ran:
        check_op(max_pool, max_pool_twin, given, name="max_pool")
    assert {ran[op, "triton"] for op in MAX_POOL_OPS} == {1}


def head(b, c, h, w, n, dtype, device, *, bias=True):
    given = {
        "x": image(b, c, h, w, dtype=dtype, device=device),
        "weight": (randn(n, c, device=device) * c**-0.5).to(dtype).requires_grad_(),
        "bias": randn(n, dtype=dtype, device=device, requires_grad=True),
    }
    return given if bias else {"x": given["x"], "weight": given["weight"]}


def check_head(given):
    with triton_forced(), backend.observe() as ran:
        check_op(avg_pool_linear, reference.avg_pool_linear, given, name="avg_pool_linear")
    assert {ran[op, "triton"] for op in HEAD_OPS} == {1}


@pytest.mark.parametrize("dtype", DTYPES)
def test_max_pool(dtype, device):
    check_max_pool(image(2, 20, 7, 6, dtype=dtype, device=device), 3, 2, 1)


@pytest.mark.parametrize(
    "pool",
    [(2, 2, 0), (2, 3, 1), (5, 1, 2), ((3, 2), (1, 2), (0, 1)), (1, 1, 0)],
    ids=str,
)
def test_windows(pool, device):
    check_max_pool(image(2, 3, 9, 7, device=device), *pool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_ties_and_what_is_not_finite_are_decided_as_pytorch_does_on_a_cpu(layout, dtype, device):
    values = torch.tensor([-INF, -1.0, 0.0, 0.0, 1.0, INF, NAN])
    x = values[torch.randint(len(values), (3, 5, 9, 8))].to(dtype)
    x[1] = -INF
    x[2] = 2.0
    # whole numbers, whose sums are exact in every order
    upstream = torch.randint(-3, 4, (3, 5, 5, 4)).to(dtype)
    x = x.contiguous(memory_format=layout).requires_grad_()
    (expected,) = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1), x, upstream)
    ours = x.detach().to(device).requires_grad_()
    with triton_forced():
        (found,) = torch.autograd.grad(max_pool(ours, 3, 2, 1), ours, upstream.to(device))
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
def test_every_configuration_of_max_pool(arch, device):
    x = image(2, 21, 9, 8, device=device)
    for config in kernels.max_pool_candidate_configs(x.dtype, arch):
        with tuning.force_config(MAX_POOL_OPS[0], config), tuning.force_config(MAX_POOL_OPS[1], config):
            check_max_pool(x, 3, 2, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 40, 3, 4, 12), (1, 3, 1, 1, 5), (17, 70, 2, 3, 1), (2, 130, 7, 7, 70)], ids=str
)
def test_head(shape, dtype, device):
    check_head(head(*shape, dtype, device))


def test_head_without_bias_and_strided(device):
    check_head(head(3, 40, 3, 4, 12, torch.float32, device, bias=False))
    x = randn(6, 20, 8, 6, device=device)[::2, :, 1::2, 1:].requires_grad_()
    given = {"x": x, "weight": randn(20, 8, device=device).t().requires_grad_()}
    check_head(given)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration_of_the_head(arch, dtype, device):
    given = head(3, 72, 2, 3, 40, dtype, device)
    for config in backward_kernels.avg_pool_linear_candidate_configs(dtype, arch):
        with tuning.force_config(HEAD_OPS[1], config):
            check_head(given)
    for config in kernels.avg_pool_linear_candidate_configs(dtype, arch):
        with tuning.force_config(HEAD_OPS[0], config):
            check_head(given)


@pytest.mark.parametrize("asked", ["x", "weight", "bias"])
def test_only_what_is_asked_for(asked, device):
    given, upstream = head(2, 8, 3, 3, 6, torch.float32, device), randn(2, 6, device=device)
    with triton_forced():
        everything = torch.autograd.grad(avg_pool_linear(**given), list(given.values()), upstream)
        for name, tensor in given.items():
            tensor.requires_grad_(name == asked)
        with backend.observe() as ran:
            (found,) = torch.autograd.grad(avg_pool_linear(**given), given[asked], upstream)
    assert torch.equal(found, everything[list(given).index(asked)])
    assert ran["avg_pool_linear_backward", "triton"] == (asked == "x")
    assert ran["linear_weight_backward", "triton"] == (asked == "weight")


def test_of_the_map_only_its_shape_is_kept(device):
    given, kept = head(2, 24, 9, 7, 6, torch.bfloat16, device), []
    with triton_forced(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda i: i):
        max_pool(given["x"], 3, 2, 1)
        avg_pool_linear(**given)
    assert [(t.dtype, t.shape) for t in kept] == [
        (torch.uint8, (2, 24, 5, 4)),
        (torch.bfloat16, given["weight"].shape),
        (torch.bfloat16, (2, 24)),
    ]


def test_an_empty_batch(device):
    given = head(0, 8, 4, 4, 6, torch.float32, device)
    with triton_forced():
        (dx,) = torch.autograd.grad(max_pool(given["x"], 3, 2, 1).sum(), given["x"])
        assert dx.shape == (0, 8, 4, 4)
        gradients = torch.autograd.grad(avg_pool_linear(**given).sum(), list(given.values()))
    assert [g.shape for g in gradients] == [t.shape for t in given.values()]
    assert not any(g.any() for g in gradients)


def test_a_window_of_too_many_taps_is_pytorchs(device):
    x = image(1, 2, 20, 18, device=device)
    y = F.max_pool2d(x, 17, 2, 8)
    # whole numbers, whose sums are exact in every order
    upstream = torch.randint(-3, 4, y.shape, device=device).float()
    (expected,) = torch.autograd.grad(y, x, upstream)
    with triton_forced(), pytest.raises(backend.BackendError, match="windows of 289 taps"):
        max_pool(x, 17, 2, 8)
    (found,) = torch.autograd.grad(max_pool(x, 17, 2, 8), x, upstream)
    assert torch.equal(found, expected)
    # a traced program's operator, which somebody differentiates
    with triton_forced():
        (found,) = torch.autograd.grad(MAX_POOL.overload(x, [17, 17], [2, 2], [8, 8]), x, upstream)
    assert torch.equal(found, expected)


def test_float32_maps_under_autocast(device):
    x, weight = image(3, 20, 3, 3, device=device), randn(6, 20, device=device, requires_grad=True)
    upstream = randn(3, 6, dtype=torch.bfloat16, device=device)

    def gradients(function, *tensors):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = function(*tensors)
        return torch.autograd.grad(y, tensors, upstream.to(y.dtype))

    def eager(x, weight):
        return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight)

    with triton_forced():
        ours = gradients(avg_pool_linear, x, weight)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = torch.autograd.grad(eager(*wide), wide, upstream.double())
    assert [g.dtype for g in ours] == [torch.float32, torch.float32]
    assert_parity(ours, gradients(eager, x, weight), exact, kind="gradient", sample_dim=None)


def test_the_order_of_programs_does_not_matter(device):
    given = head(17, 40, 5, 4, 40, torch.float32, device)
    x, upstream = given["x"], (randn(17, 40, 3, 2, device=device), randn(17, 40, device=device))

    def gradients():
        pooled = torch.autograd.grad(max_pool(x, 3, 2, 1), x, upstream[0])
        head = torch.autograd.grad(avg_pool_linear(**given), list(given.values()), upstream[1])
        return torch.cat([gradient.flatten() for gradient in (*pooled, *head)])

    small = kernels.max_pool_candidate_configs(x.dtype, "sm_90")[-1]
    tile = backward_kernels.avg_pool_linear_candidate_configs(x.dtype, "interpreter")[-1]
    with tuning.force_config(MAX_POOL_OPS[1], small), tuning.force_config(HEAD_OPS[1], tile):
        assert_order_does_not_matter(gradients)


def test_operators(device):
    given = head(2, 6, 5, 4, 3, torch.float32, device)
    x, weight, bias = given.values()
    pool = ([3, 3], [2, 2], [1, 1])
    with triton_forced():
        torch.library.opcheck(MAX_POOL_TRAINING.overload, (x, *pool))
        y, taps = (t.detach() for t in MAX_POOL_TRAINING(x, *pool))
        torch.library.opcheck(MAX_POOL_BACKWARD.overload, (torch.randn_like(y), taps, *pool, [5, 4]))
        torch.library.opcheck(AVG_POOL_LINEAR_TRAINING.overload, (x, weight, bias))
        torch.library.opcheck(
            AVG_POOL_LINEAR_BACKWARD.overload, (randn(2, 3, device=device), weight.detach(), [5, 4])
        )


def test_gradcheck(device):
    given = head(2, 3, 5, 4, 3, torch.float64, device)
    assert torch.autograd.gradcheck(avg_pool_linear, list(given.values()))
    assert torch.autograd.gradcheck(lambda x: max_pool(x, 3, 2, 1), [given["x"]])
    # and the references that stand where a kernel does not run
    grad = randn(2, 3, device=device).double()
    size, weight = [5, 4], given["weight"].detach()
    pooled = torch.autograd.grad(avg_pool_linear(given["x"], weight), given["x"], grad)[0]
    torch.testing.assert_close(reference.avg_pool_linear_backward(grad, weight, size), pooled)
    y, taps = reference.max_pool_training(given["x"], *pairs(3, 2, 1))
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, given["x"], grad)
    torch.testing.assert_close(reference.max_pool_backward(grad, taps, *pairs(3, 2, 1), size), expected)
