from __future__ import annotations

import pytest
import torch
from contract import (
    DTYPES,
    assert_autocast,
    assert_batch_invariant,
    assert_compiles,
    assert_nan_stays_in_its_sample,
    assert_order_does_not_matter,
    randn,
    triton_forced,
)

from fastvr import backend, tuning
from fastvr.ops.swiglu import SWIGLU, SWIGLU_BACKWARD, swiglu
from fastvr.reference.swiglu import swiglu as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import swiglu as kernels


def check(x, **options):
    with triton_forced():
        return check_op(swiglu, reference, {"x": x}, name="swiglu", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 31, 192, 1500])
def test_widths_and_gradients(n, dtype, device):
    with backend.observe() as ran:
        check(randn(3, 5, 2 * n, dtype=dtype, device=device, requires_grad=True))
    assert ran["swiglu", "triton"] == ran["swiglu_backward", "triton"] == 1


@pytest.mark.parametrize("rows", [(), (1,), (130,), (2, 3, 5)], ids=str)
def test_rows(rows, device):
    check(randn(*rows, 64, dtype=torch.bfloat16, device=device), backward=False)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
def test_every_configuration(arch, device):
    x = randn(5, 90, dtype=torch.bfloat16, device=device, requires_grad=True)
    for config in kernels.candidate_configs(45, arch):
        with tuning.force_config("swiglu", config), tuning.force_config("swiglu_backward", config):
            check(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_arguments(dtype, device):
    points = [0.0, -30.0, 30.0, 1e4, -1e4, float("inf"), float("-inf"), float("nan")]
    gate = torch.cat([torch.linspace(-20, 20, 120), torch.tensor(points)]).to(dtype)
    x = torch.stack([gate, torch.full_like(gate, 0.75)], 1).to(device)
    check(x, backward=False, sample_dim=None)
    with triton_forced():
        check_op(
            lambda x: SWIGLU_BACKWARD(torch.ones_like(x[:, :1]), x),
            _eager_gradient,
            {"x": x},
            backward=False,
            sample_dim=None,
        )


def _eager_gradient(x):
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        return torch.autograd.grad(reference(leaf), leaf, torch.ones_like(x[:, :1]))[0]


def test_strided_inputs(device):
    wide = randn(4, 6, 200, device=device)
    check(wide[:, ::2, 10:74], backward=False)
    check(wide.transpose(1, 2)[..., :4], backward=False)
    check(wide[:1].expand(3, 6, 200), backward=False)


@pytest.mark.parametrize("n", [1, 2, 40])
def test_strided_upstream_gradients(n, device):
    x = randn(4, 3, 2 * n, device=device, requires_grad=True)
    expected = reference(x)
    for grad in (
        randn(4, 3, 2 * n, device=device)[..., ::2],
        randn(4, 3, n + 1, device=device)[..., 1:],
        randn(3, 4, n, device=device).transpose(0, 1),
        randn(1, 1, n, device=device).expand(4, 3, n),
        randn(4, 3, 1, device=device).expand(4, 3, n),
    ):
        with triton_forced():
            (dx,) = torch.autograd.grad(swiglu(x), x, grad)
        (wanted,) = torch.autograd.grad(expected, x, grad, retain_graph=True)
        torch.testing.assert_close(dx, wanted)


def test_registrations(device):
    x = randn(3, 20, device=device, requires_grad=True)
    with triton_forced():
        torch.library.opcheck(SWIGLU.overload, (x,))
        torch.library.opcheck(SWIGLU_BACKWARD.overload, (randn(3, 10, device=device), x.detach()))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_nothing(shape, device):
    x = randn(*shape, device=device).requires_grad_()
    with triton_forced():
        y = swiglu(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.shape == (shape[0], shape[1] // 2)
    assert dx.shape == x.shape


def test_contract(device):
    x = randn(5, 7, 96, device=device)
    assert_nan_stays_in_its_sample(swiglu, x)
    with tuning.force_config("swiglu", kernels.candidate_configs(48, "interpreter")[1]):
        assert_batch_invariant(swiglu, x)
        assert_order_does_not_matter(lambda: swiglu(x))
    assert_autocast(swiglu, reference, x=x)
    assert_compiles(swiglu, [x.clone().requires_grad_()])
    with triton_forced():
        y = swiglu(x.requires_grad_())
    # and not what the gate gives
    assert [t.shape for t in y.grad_fn.saved_tensors] == [x.shape]


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 5), torch.zeros(()), torch.zeros(2, 4, dtype=torch.int32), [1.0, 2.0]], ids=str
)
def test_bad_arguments_are_named(x):
    with pytest.raises(ValueError, match="swiglu: x must be"):
        swiglu(x)
