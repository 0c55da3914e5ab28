"""The interpreter computes what a GPU would, and reports what a GPU would do silently."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

if torch.cuda.is_available():
    pytest.skip("kernels run on the GPU here, not in the interpreter", allow_module_level=True)

from fastvr.testing import assert_parity, interpreter

interpreter.install()
from triton.runtime.errors import InterpreterError  # noqa: E402

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    offsets = rows[:, None] * BLOCK + rows[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    c = tl.dot(a, b, input_precision=PRECISION)
    tl.store(c_ptr + offsets, c.to(c_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dot(dtype):
    a, b, c = torch.randn(3, 32, 32, dtype=dtype)
    _dot_kernel[(1,)](a, b, c, "ieee", BLOCK=32)
    assert_parity(c, a @ b, a.double() @ b.double())


def test_float32_dot_without_precision_is_refused():
    a, b, c = torch.randn(3, 16, 16)
    with pytest.raises(InterpreterError, match="would be TF32"):
        _dot_kernel[(1,)](a, b, c, None, BLOCK=16)
    half = torch.randn(3, 16, 16, dtype=torch.float16)
    _dot_kernel[(1,)](*half, None, BLOCK=16)


def test_tf32_rounds_to_ten_bits():
    a, c = torch.eye(16), torch.empty(16, 16)
    b = torch.randn(16, 16)
    _dot_kernel[(1,)](a, b, c, "tf32", BLOCK=16)
    error = ((c - b).abs() / b.abs()).max()
    assert 2**-13 < error <= 2**-11


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    if OP == "add":
        out = x + y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = (x / y).to(x.dtype)
    elif OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "less":
        out = x < y
    elif OP == "equal":
        out = x == y
    elif OP == "where":
        out = tl.where((x < y) & (x > 0), x, y)
    elif OP == "fma":
        out = tl.fma(x, y, x)
    elif OP == "erf":
        out = tl.erf(x.to(tl.float32))
    elif OP == "rsqrt":
        out = tl.rsqrt(tl.abs(x.to(tl.float32)) + 1)
    elif OP == "int":
        out = x.to(tl.int32)
    elif OP == "scalar":
        out = x * 2 + 1
    tl.store(out_ptr + offsets, out)


TWINS = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "less": lambda x, y: x < y,
    "equal": lambda x, y: x == y,
    "where": lambda x, y: torch.where((x < y) & (x > 0), x, y),
    "scalar": lambda x, y: x * 2 + 1,
    "int": lambda x, y: x.to(torch.int32),
}


def _operands(dtype):
    x, y = torch.randn(2, 256).mul(3).to(dtype)
    y[::7] = x[::7]
    return x, y


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", TWINS)
def test_elementwise_is_bitwise_torch(op, dtype):
    x, y = _operands(dtype)
    expected = TWINS[op](x, y)
    out = torch.zeros_like(expected)
    _elementwise_kernel[(1,)](x, y, out, op, BLOCK=256)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ["fma", "erf", "rsqrt"])
def test_special_functions(op, dtype):
    twins = {
        "fma": lambda x, y: torch.addcmul(x, x, y),
        "erf": lambda x, y: torch.erf(x),
        "rsqrt": lambda x, y: (x.abs() + 1).rsqrt(),
    }
    x, y = _operands(dtype)
    out = torch.zeros_like(x)
    _elementwise_kernel[(1,)](x, y, out, op, BLOCK=256)
    assert_parity(out, twins[op](x, y), twins[op](x.double(), y.double()))


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_casts_round_to_nearest_even_and_keep_nonfinite_values(source, target):
    x = torch.randn(64) * torch.logspace(-44, 38, 64)
    x[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.00390625])
    x = x.to(source)
    out = torch.empty(64, dtype=target)
    _cast_kernel[(1,)](x, out, BLOCK=64)
    torch.testing.assert_close(out, x.to(target), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _larger_and_count(value_a, count_a, value_b, count_b):
    return tl.maximum(value_a, value_b), count_a + count_b


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _reduce_kernel(
    x_ptr, out_ptr, OP: tl.constexpr, AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    x = tl.load(x_ptr + row[:, None] * COLS + col[None, :])
    if OP == "sum":
        out = tl.sum(x, AXIS)
    elif OP == "max":
        out = tl.max(x, AXIS)
    elif OP == "min":
        out = tl.min(x, AXIS)
    elif OP == "prod":
        out = tl.reduce(x, AXIS, _multiply)
    elif OP == "tuple":
        out, count = tl.reduce(
            (x.to(tl.float32), tl.full((ROWS, COLS), 1, tl.int32)), AXIS, _larger_and_count
        )
        tl.device_assert(count == (ROWS if AXIS == 0 else COLS))
    tl.store(out_ptr + (col if AXIS == 0 else row), out)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", ["sum", "max", "min", "prod", "tuple"])
def test_reductions(op, axis, dtype):
    twins = {"sum": torch.sum, "max": torch.amax, "min": torch.amin, "prod": torch.prod, "tuple": torch.amax}
    x = (torch.randn(16, 8) * 0.2 - 1).to(dtype)
    out = torch.empty(8 if axis == 0 else 16, dtype=dtype)
    _reduce_kernel[(1,)](x, out, op, axis, 16, 8)
    if op in ("max", "min", "tuple"):
        assert torch.equal(out, twins[op](x, axis))
    else:
        # A GPU rounds every step of a 16-bit reduction, at most log2(n) on the way to each element.
        steps = 4 if dtype != torch.float32 else 2
        truth = twins[op](x.double(), axis)
        bound = x.double().abs().sum(axis).maximum(truth.abs()) * torch.finfo(dtype).eps * steps
        assert ((out.double() - truth).abs() <= bound).all()


@triton.jit
def _nan_kernel(x_ptr, out_ptr, PROPAGATE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if PROPAGATE:
        low = tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        clamped = tl.clamp(x, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        low, high, clamped = tl.minimum(x, 0.0), tl.maximum(x, 0.0), tl.clamp(x, 0.0, 1.0)
    tl.store(out_ptr + offsets, low)
    tl.store(out_ptr + BLOCK + offsets, high)
    tl.store(out_ptr + 2 * BLOCK + offsets, clamped)
    tl.store(out_ptr + 3 * BLOCK, tl.max(x, 0))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("propagate", [False, True])
def test_maximum_drops_nan_unless_told(propagate, dtype):
    x = torch.tensor([torch.nan, -2.0, 3.0, torch.nan], dtype=dtype)
    out = torch.empty(13, dtype=dtype)
    _nan_kernel[(1,)](x, out, propagate, BLOCK=4)
    lost = torch.nan if propagate else 0.0
    expected = [lost, -2, 0, lost, lost, 0, 3, lost, lost, 0, 1, lost, 3]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=dtype), equal_nan=True)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask) if MASK_LOAD else tl.load(x_ptr + offsets)
    if MASK_STORE:
        tl.store(out_ptr + offsets, x, mask)
    else:
        tl.store(out_ptr + offsets, x)


def test_out_of_bounds_load_and_store_are_caught():
    x, out, large = torch.ones(10), torch.zeros(10), torch.zeros(16)
    _copy_kernel[(1,)](x, out, 10, True, True, BLOCK=16)
    assert torch.equal(out, x)
    with pytest.raises(InterpreterError, match=r"load: 6 of 16 lanes .* at byte 40 of .* has 40"):
        _copy_kernel[(1,)](x, large, 10, False, True, BLOCK=16)
    with pytest.raises(InterpreterError, match="store: 6 of 16"):
        _copy_kernel[(1,)](large, out, 10, False, False, BLOCK=16)
    with pytest.raises(InterpreterError, match="load: 1 of 11"):
        _copy_kernel[(1,)](x, large, 11, True, True, BLOCK=16)


def test_bounds_are_those_of_the_view():
    base = torch.ones(16)
    with pytest.raises(InterpreterError, match="load: 6 of 16"):
        _copy_kernel[(1,)](base[:10], torch.zeros(16), 16, True, True, BLOCK=16)
    with pytest.raises(InterpreterError, match="load: 16 of 16"):
        _copy_kernel[(1,)](base[:0], torch.zeros(16), 16, True, True, BLOCK=16)


@triton.jit
def _atomic_kernel(out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + offsets, 1.0, mask=offsets < n)


def test_atomics_are_checked():
    out = torch.zeros(10)
    _atomic_kernel[(3,)](out, 10, BLOCK=16)
    assert (out == 3).all()
    with pytest.raises(InterpreterError, match="atomic: 1 of 11"):
        _atomic_kernel[(1,)](out, 11, BLOCK=16)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.uint8])
def test_masked_load_without_other_is_poison(dtype):
    x, out = torch.ones(10, dtype=dtype), torch.zeros(16, dtype=dtype)
    _copy_kernel[(1,)](x, out, 10, True, False, BLOCK=16)
    assert (out[:10] == 1).all()
    poison = out[10:].isnan() if dtype.is_floating_point else out.view(torch.uint8)[-6:] == 255
    assert poison.all()


@triton.jit
def _order_kernel(out_ptr, n, BLOCK: tl.constexpr):
    last = tl.load(out_ptr + n)
    tl.store(out_ptr + tl.program_id(0) * 6 + tl.program_id(1) * 3 + tl.program_id(2), last)
    tl.store(out_ptr + n, last + 1)


def _order():
    out = torch.zeros(25, dtype=torch.int32)
    _order_kernel[(4, 2, 3)](out, 24, BLOCK=1)
    return out[:24].tolist()


def test_shuffle_changes_the_order_of_programs():
    assert _order() == list(range(24))
    with interpreter.shuffle(1):
        shuffled = _order()
        assert shuffled != list(range(24))
        assert sorted(shuffled) == list(range(24))
        assert _order() != shuffled
        with interpreter.shuffle(None):
            assert _order() == list(range(24))
    with interpreter.shuffle(1):
        assert _order() == shuffled
    assert _order() == list(range(24))


@triton.jit
def _assert_kernel(x_ptr, limit):
    x = tl.load(x_ptr)
    tl.device_assert(x < limit, "too large")


def test_device_assert_holds():
    _assert_kernel[(1,)](torch.tensor([1.0]), 2)
    with pytest.raises(InterpreterError, match="too large"):
        _assert_kernel[(1,)](torch.tensor([3.0]), 2)


@triton.jit
def _scale_kernel(out_ptr, stride, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK) * 0, tl.arange(0, BLOCK) * stride)


def test_int32_offsets_that_overflow_are_caught():
    with pytest.raises(InterpreterError, match="overflow"):
        _scale_kernel[(1,)](torch.zeros(1, dtype=torch.int32), 2**28, BLOCK=16)


@triton.jit
def _descriptor_kernel(x_desc, out_desc, BLOCK: tl.constexpr):
    block = x_desc.load([tl.program_id(0) * BLOCK, 0])
    out_desc.store([tl.program_id(0) * BLOCK, 0], block * 2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_host_descriptors(dtype):
    x = torch.randn(20, 16).to(dtype)
    out = torch.zeros_like(x)
    blocks = [TensorDescriptor.from_tensor(tensor, [8, 16]) for tensor in (x, out)]
    _descriptor_kernel[(3,)](*blocks, BLOCK=8)
    assert torch.equal(out, x * 2)


@triton.jit
def _corner_kernel(x_desc, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets[:, None] * BLOCK + offsets[None, :], x_desc.load([8, 24]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_descriptor_reads_zeros_outside_and_writes_nothing_there(dtype):
    x = torch.randn(20, 32).to(dtype)[:, :30]  # a row's bytes are a multiple of 16
    whole = torch.full((24, 40), 7.0, dtype=dtype)
    out = torch.empty(16, 16, dtype=dtype)
    _corner_kernel[(1,)](TensorDescriptor.from_tensor(x, [16, 16]), out, BLOCK=16)
    expected = torch.zeros(16, 16, dtype=dtype)
    expected[:12, :6] = x[8:, 24:]
    assert torch.equal(out, expected)
    blocks = [TensorDescriptor(t, [20, 16], [t.stride(0), 1], [8, 16]) for t in (whole.clone(), whole)]
    _descriptor_kernel[(3,)](*blocks, BLOCK=8)
    assert (whole[:20, :16] == 14).all()
    assert (whole[20:] == 7).all()
    assert (whole[:, 16:] == 7).all()


def test_descriptor_that_claims_more_than_its_tensor_is_caught():
    x, out = torch.ones(24, 16), torch.zeros(24, 16)
    source = TensorDescriptor(x[:20], [24, 16], [16, 1], [8, 16])
    with pytest.raises(InterpreterError, match="load: 64 of 128"):
        _descriptor_kernel[(3,)](source, TensorDescriptor.from_tensor(out, [8, 16]), BLOCK=8)


@triton.jit
def _helper(x):
    return tl.sigmoid(x.to(tl.float32)) + tl.zeros_like(x)


@triton.jit
def _helper_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    for i in range(n):
        tl.store(out_ptr + i * BLOCK + offsets, _helper(tl.load(x_ptr + i * BLOCK + offsets)))


def test_device_functions_and_loops():
    x, out = torch.randn(2, 4, 16)
    _helper_kernel[(1,)](x, out, 4, BLOCK=16)
    assert_parity(out, x.sigmoid(), x.double().sigmoid())


def test_nothing_stays_patched_after_a_launch_or_a_failed_one():
    before = (tl.load, tl.core.load, tl.tensor.__add__, tl.tensor.__dict__.get("__index__"))
    _copy_kernel[(1,)](torch.ones(10), torch.zeros(10), 10, True, True, BLOCK=16)
    with pytest.raises(InterpreterError):
        _copy_kernel[(1,)](torch.ones(10), torch.zeros(10), 11, True, True, BLOCK=16)
    assert before == (tl.load, tl.core.load, tl.tensor.__add__, tl.tensor.__dict__.get("__index__"))


def test_options_are_switched_by_installing_again():
    x, out = torch.ones(16)[:10], torch.zeros(16)
    try:
        interpreter.install(bounds=False, poison=False)
        _copy_kernel[(1,)](x, out, 16, False, False, BLOCK=16)
        assert (out == 1).all()
        _copy_kernel[(1,)](x, out, 10, True, False, BLOCK=16)
        assert (out[10:] == 0).all()
    finally:
        interpreter.install()


def test_install_refuses_a_compiling_triton():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = "import fastvr.testing.interpreter as i; i.install()"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "RuntimeError: Triton's interpreter is off: set TRITON_INTERPRET=1" in result.stderr


def test_a_launch_mends_the_interpreter_itself():
    """Whoever forces kernels on a CPU need not know that it must be mended."""
    code = (
        "import torch, fastvr; from fastvr.ops.layer_norm import layer_norm\n"
        "x, w = torch.randn(3, 48).bfloat16(), torch.randn(48).bfloat16()\n"
        "with fastvr.use_backend('triton'): y = layer_norm(x, w, None, 1e-6)\n"
        "exact = torch.nn.functional.layer_norm(x.double(), (48,), w.double(), None, 1e-6)\n"
        "fastvr.testing.assert_parity(y, exact.bfloat16(), exact)"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
