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

from fastvr import backend, tuning
from fastvr.ops.layer_norm import LAYER_NORM, LAYER_NORM_BACKWARD, layer_norm
from fastvr.reference.layer_norm import layer_norm as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import layer_norm as kernels


def check(given, **options):
    with triton_forced():
        return check_op(layer_norm, reference, given, name="layer_norm", **options)


def inputs(rows, n, dtype, device):
    return {
        "x": randn(*rows, n, dtype=dtype, device=device),
        "weight": randn(n, dtype=dtype, device=device),
        "bias": randn(n, dtype=dtype, device=device),
        "eps": 1e-6,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 31, 192, 384, 768, 1023, 1280, 1500, 8192, 10000])
def test_widths(n, dtype, device):
    check(inputs((3, 5), n, dtype, device), backward=False)


@pytest.mark.parametrize("rows", [(1,), (2,), (7,), (1025,), (2, 3, 5)], ids=str)
def test_rows(rows, device):
    check(inputs(rows, 192, torch.bfloat16, device), backward=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(bias, dtype, device):
    given = inputs((4, 9), 65, dtype, device)
    if not bias:
        del given["bias"]
    for value in given.values():
        if isinstance(value, torch.Tensor):
            value.requires_grad_()
    check(given)


@pytest.mark.parametrize("n", [1, 31, 768, 1500, 8192, 10000])
def test_gradients_of_widths_run_in_the_kernel(n, device):
    given = inputs((3, 7), n, torch.float16, device)
    for name in ("x", "weight", "bias"):
        given[name].requires_grad_()
    with backend.observe() as ran:
        check(given)
    # longer rows than registers hold are differentiated by PyTorch
    assert ran["layer_norm_backward", "triton" if n <= kernels.MAX_ROW else "reference"] == 1


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
@pytest.mark.parametrize("n", [96, 1500])
def test_every_backward_configuration(n, arch, device):
    given = inputs((5, 21), n, torch.bfloat16, device)
    for name in ("x", "weight", "bias"):
        given[name].requires_grad_()
    for config in kernels.candidate_bwd_configs(n, arch):
        with tuning.force_config("layer_norm_backward", config):
            check(given)


def test_more_rows_than_programs(monkeypatch, device):
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 3)
    given = inputs((61,), 40, torch.float32, device)
    for name in ("x", "weight", "bias"):
        given[name].requires_grad_()
    with tuning.force_config("layer_norm_backward", kernels.candidate_bwd_configs(40, "interpreter")[1]):
        check(given)


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("weight", "bias"), ("x", "weight")])
def test_only_what_is_asked_for_is_computed(wanted, device):
    given = inputs((4, 9), 65, torch.float32, device)
    for name in wanted:
        given[name].requires_grad_()
    check(given)
    grad = randn(4, 9, 65, device=device)
    with triton_forced():
        results = LAYER_NORM_BACKWARD(
            grad, given["x"].detach(), given["weight"].detach(), None, 1e-6, "x" in wanted, wanted != ("x",)
        )
    assert [result.numel() > 0 for result in results] == ["x" in wanted, wanted != ("x",), wanted != ("x",)]


def test_gradients_of_strided_and_mixed_inputs(device):
    given = inputs((6, 10), 64, torch.bfloat16, device)
    given["x"] = randn(6, 20, 64, dtype=torch.bfloat16, device=device)[:, ::2].requires_grad_()
    given["weight"] = given["weight"].float().requires_grad_()
    given["bias"] = given["bias"].float().requires_grad_()
    check(given)


@pytest.mark.parametrize("rows", [(0,), (0, 5)], ids=str)
def test_gradients_of_nothing(rows, device):
    x, weight = randn(*rows, 16, device=device).requires_grad_(), randn(16, device=device).requires_grad_()
    with triton_forced():
        y = layer_norm(x, weight)
        dx, dweight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_gradients_do_not_depend_on_the_order_of_programs(device):
    x, weight, grad = randn(64, 48, device=device), randn(48, device=device), randn(64, 48, device=device)
    with tuning.force_config("layer_norm_backward", kernels.candidate_bwd_configs(48, "interpreter")[1]):
        assert_order_does_not_matter(
            lambda: torch.cat(
                [t.flatten() for t in LAYER_NORM_BACKWARD(grad, x, weight, None, 1e-6, True, True)]
            )
        )


def test_a_nan_in_the_gradient_stays_in_its_sample(device):
    x, weight = randn(5, 7, 48, device=device), randn(48, device=device)
    assert_nan_stays_in_its_sample(
        lambda grad: LAYER_NORM_BACKWARD(grad, x, weight, None, 1e-6, True, True)[0],
        randn(5, 7, 48, device=device),
    )


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
@pytest.mark.parametrize("n", [96, 1500, 9000])
def test_every_configuration(n, arch, device):
    given = inputs((2, 21), n, torch.float16, device)
    for config in kernels.candidate_configs(n, arch):
        with tuning.force_config("layer_norm", config):
            check(given, backward=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [768, 9000])
