"""The gradients of linear, by kernels: of its parameters, of its input, and through an activation."""

from __future__ import annotations

import pytest
import torch
from contract import (
    DTYPES,
    assert_compiles,
    assert_nan_stays_in_its_sample,
    assert_order_does_not_matter,
    randn,
    triton_forced,
)

from fastvr import backend, tuning
from fastvr.ops.linear import linear
from fastvr.ops.linear_act_backward import LINEAR_ACT_BACKWARD
from fastvr.ops.linear_backward import LINEAR_WEIGHT_BACKWARD
from fastvr.reference.layer_norm import layer_norm, row_moments
from fastvr.reference.linear import activate
from fastvr.reference.linear import linear as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import linear as linear_kernels
from fastvr.kernels import linear_backward as kernels

PARTS = ("x", "weight", "bias", "gamma", "residual")


def eager(x, weight, bias=None, *, act="none", gamma=None, residual=None):
    return reference(x, weight, bias, gamma, residual, act)


def inputs(rows, k, n, dtype, device, *, wanted=PARTS, **rest):
    given = {
        "x": randn(*rows, k, dtype=dtype, device=device),
        "weight": randn(n, k, dtype=dtype, device=device) * k**-0.5,
        "bias": randn(n, dtype=dtype, device=device),
        "gamma": randn(n, dtype=dtype, device=device),
        "residual": randn(*rows, n, dtype=dtype, device=device),
    } | rest
    for name in wanted:
        if given[name] is not None:
            given[name].requires_grad_()
    return given


def check(given):
    with triton_forced(), backend.observe() as ran:
        check_op(linear, eager, given, name="linear", sample_inputs=("x", "residual"))
    return ran


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize(("k", "n"), [(192, 257), (31, 65), (1, 1)], ids=str)
def test_widths(k, n, gamma, dtype, device):
    rest = {} if gamma else {"gamma": None}
    ran = check(inputs((3, 21), k, n, dtype, device, **rest))
    assert ran["linear_weight_backward", "triton"] == 1
    # forward, and x's gradient
    assert ran["linear", "triton"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh", "quick_gelu"])
def test_through_an_activation(act, dtype, device):
    check(inputs((3, 21), 48, 70, dtype, device, act=act))
    check(inputs((3, 21), 48, 70, dtype, device, act=act, wanted=("weight",), gamma=None))


@pytest.mark.parametrize(
    "wanted", [(name,) for name in PARTS] + [("weight", "bias"), ("x", "gamma")], ids=str
)
def test_only_what_is_asked_for_is_computed(wanted, device):
    ran = check(inputs((2, 9), 40, 24, torch.float32, device, wanted=wanted))
    assert ran["linear_weight_backward", "triton"] == bool({"weight", "gamma"} & set(wanted))
    assert ran["linear", "triton"] == 1 + ("x" in wanted)


def test_what_is_kept(device):
    """A frozen weight needs no x, a frozen x no weight."""
    for wanted, expected in (("x", {(24, 40)}), ("weight", {(18, 40)}), ("bias", set()), ("residual", set())):
        given = inputs((18,), 40, 24, torch.float32, device, wanted=(wanted,), gamma=None)
        with triton_forced():
            y = linear(**given)
        assert {tuple(tensor.shape) for tensor in y.grad_fn.saved_tensors} == expected


@pytest.mark.parametrize(
    ("dtype", "arch"),
    [(torch.float32, "sm_90"), (torch.float16, "interpreter")]
    + [(torch.bfloat16, arch) for arch in ("sm_80", "sm_90", "sm_100", "gfx942")],
    ids=str,
)
@pytest.mark.parametrize("norm", [False, True])
def test_every_configuration(dtype, norm, arch, device):
    m, n, k = 300, 70, 100
    given = weight_inputs(m, n, k, dtype, device, norm=norm)
    # as many rows as split them
    for config in kernels.candidate_configs(dtype, arch, norm=norm, m=4096, n=n, k=k):
        small = config | ({"SPLIT_M": 3} if "SPLIT_M" in config else {})
        with tuning.force_config("linear_weight_backward", small):
            check_weights(given)


def weight_inputs(m, n, k, dtype, device, *, norm):
    x = randn(m, k, dtype=dtype, device=device)
    return {
        "grad": randn(m, n, dtype=dtype, device=device),
        "x": x,
        "ln_weight": randn(k, dtype=dtype, device=device) if norm else None,
        "ln_bias": randn(k, dtype=dtype, device=device) if norm else None,
    }


def check_weights(given, *, needs_bias=True, out_dtype=None):
    def eager(grad, x, ln_weight, ln_bias):
        if ln_weight is not None:
            x = layer_norm(x, ln_weight, ln_bias, 1e-6, grad.dtype)
        dtype = None if out_dtype is None else torch.promote_types(out_dtype, grad.dtype)
        return [(grad.t() @ x).to(dtype or grad.dtype), grad.sum(0).to(dtype or grad.dtype)]

    def ours(grad, x, ln_weight, ln_bias):
        moments = None if ln_weight is None else row_moments(x, 1e-6)
        return list(LINEAR_WEIGHT_BACKWARD(grad, x, ln_weight, ln_bias, moments, needs_bias, out_dtype))

    with triton_forced():
        check_op(ours, eager, given, backward=False, sample_dim=None)


def test_weights_of_strided_and_mixed_inputs(device):
    given = weight_inputs(60, 33, 65, torch.bfloat16, device, norm=True)
    given["x"] = randn(60, 130, device=device)[:, ::2]
    given["grad"] = randn(33, 60, dtype=torch.bfloat16, device=device).t()
    given["ln_weight"], given["ln_bias"] = randn(65, device=device), None
    check_weights(given)
    given["grad"] = randn(33, dtype=torch.bfloat16, device=device).expand(60, 33)
    check_weights(given, out_dtype=torch.float32)


def test_weights_of_no_rows(device):
    x, weight = randn(0, 8, device=device), randn(4, 8, device=device).requires_grad_()
    with triton_forced():
        (dweight,) = torch.autograd.grad(linear(x, weight), weight, torch.empty(0, 4, device=device))
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_weights_do_not_depend_on_the_order_of_programs(device):
    given = weight_inputs(300, 140, 130, torch.float32, device, norm=False)
    with tuning.force_config(
        "linear_weight_backward",
        kernels.candidate_configs(torch.float32, "interpreter", norm=False, m=300, n=140, k=130)[1],
    ):
        assert_order_does_not_matter(
            lambda: torch.cat(
                [t.flatten() for t in LINEAR_WEIGHT_BACKWARD(*given.values(), None, True, None)]
            )
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["none", "relu", "gelu", "gelu_tanh", "quick_gelu"])
def test_back_through_an_activation(act, dtype, device):
    check_act(act_inputs(61, 40, 100, dtype, device), act)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90", "gfx942"])
def test_every_configuration_through_an_activation(arch, device):
    given = act_inputs(130, 70, 140, torch.bfloat16, device)
    kind = "linear_act_backward"
    for config in linear_kernels.candidate_configs(torch.bfloat16, arch, kind=kind, m=130):
        with tuning.force_config(kind, config):
            check_act(given, "gelu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_derivatives_over_their_whole_range(act, dtype, device):
    hidden = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([0.0, 1e4, -1e4, float("nan")])])
    hidden = hidden.to(dtype).to(device)[:, None]
    one = torch.ones(1, 1, dtype=dtype, device=device)
    given = {"grad": one.expand(len(hidden), 1).contiguous(), "weight": one, "hidden": hidden}
    check_act(given, act, sample_dim=None)


