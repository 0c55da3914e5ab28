"""The parity rule accepts what it must and, branch by branch, rejects what it must."""

import math

import pytest
import torch
from torch import nn

from fastvr import backend
from fastvr.testing import GELU_TAIL, assert_parity, check_op, measure_parity, truth_model


def _case(rows=8, cols=256, dtype=torch.bfloat16, seed=0):
    """Truth, and two independent roundings of it as eager and actual."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, rows, cols, generator=generator, dtype=torch.float64) * 1e-2
    return (truth + noise[0]).to(dtype), (truth + noise[1]).to(dtype), truth


def test_equal_tensors_pass_as_equal():
    _, eager, truth = _case()
    report = assert_parity(eager, eager, truth)
    assert report.passed
    assert 0 < report.ratio <= 1
    exact = torch.ones(3, 4)
    assert assert_parity(exact, exact, exact.double()).verdict == "equal"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1000), (7, 10), (2, 10), (64, 1), (4, 4096)])
def test_two_equally_good_implementations_pass(dtype, rows, cols):
    failures = [seed for seed in range(50) if not measure_parity(*_case(rows, cols, dtype, seed)).passed]
    assert failures == []


@pytest.mark.parametrize(("kind", "limit"), [("forward", 2.0), ("gradient", 3.0)])
def test_max_bound_is_sharp(kind, limit):
    truth = torch.zeros(1, 1000, dtype=torch.float64)
    truth[0, 0] = 1.0
    eager = truth.float()
    eager[0, 1] = 1e-3
    actual = truth.float()
    actual[0, 2] = limit * 1e-3 * 0.999
    # One element as large as that alone would break the RMS bound, which is not what is asked here.
    eager[0, 3:20] = actual[0, 3:20] = 9e-4
    assert_parity(actual, eager, truth, kind=kind)
    actual[0, 2] = limit * 1e-3 * 1.001
    with pytest.raises(AssertionError, match=r"breaks parity: max \("):
        assert_parity(actual, eager, truth, kind=kind)


def test_rms_bound_is_sharp():
    truth = torch.zeros(1, 1000, dtype=torch.float64)
    eager = torch.full((1, 1000), 1e-3)
    assert_parity(eager * 1.499, eager, truth)
    with pytest.raises(AssertionError, match=r"parity: RMS \(1"):
        assert_parity(eager * 1.501, eager, truth)


def test_small_tensors_get_a_wider_ratio_and_large_ones_do_not():
    for count, limit in ((1, 51.0), (25, 3.0), (100, 1.5), (10_000, 1.5)):
        eager = torch.full((1, count), 1e-3)
        truth = torch.zeros(1, count, dtype=torch.float64)
        assert measure_parity(eager * (limit - 1e-3), eager, truth).passed
        assert not measure_parity(eager * (limit + 1e-3), eager, truth).passed


def test_one_rounding_is_the_floor():
    truth = torch.linspace(1, 2, 1000, dtype=torch.float64).reshape(1, -1)
    eager = truth.to(torch.bfloat16)
    exact = measure_parity(eager, eager, truth).max_bound
    assert exact == pytest.approx(2 * 2**-8 + 2**-7, rel=0.1)  # twice eager's error, half a unit of 2
    representable = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64).repeat(1, 100)
    eager = representable.to(torch.bfloat16)
    actual = eager.clone()
    actual[0, 2] = 4.015625  # half a unit of 4 in bfloat16 would be 2**-6; a whole one is the next value
    assert not measure_parity(torch.nextafter(eager, eager * 2), eager, representable).passed
    assert measure_parity(actual, eager, representable).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_subnormal_noise_is_no_failure(dtype):
    zero = torch.zeros(2, 300, dtype=dtype)
    tiny = zero.clone()
    tiny[0, 5] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_parity(tiny, zero, zero.double())
    with pytest.raises(AssertionError, match="max"):
        assert_parity(zero + torch.finfo(dtype).smallest_normal * 64, zero, zero.double())


def test_wrong_row_cannot_hide_behind_an_outlier_row():
    actual, eager, truth = _case(rows=8, cols=1000)
    for part in (actual, eager, truth):
        part[0] *= 1000
    assert_parity(actual, eager, truth)
    error = (eager[0].double() - truth[0]).abs().max()
    actual[3] += 0.25 * error  # within the whole tensor's bound
    assert measure_parity(actual, eager, truth, sample_dim=None).passed
    with pytest.raises(AssertionError, match="of a sample"):
        assert_parity(actual, eager, truth)


def test_wrong_row_cannot_hide_behind_a_vanishing_row():
    actual, eager, truth = _case(rows=8, cols=1000, dtype=torch.float32)
    truth[0] *= 1e-9
    eager[0] = actual[0] = 3e-2  # as if nearly all of it had cancelled
    assert_parity(actual, eager, truth)
    actual[3] += 0.04
    with pytest.raises(AssertionError, match="of a sample"):
        assert_parity(actual, eager, truth)


def test_small_wrong_row_of_ten_logits_is_found():
    actual, eager, truth = _case(rows=4, cols=10, dtype=torch.float32)
    actual[2] = actual[1]
    with pytest.raises(AssertionError, match="of a sample"):
        assert_parity(actual, eager, truth)


def test_sample_dim_other_than_the_first():
    actual, eager, truth = (part.T.contiguous() for part in _case(rows=8, cols=1000))
    for part in (actual, eager, truth):
        part[:, 0] *= 1000
    actual[:, 3] += 1.0
    with pytest.raises(AssertionError, match="of a sample"):
        assert_parity(actual, eager, truth, sample_dim=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_must_agree(value):
    _, eager, truth = _case()
    eager[1, 2] = truth[1, 2] = value
    assert_parity(eager.clone(), eager, truth)
    for wrong in (0.0, math.nan, math.inf, -math.inf):
        actual = eager.clone()
        actual[1, 2] = wrong
        if wrong == value or (math.isnan(wrong) and math.isnan(value)):
            continue
        with pytest.raises(AssertionError, match=r"NaN or Inf in other places.*\n.*\n.*\n  at \[1, 2\]"):
            assert_parity(actual, eager, truth)
    moved = eager.clone()
    moved[1, 3] = value
    with pytest.raises(AssertionError, match="NaN or Inf in other places"):
        assert_parity(moved, eager, truth)


def test_where_eager_overflows_either_is_right():
    truth = torch.full((1, 300), 65000.0, dtype=torch.float64)
    finite = truth.half()
    eager = finite.clone()
    eager[0, 7] = math.inf
    assert_parity(finite, eager, truth)
    assert_parity(eager, eager, truth)
    wrong = eager.clone()
    wrong[0, 7] = -math.inf
    with pytest.raises(AssertionError, match="NaN or Inf"):
        assert_parity(wrong, eager, truth)
    beyond = torch.full((1, 300), 70000.0, dtype=torch.float64)
    assert_parity(torch.full((1, 300), math.inf).half(), torch.full((1, 300), math.inf).half(), beyond)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0), ()])
def test_zero_size_and_scalar_tensors(shape):
    actual = torch.zeros(shape)
    assert assert_parity(actual, actual, actual.double()).verdict == "equal"


@pytest.mark.parametrize(
    ("actual", "said"),
    [
        (torch.zeros(2, 3), r"\(2, 3\)"),
        (torch.zeros(2, 4, dtype=torch.float16), "float16"),
        (torch.zeros(2, 4, device="meta"), "meta"),
        (None, "None"),
        ([torch.zeros(2, 4)], "list"),
    ],
)
def test_wrong_shape_dtype_device_or_structure_is_named(actual, said):
    eager = torch.zeros(2, 4)
    with pytest.raises(AssertionError, match=said):
        assert_parity(actual, eager, eager.double(), name="y")


def test_nested_structures():
    actual, eager, truth = _case()
    report = assert_parity(
        {"y": [actual, None], "n": torch.tensor([1, 2])},
        {"y": (eager, None), "n": torch.tensor([1, 2])},
        {"y": (truth, None), "n": torch.tensor([1, 2])},
    )
    assert report.tensors == 2
    with pytest.raises(AssertionError, match=r"\['y'\]\[0\].*breaks parity"):
        assert_parity({"y": [actual + 1]}, {"y": [eager]}, {"y": [truth]})
    with pytest.raises(AssertionError, match="1 of 2 elements differ"):
        assert_parity([torch.tensor([1, 3])], [torch.tensor([1, 2])], [torch.tensor([1, 2])])
    with pytest.raises(AssertionError, match="eager is None"):
        assert_parity([actual], [None], [None])
    with pytest.raises(AssertionError, match="list of 1"):
        assert_parity([actual], [eager, eager], [truth, truth])


def test_truth_must_be_float64_and_of_the_same_shape():
    actual, eager, truth = _case()
    with pytest.raises(ValueError, match="float64"):
        assert_parity(actual, eager, truth.float())
    with pytest.raises(ValueError, match="truth"):
        assert_parity(actual, eager, truth[1:])
    with pytest.raises(ValueError, match="kind"):
        assert_parity(actual, eager, truth, kind="backward")
    with pytest.raises(ValueError, match="sample_dim"):
        assert_parity(actual, eager, truth, sample_dim=-1)


def test_absolute_floor_holds_only_where_it_is_given():
    x = torch.tensor([[-5.0, 1.0]]).repeat(1, 200)
    truth = nn.functional.gelu(x.double())
    eager = nn.functional.gelu(x)
    floor = GELU_TAIL * (x < -4)
    actual = eager.clone()
    actual[0, 0] += 5e-5
    assert_parity(actual, eager, truth, absolute_floor=floor)
    with pytest.raises(AssertionError, match=r"at \[0, 0\]"):
        assert_parity(actual, eager, truth)
    actual[0, 1] += 5e-5
    with pytest.raises(AssertionError, match=r"at \[0, 1\]"):
        assert_parity(actual, eager, truth, absolute_floor=floor)


def test_report_names_the_worst_coordinates():
    actual, eager, truth = _case()
    actual[5, 17] += 3
    with pytest.raises(AssertionError) as failure:
        assert_parity(actual, eager, truth, name="logits")
    text = str(failure.value)
    assert text.startswith("logits (forward, torch.bfloat16, shape (8, 256)) breaks parity")
    assert text.splitlines()[3].startswith("  at [5, 17]: actual")
    assert text.count("  at [") == 5
    report = measure_parity(actual, eager, truth)
    assert report.verdict.startswith("differs (")
    assert report.max_error > report.max_bound


class _Scale(torch.autograd.Function):
    """y = x * w through fastvr's allocator, with one fault of choice."""

    @staticmethod
    def forward(ctx, x, w, fault):
        ctx.save_for_backward(x, w)
        ctx.fault = fault
        out = backend.empty(x.shape, dtype=x.dtype, device=x.device)
        rows = slice(0, -1) if fault == "unwritten row" else slice(None)
        torch.mul(x[rows], w, out=out[rows])
        if fault == "changes its input":
            x.detach()[0, 0] += 1
        if fault == "writes past its end":
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()
        return out

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        dw = (grad * x).sum(0)
        if ctx.fault == "wrong gradient":
            dw = dw * 1.01
        dx = None if ctx.fault == "no gradient" else grad * w
        return dx, dw, None


