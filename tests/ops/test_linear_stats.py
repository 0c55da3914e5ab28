from __future__ import annotations

import pytest
import torch
from contract import DTYPES, assert_order_does_not_matter, randn, triton_forced

from fastvr import backend, tuning
from fastvr.ops.linear import linear
from fastvr.ops.linear_stats import LINEAR_STATS, linear_stats
from fastvr.reference.linear_stats import STATS_CHUNK, row_stats
from fastvr.reference.linear_stats import linear_stats as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import linear as kernels


def inputs(rows, k, n, dtype, device, **parts):
    given = {
        "x": randn(*rows, k, dtype=dtype, device=device),
        "weight": randn(n, k, dtype=dtype, device=device) * k**-0.5,
        "bias": randn(n, dtype=dtype, device=device),
        "gamma": randn(n, dtype=dtype, device=device),
        "residual": randn(*rows, n, dtype=dtype, device=device),
    }
    return {name: t for name, t in given.items() if parts.get(name, True)} | {"act": parts.get("act", "none")}


def check(given):
    with triton_forced():
        # the statistics lie by rows, the result by samples: one sample makes them agree
        return check_op(linear_stats, reference, given, backward=False, sample_dim=None, name="linear_stats")


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_stats_are_those_of_the_chunks(dtype):
    y = randn(2, 3, 150, dtype=dtype) + 5
    stats = row_stats(y)
    assert stats.shape == (6, 3, 2)
    assert stats.dtype == torch.float32
    for index, chunk in enumerate(y.reshape(6, 150).float().split(STATS_CHUNK, 1)):
        torch.testing.assert_close(stats[:, index, 0], chunk.mean(1))
        torch.testing.assert_close(stats[:, index, 1], chunk.var(1, correction=0) * chunk.shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(40, 1), (31, 64), (192, 65), (65, 192), (48, 300)])
def test_widths(k, n, dtype, device):
    check(inputs((2, 37), k, n, dtype, device))


@pytest.mark.parametrize("missing", [("bias",), ("gamma", "residual")])
@pytest.mark.parametrize("act", ["relu", "gelu_tanh"])
def test_parts_are_optional(missing, act, device):
    given = inputs((4, 9), 40, 130, torch.bfloat16, device, act=act, **dict.fromkeys(missing, False))
    check(given)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(arch, dtype, device):
    given = inputs((1, 70), 136, 200, dtype, device)
    for config in kernels.candidate_configs(dtype, arch, kind="linear_stats", m=20):
        with tuning.force_config("linear_stats", config):
            check(given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_value_as_stored(dtype, device):
    """With a mean of many deviations, those of the float32 accumulator would be far off."""
    given = inputs((1, 20), 32, 200, dtype, device, gamma=False)
    given["residual"] = given["residual"] + 100
    with triton_forced():
        y, stats = linear_stats(**given)
    torch.testing.assert_close(stats, row_stats(y), rtol=1e-4, atol=1e-4)
    check(given)


def test_the_result_is_linears(device):
    given = inputs((3, 7), 48, 100, torch.float16, device, act="gelu")
    config = kernels.candidate_configs(torch.float16, "sm_90")[-1]
    with triton_forced(), tuning.force_config("linear", config), tuning.force_config("linear_stats", config):
        assert torch.equal(linear_stats(**given)[0], linear(**given))


def test_strided_rows_and_a_float32_residual(device):
    given = inputs((6, 9), 64, 70, torch.bfloat16, device)
    given["x"] = randn(6, 12, 64, dtype=torch.bfloat16, device=device)[:, 2:11]
    given["residual"] = randn(6, 9, 140, device=device)[..., ::2]
    check(given)


@pytest.mark.parametrize("rows", [(0,), (0, 5), (5, 0)])
def test_empty(rows, device):
    with triton_forced():
        y, stats = linear_stats(randn(*rows, 16, device=device), randn(70, 16, device=device))
    assert y.shape == (*rows, 70)
    assert stats.shape == (0, 2, 2)


def test_nan_stays_in_its_row(device):
    given = inputs((5, 1), 48, 130, torch.float32, device)
    with triton_forced():
        clean = linear_stats(**given)
        given["x"] = given["x"].clone()
        given["x"][1, 0, 3] = float("nan")
        poisoned = linear_stats(**given)
    for before, after in zip(clean, poisoned, strict=True):
        assert torch.equal(after[[0, 2, 3, 4]], before[[0, 2, 3, 4]])
        assert after[1].isnan().all()


@pytest.mark.parametrize("part", [0, 1])
def test_order_and_batch_do_not_matter(part, device):
    x, weight = randn(90, 48, device=device), randn(130, 48, device=device)
    config = kernels.candidate_configs(torch.float32, "sm_90")[-1]
    with tuning.force_config("linear_stats", config), triton_forced():
        assert_order_does_not_matter(lambda: linear_stats(x, weight)[part])
        assert torch.equal(linear_stats(x, weight)[part][:1], linear_stats(x[:1], weight)[part])


def test_torch_library(device):
    given = inputs((2, 5), 24, 80, torch.bfloat16, device)
    args = [given[name] for name in ("x", "weight", "bias", "gamma", "residual", "act")]
    with triton_forced():
        torch.library.opcheck(LINEAR_STATS.overload, args)
        compiled = torch.compile(linear_stats, fullgraph=True, backend="aot_eager")
        for result, expected in zip(compiled(**given), linear_stats(**given), strict=True):
            assert torch.equal(result, expected)


def test_a_gradient_is_refused_by_name(device):
    x, weight = randn(4, 8, device=device, requires_grad=True), randn(6, 8, device=device)
    with triton_forced(), pytest.raises(NotImplementedError, match="linear_stats has no gradient"):
        linear_stats(x, weight)
    with triton_forced(), torch.no_grad():
        linear_stats(x, weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 7)}, r"x must be \[\.\.\., 8\]"),
        ({"weight": torch.zeros(4, 8, dtype=torch.float16)}, "weight must be torch.float32"),
        ({"residual": torch.zeros(2, 5)}, r"residual must have shape \[2, 4\]; got \[2, 5\]"),
        (
            {"act": "swish"},
            "act must be one of 'none', 'relu', 'gelu', 'gelu_tanh', 'quick_gelu'; got 'swish'",
        ),
    ],
)
def test_bad_input_names_the_argument(change, message):
    given = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8)} | change
    with backend.use_backend("triton"), pytest.raises(ValueError, match=f"linear_stats: {message}"):
        linear_stats(**given)
