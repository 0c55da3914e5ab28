from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import (
    DTYPES,
    assert_autocast,
    assert_batch_invariant,
    assert_compiles,
    assert_nan_stays_in_its_sample,
    randn,
    triton_forced,
)

from fastvr import backend, tuning
from fastvr.ops.layernorm_mlp import LAYERNORM_MLP, layernorm_mlp
from fastvr.reference.layernorm_mlp import layernorm_mlp as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import common
from fastvr.kernels import linear as kernels


def inputs(rows, d, hidden, dtype, device, act="gelu", gamma=True):
    x = randn(*rows, d, dtype=dtype, device=device)
    given = {
        "x": x,
        "ln_weight": randn(d, dtype=dtype, device=device),
        "ln_bias": randn(d, dtype=dtype, device=device),
        "fc1_weight": randn(hidden, d, dtype=dtype, device=device) * d**-0.5,
        "fc1_bias": randn(hidden, dtype=dtype, device=device),
        "fc2_weight": randn(d, hidden, dtype=dtype, device=device) * hidden**-0.5,
        "fc2_bias": randn(d, dtype=dtype, device=device),
        "residual": randn(*rows, d, dtype=dtype, device=device),
        "act": act,
        "eps": 1e-6,
    }
    if gamma:
        given["gamma"] = randn(d, dtype=dtype, device=device)
    return given


def check(given, **options):
    with triton_forced():
        return check_op(layernorm_mlp, reference, given, name="layernorm_mlp", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "hidden"), [(31, 64), (192, 768), (384, 100), (1023, 65)])
def test_widths(d, hidden, dtype, device):
    check(inputs((2, 25), d, hidden, dtype, device), backward=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["none", "relu", "gelu", "gelu_tanh", "quick_gelu"])
def test_gradients(act, dtype, device):
    given = inputs((3, 7), 40, 72, dtype, device, act)
    for value in given.values():
        if isinstance(value, torch.Tensor):
            value.requires_grad_()
    check(given, sample_inputs=("x", "residual"))


def test_gradients_are_the_kernels_and_add_the_residual_in_their_launch(device):
    given = inputs((3, 7), 40, 72, torch.float32, device, gamma=False)
    del given["residual"]
    for value in given.values():
        if isinstance(value, torch.Tensor):
            value.requires_grad_()
    with triton_forced(), backend.observe() as ran:
        check_op(
            lambda x, **rest: layernorm_mlp(x, residual=x, **rest),
            lambda x, **rest: reference(x, residual=x, **rest),
            given,
        )
        assert {op for op, how in ran if how == "triton"} == {
            "layernorm_mlp_training",
            "linear_act_backward",
            "linear_weight_backward",
            "linear",
            "layer_norm_backward",
        }
        y = layernorm_mlp(given["x"], residual=given["x"], **{k: v for k, v in given.items() if k != "x"})
    # x, what the activation is given, the rows' moments, and parameters: no normalised and no activated rows
    kept = sorted({(tuple(t.shape)) for t in y.grad_fn.saved_tensors} - {(40,), (72, 40), (40, 72)})
    assert kept == [(3, 7, 40), (21, 2), (21, 72)]


