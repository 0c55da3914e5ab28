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
    randn,
    triton_forced,
)

from fastvr import backend, tuning
from fastvr.ops.layer_norm import LAYER_NORM, layer_norm
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