def _scale(x, w, fault=None):
    return _Scale.apply(x, w, fault)


def _inputs(**more):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, generator=generator)[:, ::2].requires_grad_()
    return {"x": x, "w": torch.randn(2, generator=generator).requires_grad_(), **more}


def test_check_op_compares_forward_and_backward():
    seen = {}

    def fn(x, w):
        seen.update(x=x, w=w)
        return _scale(x, w)

    report = check_op(fn, lambda x, w: x * w, _inputs())
    assert report.tensors == 3
    assert seen["x"].stride() == (4, 2)
    assert check_op(_scale, lambda x, w: x * w, _inputs(), backward=False).tensors == 1


def test_check_op_takes_a_single_strided_element():
    inputs = {"x": torch.ones(2, 1)[::2], "w": torch.ones(2)[::2]}
    assert check_op(lambda x, w: x * w, lambda x, w: x * w, inputs, backward=False).passed


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("unwritten row", "NaN or Inf in other places"),
        ("changes its input", r"the input \['x'\] was changed"),
        ("writes past its end", "4 bytes past its end"),
        ("wrong gradient", r"gradient of \['w'\].*breaks parity"),
        ("no gradient", r"gradient of \['x'\] is None"),
    ],
)
def test_check_op_finds(fault, said):
    with pytest.raises(AssertionError, match=said):
        check_op(lambda x, w: _scale(x, w, fault), lambda x, w: x * w, _inputs())


def test_check_op_refuses_a_detached_output_and_nothing_to_differentiate():
    with pytest.raises(AssertionError, match="0 outputs carry a gradient, eager 1"):
        check_op(lambda x, w: _scale(x, w).detach(), lambda x, w: x * w, _inputs())
    with pytest.raises(ValueError, match="requires a gradient"):
        check_op(lambda x: x + 1, lambda x: x + 1, {"x": torch.zeros(2)})


def test_truth_model_is_a_float64_copy():
    model = nn.Linear(3, 2)
    truth = truth_model(model)
    assert truth.weight.dtype == torch.float64
    assert model.weight.dtype == torch.float32
    assert torch.equal(truth.weight.float(), model.weight)
