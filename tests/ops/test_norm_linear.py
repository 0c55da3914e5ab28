from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import assert_batch_invariant, assert_order_does_not_matter, randn, triton_forced

from fastvr import backend, tuning
from fastvr.ops.linear_stats import linear_stats
from fastvr.ops.norm_linear import NORM_LINEAR, fold_norm, norm_linear
from fastvr.reference.linear import activate
from fastvr.reference.linear_stats import row_stats
from fastvr.reference.norm_linear import merge_row_stats
from fastvr.reference.norm_linear import norm_linear as reference
from fastvr.testing import GELU_TAIL, assert_parity, check_op

pytest.importorskip("triton")
from fastvr.kernels import linear as kernels

HALVES = [torch.float16, torch.bfloat16]
EPS = 1e-6


def parameters(k, n, dtype, device):
    """ln_weight, ln_bias, weight, bias."""
    return (
        randn(k, device=device).mul(0.5).add(1).to(dtype),
        randn(k, dtype=dtype, device=device),
        randn(n, k, dtype=dtype, device=device) * k**-0.5,
        randn(n, dtype=dtype, device=device),
    )


def inputs(rows, k, n, dtype, device, act="none"):
    x = randn(*rows, k, dtype=dtype, device=device)
    weight, colsum, bias = fold_norm(*parameters(k, n, dtype, device))
    given = {"x": x, "stats": row_stats(x), "weight": weight, "colsum": colsum, "bias": bias}
    return given | {"eps": EPS, "act": act}


def check(given):
    floor = GELU_TAIL if given["act"] == "gelu" else 0.0
    with triton_forced():
        return check_op(
            norm_linear, reference, given, backward=False, absolute_floor=floor, name="norm_linear"
        )


def unfolded(x, ln_weight, ln_bias, weight, bias, act):
    return activate(F.linear(F.layer_norm(x, ln_weight.shape, ln_weight, ln_bias, EPS), weight, bias), act)


def check_folding(x, given, act="none"):
    """Folded, against LayerNorm and linear one after the other."""
    eager = unfolded(x, *given, act)
    truth = unfolded(x.double(), *(t.double() for t in given), act)
    weight, colsum, bias = fold_norm(*given)
    with triton_forced():
        actual = norm_linear(x, row_stats(x), weight, colsum, bias, eps=EPS, act=act)
    assert_parity(
        actual, eager, truth, name="folded", sample_dim=0, absolute_floor=GELU_TAIL if act == "gelu" else 0.0
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("k", "n"), [(31, 64), (64, 31), (192, 65), (384, 130), (1100, 16)])
def test_widths(k, n, dtype, device):
    check(inputs((2, 37), k, n, dtype, device))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh", "quick_gelu"])
def test_activations(act, dtype, device):
    check(inputs((3, 50), 192, 96, dtype, device, act))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["plain", "outliers", "mean of 100 deviations"])
def test_folded_is_as_near_the_truth_as_unfolded(kind, dtype, device):
    given = parameters(384, 96, dtype, device)
    x = randn(60, 384, device=device)
    if kind == "outliers":
        x[:, [3, 77, 200]] *= 50
    elif kind != "plain":
        x += 100
    check_folding(x.to(dtype), given)
    check_folding(x.to(dtype), given, act="gelu")


def test_statistics_from_the_launch_before(device):
    """A block's border: proj with its residual and statistics, then the next layer."""
    rows, d = 40, 130
    x, residual = (randn(rows, d, dtype=torch.bfloat16, device=device) for _ in range(2))
    proj = randn(d, d, dtype=torch.bfloat16, device=device) * d**-0.5
    given = parameters(d, 70, torch.bfloat16, device)
    weight, colsum, bias = fold_norm(*given)
    with triton_forced():
        stream, stats = linear_stats(x, proj, residual=residual)
        actual = norm_linear(stream, stats, weight, colsum, bias, eps=EPS, act="gelu")
    eager, truth = (
        unfolded(stream.to(dtype), *(t.to(dtype) for t in given), "gelu")
        for dtype in (torch.bfloat16, torch.float64)
    )
    assert_parity(actual, eager, truth, name="block", sample_dim=0, absolute_floor=GELU_TAIL)