@pytest.mark.parametrize("mean", [100.0, 1000.0])
def test_mean_of_many_deviations(mean, n, dtype, device):
    """Sums of squares lose every digit here."""
    given = inputs((2, 5), n, dtype, device)
    given["x"] = given["x"] + mean
    check(given, backward=False)


def test_outlier_channels(device):
    given = inputs((2, 50), 768, torch.bfloat16, device)
    given["x"][..., 7] *= 50
    check(given, backward=False)


def test_layouts(device):
    whole = randn(3, 9, 64, device=device)
    weight, bias = randn(64, device=device), randn(64, device=device)
    for x in (
        whole[:, 0],
        whole[:, 2:],
        whole.transpose(0, 1),
        whole[:1].expand(3, 9, 64),
        randn(3, 64, 9, device=device).transpose(1, 2),
        randn(3, 9, 128, device=device)[..., ::2],
    ):
        check({"x": x, "weight": weight, "bias": bias}, backward=False)
    check({"x": whole, "weight": randn(128, device=device)[::2], "bias": bias.expand(64)}, backward=False)


def test_float32_parameters_and_results_beside_bfloat16(device):
    given = inputs((2, 20), 96, torch.bfloat16, device)
    given["weight"], given["bias"] = given["weight"].float(), given["bias"].float()
    check(given, backward=False)


def test_result_in_float32(device):
    given = inputs((2, 20), 96, torch.bfloat16, device)

    def in_float32(fn):  # the truth stays in float64
        return lambda x, **rest: fn(x, **rest, out_dtype=torch.promote_types(x.dtype, torch.float32))

    with triton_forced():
        check_op(in_float32(layer_norm), in_float32(reference), given, backward=False)


@pytest.mark.parametrize("rows", [(0,), (0, 5), (5, 0)], ids=str)
def test_empty(rows, device):
    with triton_forced():
        assert layer_norm(randn(*rows, 16, device=device), randn(16, device=device)).shape == (*rows, 16)


def test_nan_stays_in_its_sample(device):
    weight = randn(48, device=device)
    assert_nan_stays_in_its_sample(lambda x: layer_norm(x, weight), randn(5, 7, 48, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    weight = randn(96, dtype=dtype, device=device)
    with tuning.force_config("layer_norm", kernels.candidate_configs(96, "sm_90")[0]):
        assert_batch_invariant(lambda x: layer_norm(x, weight), randn(9, 5, 96, dtype=dtype, device=device))


def test_compiles_and_exports(device):
    tensors = [randn(2, 5, 24, device=device), randn(24, device=device), randn(24, device=device)]
    tensors = [t.requires_grad_() for t in tensors]
    assert_compiles(lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5), tensors)
    with triton_forced():
        torch.library.opcheck(LAYER_NORM.overload, (*tensors, 1e-5, None))
        torch.library.opcheck(LAYER_NORM.overload, (*tensors[:2], None, 1e-5, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_is_eagers(dtype, device):
    x, weight = randn(4, 40, 24, dtype=dtype, device=device), randn(24, dtype=dtype, device=device)
    assert_autocast(layer_norm, reference, x=x, weight=weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, "x must be float32, float16, bfloat16 or float64"),
        (
            {"weight": torch.zeros(7)},
            r"weight must be \[features\] for an x of \[\.\.\., features\]; got \[7\]",
        ),
        ({"weight": torch.zeros(8, dtype=torch.float16)}, "weight must be torch.float32 or float32"),
        ({"bias": torch.zeros(7)}, r"bias must have shape \[8\]; got \[7\]"),
        ({"bias": torch.zeros(8, dtype=torch.float16)}, "bias must be torch.float32"),
        ({"eps": -1.0}, "eps must be at least 0; got -1.0"),
        ({"eps": float("nan")}, "eps must be at least 0; got nan"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    given = {"x": torch.zeros(2, 8), "weight": torch.zeros(8), "bias": torch.zeros(8)} | change
    for mode in ("triton", "reference"):
        with backend.use_backend(mode), pytest.raises(ValueError, match=f"layer_norm: {message}"):
            layer_norm(**given)


def test_long_rows_take_the_sweeping_kernel():
    for arch in GRID.architectures:
        assert kernels.default_config(8193, arch)["BLOCK_N"] < 8193
        assert kernels.default_config(768, arch)["BLOCK_N"] == 1024