_WANTED = ("x", "ln_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "gamma", "residual")


@pytest.mark.parametrize("wanted", [(name,) for name in _WANTED] + [("fc1_bias", "fc2_bias")], ids=str)
def test_only_what_is_asked_for_is_computed(wanted, device):
    given = inputs((3, 7), 40, 72, torch.float32, device)
    for name in wanted:
        given[name].requires_grad_()
    with backend.observe() as ran:
        check(given, sample_inputs=("x", "residual"))
    before = bool({"x", "ln_bias", "fc1_weight", "fc1_bias"} & set(wanted))
    weights = len({"fc1_weight", "fc2_weight", "gamma"} & set(wanted))
    assert ran["linear_act_backward", "triton"] == before
    assert ran["linear_weight_backward", "triton"] == weights
    assert ran["layer_norm_backward", "triton"] == bool({"x", "ln_bias"} & set(wanted))


@pytest.mark.parametrize("missing", ["ln_bias", "fc1_bias", "fc2_bias", "residual"])
def test_optional_parts(missing, device):
    given = inputs((3, 7), 40, 72, torch.bfloat16, device, gamma=False)
    given[missing] = None
    check(given, backward=False)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(arch, dtype, device):
    given = inputs((2, 70), 100, 130, dtype, device)
    for config in kernels.candidate_configs(dtype, arch, kind="layernorm_linear"):
        with tuning.force_config("layernorm_linear", config):
            check(given, backward=False)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_configuration_of_training(arch, dtype, device):
    given = inputs((2, 70), 100, 130, dtype, device)
    given["fc2_bias"].requires_grad_()
    for config in kernels.candidate_configs(dtype, arch, kind="act_linear"):
        with tuning.force_config("act_linear", config):
            check(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_of_many_deviations(dtype, device):
    given = inputs((2, 9), 192, 64, dtype, device)
    given["x"] = given["x"] + 1000
    check(given, backward=False)


def test_two_launches(device):
    launches = []
    with triton_forced(), common.record_launches(lambda *launch: launches.append(launch)):
        LAYERNORM_MLP.kernel(*_schema_order(inputs((2, 9), 64, 128, torch.float16, device)))
    assert len(launches) == 2


def test_strided_rows(device):
    given = inputs((3, 9), 64, 48, torch.float32, device)
    given["x"] = randn(3, 12, 64, device=device)[:, 2:11]
    check(given, backward=False)
    given["x"], given["residual"] = given["x"][:, 0], given["residual"][:, 1]
    check(given, backward=False)
    for name in ("ln_weight", "ln_bias", "fc1_bias", "fc2_bias", "gamma"):
        given[name] = given[name].repeat_interleave(2)[::2]
    check(given, backward=False)


@pytest.mark.parametrize("rows", [(0, 5), (1, 1)], ids=str)
def test_few_rows(rows, device):
    given = inputs(rows, 16, 32, torch.float32, device)
    with triton_forced():
        y = layernorm_mlp(**given)
    assert y.shape == (*rows, 16)
    torch.testing.assert_close(y, reference(**given))


def test_nan_stays_in_its_sample(device):
    given = inputs((5, 7), 48, 24, torch.float32, device)
    del given["x"], given["residual"]
    assert_nan_stays_in_its_sample(
        lambda x: layernorm_mlp(x, residual=x, **given), randn(5, 7, 48, device=device)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    given = inputs((9, 7), 48, 24, dtype, device)
    x = given.pop("x")
    del given["residual"]
    config = kernels.candidate_configs(dtype, "sm_90")[-1]
    with tuning.force_config("layernorm_linear", config), tuning.force_config("linear", config):
        assert_batch_invariant(lambda x: layernorm_mlp(x, residual=x, **given), x)


def _schema_order(given):
    names = "x ln_weight ln_bias fc1_weight fc1_bias fc2_weight fc2_bias gamma residual eps act"
    return [given[name] for name in names.split()]


def test_compiles_and_exports(device):
    tensors = [t.requires_grad_() for t in _schema_order(inputs((2, 5), 24, 32, torch.float32, device))[:-2]]

    def call(*args):
        return layernorm_mlp(*args[:7], gamma=args[7], residual=args[8], eps=1e-6, act="gelu")

    assert_compiles(call, tensors)
    with triton_forced():
        torch.library.opcheck(LAYERNORM_MLP.overload, (*tensors, 1e-6, "gelu"))


def test_autocast_is_eagers(device):
    def eager(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, act, eps, gamma):
        hidden = F.layer_norm(x, ln_weight.shape, ln_weight, ln_bias, eps)
        hidden = F.gelu(F.linear(hidden, fc1_weight, fc1_bias))
        return residual + F.linear(hidden, fc2_weight, fc2_bias) * gamma

    assert_autocast(layernorm_mlp, eager, **inputs((4, 40), 24, 32, torch.float32, device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ln_weight": torch.zeros(9)}, r"ln_weight must be \[features\]"),
        ({"fc1_weight": torch.zeros(8, 9)}, r"fc1_weight must be \[hidden, 16\]; got \[8, 9\]"),
        (
            {"fc1_weight": torch.zeros(32, 16, dtype=torch.float16)},
            "fc1_weight must be torch.float32, as x is",
        ),
        ({"fc2_weight": torch.zeros(16, 31)}, r"fc2_weight must be \[out_features, 32\]; got \[16, 31\]"),
        ({"fc1_bias": torch.zeros(31)}, r"fc1_bias must have shape \[32\]; got \[31\]"),
        ({"fc2_bias": torch.zeros(15)}, r"fc2_bias must have shape \[16\]; got \[15\]"),
        ({"gamma": torch.zeros(15)}, r"gamma must have shape \[16\]; got \[15\]"),
        ({"residual": torch.zeros(2, 5, 15)}, r"residual must have shape \[2, 5, 16\]; got \[2, 5, 15\]"),
        ({"act": "silu"}, "act must be one of"),
        ({"eps": -1.0}, "eps must be at least 0"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    given = inputs((2, 5), 16, 32, torch.float32, "cpu") | change
    for mode in ("triton", "reference"):
        with backend.use_backend(mode), pytest.raises(ValueError, match=f"layernorm_mlp: {message}"):
            layernorm_mlp(**given)