@pytest.mark.parametrize("width", [1, 40, 64, 150, 1100])
def test_chunks_merge_to_the_rows_statistics(width):
    x = torch.randn(9, width, dtype=torch.float64) * 3 + 1000
    mean, variance = merge_row_stats(row_stats(x), width)
    torch.testing.assert_close(mean, x.mean(1, keepdim=True))
    torch.testing.assert_close(variance, x.var(1, correction=0, keepdim=True), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("missing", ["ln_bias", "bias", "both"])
def test_folding_without_biases(missing):
    ln_weight, ln_bias, weight, bias = parameters(24, 10, torch.float16, "cpu")
    ln_bias = None if missing in ("ln_bias", "both") else ln_bias
    bias = None if missing in ("bias", "both") else bias
    folded, colsum, total = fold_norm(ln_weight, ln_bias, weight, bias)
    assert folded.dtype == torch.float16
    assert colsum.dtype == torch.float32
    assert (total is None) == (missing == "both")
    x = torch.randn(5, 24, dtype=torch.float64)
    given = (t if t is None else t.double() for t in (ln_weight, ln_bias, weight, bias))
    exact = unfolded(x, *given, "none")
    normed = F.layer_norm(x, (24,), eps=EPS)
    shift = 0 if total is None else total.double()
    torch.testing.assert_close(normed @ folded.double().T + shift, exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_configuration(arch, dtype, device):
    given = inputs((2, 35), 136, 200, dtype, device, act="gelu")
    for config in kernels.candidate_configs(dtype, arch, kind="norm_linear", m=20):
        with tuning.force_config("norm_linear", config):
            check(given)


def test_layouts(device):
    for x in (
        randn(6, 12, 64, device=device)[:, 2:11],
        randn(6, 9, 128, device=device)[..., ::2],
        randn(1, 9, 64, device=device).expand(6, 9, 64),
    ):
        given = inputs((6, 9), 64, 70, torch.bfloat16, device)
        x = x.to(torch.bfloat16)
        given |= {"x": x, "stats": row_stats(x)}
        given["colsum"] = given["colsum"].repeat_interleave(2)[::2]
        given["bias"] = given["bias"].to(torch.bfloat16).repeat_interleave(2)[::2]
        check(given)
    given["stats"] = given["stats"].repeat_interleave(2, 1)[:, ::2]
    given["bias"] = None
    check(given)


@pytest.mark.parametrize("rows", [(0,), (0, 5), (1, 1)])
def test_few_rows(rows, device):
    given = inputs(rows, 40, 70, torch.bfloat16, device)
    with triton_forced():
        assert norm_linear(**given).shape == (*rows, 70)
    if 0 not in rows:
        check(given)


def test_nan_stays_in_its_row(device):
    given = inputs((5, 1), 48, 130, torch.bfloat16, device)
    with triton_forced():
        clean = norm_linear(**given)
        given["x"] = given["x"].clone()
        given["x"][1, 0, 3] = float("nan")
        poisoned = norm_linear(**given | {"stats": row_stats(given["x"])})
    assert torch.equal(poisoned[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])
    assert poisoned[1].isnan().all()


def test_order_and_batch_do_not_matter(device):
    given = inputs((9, 7), 48, 130, torch.bfloat16, device)
    x = given.pop("x")
    del given["stats"]
    config = kernels.candidate_configs(torch.bfloat16, "sm_90")[-1]
    with tuning.force_config("norm_linear", config):
        assert_batch_invariant(lambda x: norm_linear(x, row_stats(x), **given), x)
        assert_order_does_not_matter(lambda: norm_linear(x, row_stats(x), **given))


@pytest.mark.parametrize("ln_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_on_meta_gives_the_same_kinds(ln_bias, bias) -> None:
    def given(size: int, there: bool) -> torch.Tensor | None:
        return torch.ones(size, dtype=torch.bfloat16) if there else None

    arguments = given(8, True), given(8, ln_bias), torch.ones(6, 8, dtype=torch.bfloat16), given(6, bias)
    on_meta = fold_norm(*(None if t is None else t.to("meta") for t in arguments))
    for real, meta in zip(fold_norm(*arguments), on_meta, strict=True):
        assert (real is None) == (meta is None)
        if real is not None:
            assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def test_torch_library(device):
    given = inputs((2, 5), 24, 80, torch.bfloat16, device, act="gelu")
    with triton_forced():
        torch.library.opcheck(NORM_LINEAR.overload, list(given.values()))
        compiled = torch.compile(norm_linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**given), norm_linear(**given))


def test_float32_has_no_kernel_and_runs_in_pytorch(device):
    x = randn(6, 40, device=device)
    given = parameters(40, 24, torch.float32, device)
    folded = fold_norm(*given)
    with triton_forced(), pytest.raises(backend.BackendError, match="float32: a LayerNorm folded into"):
        norm_linear(x, row_stats(x), *folded, eps=EPS)
    y = norm_linear(x, row_stats(x), *folded, eps=EPS)
    torch.testing.assert_close(y, unfolded(x, *given, "none"), rtol=1e-4, atol=1e-4)


def test_a_gradient_is_refused_by_name(device):
    given = inputs((2, 3), 8, 6, torch.bfloat16, device)
    given["weight"].requires_grad_()
    with triton_forced(), pytest.raises(NotImplementedError, match="norm_linear has no gradient"):
        norm_linear(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 7)}, r"x must be \[\.\.\., 8\] for a weight of \[4, 8\]; got \[2, 7\]"),
        ({"weight": torch.zeros(4, 8, 1)}, r"weight must be \[out_features, in_features\]"),
        ({"weight": torch.zeros(4, 8)}, "weight must be torch.bfloat16, as the operands are"),
        ({"stats": torch.zeros(2, 2, 2)}, r"stats must have shape \[2, 1, 2\] \(x's rows\); got \[2, 2, 2\]"),
        ({"stats": torch.zeros(2, 1, 2).half()}, "stats must be torch.float32"),
        ({"stats": None}, "stats must be a torch.Tensor; got NoneType"),
        ({"colsum": torch.zeros(5)}, r"colsum must have shape \[4\]; got \[5\]"),
        ({"colsum": torch.zeros(4).bfloat16()}, "colsum must be torch.float32"),
        ({"bias": torch.zeros(4).half()}, "bias must be torch.float32 or torch.bfloat16; got torch.float16"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"act": "swish"}, "act must be one of"),
    ],
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_bad_input_names_the_argument(change, message, mode):
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    given = {"x": x, "stats": torch.zeros(2, 1, 2), "weight": x.new_zeros(4, 8), "colsum": torch.zeros(4)}
    given |= {"bias": torch.zeros(4), "eps": EPS} | change
    with backend.use_backend(mode), pytest.raises(ValueError, match=f"norm_linear: {message}"):
        norm_linear(**given)
