"""Guard regions report every write outside a tensor, and poison shows what was never written."""

import pytest
import torch

from fastvr import backend
from fastvr.testing import assert_parity, guarded, guarded_like
from fastvr.testing.guards import ALIGNMENT

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8, torch.bool]


def _poke(tensor, element):
    """Writes one element at an offset from the tensor's start that may lie outside it."""
    tensor.as_strided((1,), (1,), tensor.storage_offset() + element).zero_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["before its start", "past its end"])
def test_a_write_just_outside_is_reported(dtype, side):
    with guarded() as guards:
        out = backend.empty((3, 5), dtype=dtype, device=torch.device("cpu"))
        _poke(out, 15 if side == "past its end" else -1)
        with pytest.raises(AssertionError, match=rf"shape \(3, 5\).*bytes {side}"):
            guards.check()
        guards._regions.clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_writing_all_of_it_is_fine(dtype):
    with guarded() as guards:
        out = backend.empty((3, 5), dtype=dtype, device=torch.device("cpu"))
        assert out.data_ptr() % ALIGNMENT == 0
        out.zero_()
        guards.check()
    assert not out.any()


def test_check_says_how_far_the_write_went():
    with guarded() as guards:
        out = backend.empty((4,), dtype=torch.float32, device=torch.device("cpu"))
        guards.check()
        _poke(out, 9)
        with pytest.raises(AssertionError, match=r"4 bytes past its end \(nearest: offset 20\)"):
            guards.check()
        _poke(out, -3)
        with pytest.raises(AssertionError, match=r"before its start \(nearest: 9\) and"):
            guards.check()
        guards._regions.clear()


def test_unwritten_elements_are_nan_and_break_parity():
    with guarded():
        out = backend.empty((4, 8), dtype=torch.bfloat16, device=torch.device("cpu"))
        assert out.isnan().all()
        out[:3] = 1
    expected = torch.ones(4, 8, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"NaN or Inf in other places than the truth \(8 elements\)"):
        assert_parity(out, expected, expected.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_reading_past_an_end_gives_nan(dtype):
    with guarded():
        x = guarded_like(torch.ones(5, dtype=dtype))
        outside = x.as_strided((2,), (6,), x.storage_offset() - 1)
        assert outside.isnan().all()


def test_integers_are_poisoned():
    with guarded():
        assert (backend.empty((3,), dtype=torch.int64, device=torch.device("cpu")) == -1).all()


def test_memory_format_and_empty_sizes():
    with guarded():
        device = torch.device("cpu")
        out = backend.empty(
            (2, 3, 4, 5), dtype=torch.float32, device=device, memory_format=torch.channels_last
        )
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert backend.empty((0, 3), dtype=torch.float32, device=device).shape == (0, 3)
        assert backend.empty((), dtype=torch.float32, device=device).shape == ()
        assert backend.empty((2,), dtype=torch.float32, device=torch.device("meta")).is_meta


def _layouts():
    base = torch.arange(2 * 8 * 4 * 6, dtype=torch.float32).reshape(2, 8, 4, 6)
    return {
        "contiguous": base,
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(1, 3),
        "strided": base[:, ::2, :, 1::3],
        "offset": base.flatten()[3:],
        "expanded": base[:1, :, :1].expand(5, 8, 7, 6),
        "scalar": base[0, 0, 0, 1],
        "empty": base[:0],
    }


@pytest.mark.parametrize("layout", _layouts())
@pytest.mark.parametrize("requires_grad", [False, True])
def test_guarded_like_keeps_values_and_layout(layout, requires_grad):
    original = _layouts()[layout].requires_grad_(requires_grad)
    with guarded():
        copy = guarded_like(original)
        assert torch.equal(copy, original)
        assert copy.stride() == original.stride()
        assert copy.requires_grad == requires_grad
        assert copy.is_leaf
        if original.numel():
            assert copy.data_ptr() % ALIGNMENT == original.data_ptr() % ALIGNMENT
            assert copy.data_ptr() != original.data_ptr()


def test_guarded_like_poisons_what_a_view_skips():
    with guarded():
        copy = guarded_like(torch.ones(8)[::2])
        assert copy.as_strided((3,), (2,), copy.storage_offset() + 1).isnan().all()


def test_an_input_written_outside_is_reported():
    with pytest.raises(AssertionError, match="input of shape"), guarded():
        _poke(guarded_like(torch.ones(4)), 4)


def test_the_allocator_is_restored_and_an_exception_passes():
    def fail():
        with guarded():
            assert backend._allocate is not before
            _poke(backend.empty((4,), dtype=torch.float32, device=torch.device("cpu")), 4)
            raise KeyError

    before = backend._allocate
    with pytest.raises(KeyError):
        fail()
    assert backend._allocate is before
    with pytest.raises(RuntimeError, match="guarded"):
        guarded_like(torch.ones(1))


def test_blocks_nest():
    with guarded() as outer:
        with pytest.raises(AssertionError), guarded():
            _poke(backend.empty((4,), dtype=torch.float32, device=torch.device("cpu")), 4)
        backend.empty((4,), dtype=torch.float32, device=torch.device("cpu"))
        assert len(outer._regions) == 1