def act_inputs(m, n, k, dtype, device):
    return {
        "grad": randn(m, n, dtype=dtype, device=device),
        "weight": randn(n, k, dtype=dtype, device=device) * n**-0.5,
        "hidden": randn(m, k, dtype=dtype, device=device),
    }


def check_act(given, act, **options):
    def eager(grad, weight, hidden):
        with torch.enable_grad():
            leaf = hidden.clone().requires_grad_()
            activated = activate(leaf * 1, act)
            (dhidden,) = torch.autograd.grad(activated, leaf, grad @ weight)
        return [dhidden, activated.detach()]

    def ours(grad, weight, hidden):
        return list(LINEAR_ACT_BACKWARD(grad, weight, hidden, act, True))

    with triton_forced():
        check_op(ours, eager, given, backward=False, **options)


def test_a_nan_in_the_gradient_stays_in_its_sample(device):
    given = act_inputs(5, 40, 48, torch.float32, device)
    assert_nan_stays_in_its_sample(
        lambda grad: LINEAR_ACT_BACKWARD(grad, given["weight"], given["hidden"], "gelu", False)[0],
        given["grad"],
    )


def test_compiles(device):
    given = inputs((2, 9), 24, 40, torch.float32, device)
    assert_compiles(
        lambda *tensors: linear(*tensors[:3], gamma=tensors[3], residual=tensors[4]),
        [given[name] for name in PARTS],
    )


def test_second_derivatives_are_refused_by_name(device):
    given = inputs((2, 9), 24, 40, torch.float32, device, gamma=None)
    with (
        triton_forced(),
        pytest.raises(NotImplementedError, match=r"fastvr\.linear has no second derivative"),
    ):
        torch.autograd.grad(linear(**given).sum(), given["x"], create_graph=True)


def test_operators(device):
    with triton_forced():
        args = weight_inputs(20, 16, 24, torch.float32, device, norm=True)
        moments = row_moments(args["x"], 1e-6)
        torch.library.opcheck(
            torch.ops.fastvr.linear_weight_backward.default, (*args.values(), moments, True, torch.float32)
        )
        args = act_inputs(20, 16, 24, torch.float32, device)
        torch.library.opcheck(torch.ops.fastvr.linear_act_backward.default, (*args.values(), "gelu", True))
