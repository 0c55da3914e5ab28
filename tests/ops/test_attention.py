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
from fastvr.ops.attention import ATTENTION, attention
from fastvr.reference.attention import attention as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import attention as kernels
from fastvr.kernels.common import record_launches


def check(qkv, num_heads, *, scale=None, backward=False):
    head_dim = qkv.shape[-1] // (3 * num_heads)
    with triton_forced():
        return check_op(
            lambda qkv: attention(qkv, num_heads, scale=scale),
            lambda qkv: reference(qkv, num_heads, head_dim**-0.5 if scale is None else scale),
            {"qkv": qkv},
            backward=backward,
            sample_inputs=("qkv",),
            name="attention",
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, 49, 50, 64, 196, 197, 201, 257])
def test_sequence_lengths(n, dtype, device):
    check(randn(2, n, 3 * 2 * 32, dtype=dtype, device=device), 2)


@pytest.mark.parametrize("n", [577, 1025, 1370])
def test_long_sequences(n, device):
    check(randn(1, n, 3 * 32, dtype=torch.bfloat16, device=device), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 40, 64, 72, 80, 96, 128])
def test_head_dims(head_dim, dtype, device):
    check(randn(2, 70, 3 * 3 * head_dim, dtype=dtype, device=device), 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "head_dim"), [(5, 40), (66, 32)])
def test_gradients(n, head_dim, dtype, device):
    qkv = randn(3, n, 3 * 2 * head_dim, dtype=dtype, device=device, requires_grad=True)
    check(qkv, 2, backward=True)


def configurations(dtype, head_dim):
    """Of every architecture, each once."""
    every = [
        config
        for arch in ("interpreter", *GRID.architectures)
        for config in kernels.candidate_configs(dtype, arch, head_dim=head_dim)
    ]
    return [config for i, config in enumerate(every) if config not in every[:i]]


@pytest.mark.parametrize("head_dim", [32, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(head_dim, dtype, device):
    qkv = randn(1, 133, 3 * head_dim, dtype=dtype, device=device)
    for config in configurations(dtype, head_dim):
        with tuning.force_config("attention", config):
            check(qkv, 1)


@pytest.mark.parametrize("head_dim", [32, 64, 72, 128])
def test_default_is_a_candidate(head_dim):
    for arch in GRID.architectures:
        for dtype in DTYPES:
            config = kernels.default_config(dtype, arch, head_dim=head_dim)
            assert config in kernels.candidate_configs(dtype, arch, head_dim=head_dim)


@pytest.mark.parametrize("scale", [0.01, 1.0, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(scale, dtype, device):
    check(randn(2, 80, 3 * 2 * 32, dtype=dtype, device=device), 2, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_peaked_softmax(dtype, device):
    """Scores in the hundreds: the online softmax must rescale, and one key takes all."""
    check(8 * randn(2, 150, 3 * 2 * 32, dtype=dtype, device=device), 2)


@pytest.mark.parametrize(
    "layout", ["offset", "every second row", "sequence first", "expanded", "channels last"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype, device):
    width = 3 * 2 * 32
    qkv = {
        "offset": lambda: randn(4, 40, width + 8, dtype=dtype, device=device)[1:, 3:, 8:],
        "every second row": lambda: randn(6, 74, width, dtype=dtype, device=device)[::2, ::2],
        "sequence first": lambda: randn(37, 3, width, dtype=dtype, device=device).transpose(0, 1),
        "expanded": lambda: randn(1, 37, width, dtype=dtype, device=device).expand(3, 37, width),
        "channels last": lambda: randn(3, width, 37, dtype=dtype, device=device).transpose(1, 2),
    }[layout]()
    assert qkv.shape == (3, 37, width)
    check(qkv, 2)


def test_rows_far_apart(device):
    """A block's offsets are 32 bits wide; rows that far apart are gathered first."""
    width = 3 * 32
    rows = randn(3, width, dtype=torch.float16, device=device)
    apart = torch.zeros(2 * 2**23 + width, dtype=torch.float16, device=device)
    apart = apart.as_strided((1, 3, width), (2 * 2**23 + width, 2**23, 1))
    apart.copy_(rows)
    with triton_forced():
        assert torch.equal(attention(apart, 1), attention(rows[None], 1))


@pytest.mark.parametrize("shape", [(0, 197, 96), (2, 0, 96)])
def test_empty(shape, device):
    with triton_forced():
        y = attention(randn(*shape, device=device, requires_grad=True), 1)
    assert y.shape == (*shape[:2], 32)


def test_one_grid_dimension_for_any_number_of_heads():
    """CUDA ends the others at 65,535."""
    grids = []
    qkv = torch.empty(5000, 197, 3 * 16 * 64, dtype=torch.bfloat16, device="meta")
    y = torch.empty(5000, 197, 16 * 64, dtype=torch.bfloat16, device="meta")
    config = kernels.default_config(torch.bfloat16, "sm_90", head_dim=64)
    with record_launches(lambda kernel, grid, arguments, options: grids.append(grid)):
        kernels.launch_attention_fwd(q=qkv, kv=qkv, y=y, num_heads=16, scale=0.125, config=config)
    assert grids == [(5000 * 16 * 4,)]


@pytest.mark.parametrize("n", [5, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_sample(n, dtype, device):
    assert_nan_stays_in_its_sample(
        lambda qkv: attention(qkv, 2), randn(3, n, 3 * 2 * 32, dtype=dtype, device=device)
    )


@pytest.mark.parametrize("key", [3, 66])
def test_nan_reaches_every_query_of_its_head_and_no_other(key, device):
    qkv = randn(1, 70, 3, 2, 32, device=device)
    qkv[0, key, 1, 0, 5] = float("nan")
    with triton_forced():
        y = attention(qkv.flatten(2), 2).view(1, 70, 2, 32)
    assert y[:, :, 0].isnan().all()
    assert y[:, :, 1].isfinite().all()


@pytest.mark.parametrize("masked", [slice(0, 64), slice(64, 70)])
def test_keys_at_minus_infinity_take_no_weight(masked, device):
    """A block without a finite score contributes nothing, rather than the NaN of -inf minus -inf."""
    qkv = randn(2, 70, 3, 1, 32, device=device)
    qkv[:, :, 0, 0, 0] = 1.0
    others = [i for i in range(70) if not masked.start <= i < masked.stop]
    _, k, v = qkv[:, others, :, 0].double().unbind(2)
    expected = torch.softmax(qkv[:, :, 0, 0].double() @ k.transpose(1, 2) * 32**-0.5, -1) @ v
    qkv[:, masked, 1, 0, 0] = float("-inf")
    with triton_forced():
        y = attention(qkv.flatten(2), 1)
    torch.testing.assert_close(y, expected.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    config = kernels.candidate_configs(dtype, "sm_90", head_dim=32)[0]
    with tuning.force_config("attention", config):
        assert_batch_invariant(lambda x: attention(x, 2), randn(4, 37, 192, dtype=dtype, device=device))


def test_the_order_of_programs_does_not_matter(device):
    qkv = randn(2, 150, 192, device=device)
    config = kernels.candidate_configs(torch.float32, "sm_90", head_dim=32)[0]
    with tuning.force_config("attention", config):
        assert_order_does_not_matter(lambda: attention(qkv, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 6 GB on a GPU")
def test_offsets_past_two_to_the_31(device):
    batch = 2**31 // (197 * 2304) + 2
    qkv = torch.empty(batch, 197, 2304, dtype=torch.bfloat16, device=device)
    qkv[-1] = randn(197, 2304, dtype=torch.bfloat16, device=device)
    config = kernels.default_config(torch.bfloat16, backend.architecture(device), head_dim=64)
    with triton_forced(), tuning.force_config("attention", config):
        assert torch.equal(attention(qkv, 12)[-1:], attention(qkv[-1:].clone(), 12))


def test_compiles_and_exports(device):
    qkv = randn(2, 9, 3 * 2 * 32, device=device, requires_grad=True)
    assert_compiles(lambda qkv: attention(qkv, 2, scale=0.3), [qkv])
    with triton_forced():
        torch.library.opcheck(ATTENTION.overload, (qkv, 2, 0.3))


def test_autocast_is_eagers(device):
    qkv = randn(2, 9, 3 * 2 * 32, device=device)
    assert_autocast(lambda qkv: attention(qkv, 2), lambda qkv: reference(qkv, 2, 32**-0.5), qkv=qkv)


def test_autocast_leaves_float64(device):
    qkv = randn(2, 9, 3 * 2 * 32, dtype=torch.float64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert attention(qkv, 2).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": None}, "qkv must be a torch.Tensor; got NoneType"),
        ({"qkv": torch.zeros(1, 4, 96, dtype=torch.int64)}, "qkv must be float32.*got torch.int64"),
        ({"qkv": torch.zeros(4, 96)}, r"qkv must be \[B, N, 3 .* num_heads=1; got \[4, 96\]"),
        ({"qkv": torch.zeros(1, 4, 0)}, r"qkv must be \[B, N, 3 .*got \[1, 4, 0\]"),
        ({"num_heads": 5}, r"qkv must be \[B, N, 3 .* num_heads=5; got \[1, 4, 96\]"),
        ({"num_heads": 0}, "num_heads must be a positive int; got 0"),
        ({"num_heads": 1.0}, "num_heads must be a positive int; got 1.0"),
        ({"scale": float("nan")}, "scale must be a finite number or None; got nan"),
        ({"scale": "1"}, "scale must be a finite number or None; got '1'"),
    ],
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_bad_input_names_the_argument(change, message, mode):
    given = {"qkv": torch.zeros(1, 4, 96), "num_heads": 1} | change
    with backend.use_backend(mode), pytest.raises(ValueError, match=f"attention: {message}"):
        attention(**given)


@pytest.mark.parametrize(
    ("head_dim", "scale", "dtype", "reason"),
    [
        (24, None, torch.float32, "head_dim 24; the kernel takes 32 to 128 in multiples of 8"),
        (36, None, torch.float32, "head_dim 36"),
        (136, None, torch.float32, "head_dim 136"),
        (32, -1.0, torch.float32, "scale -1.0; the kernel takes positive ones"),
        (32, None, torch.float64, "dtype torch.float64"),
    ],
)
def test_what_the_kernel_cannot_take_runs_in_pytorch(head_dim, scale, dtype, reason, device):
    qkv = randn(2, 6, 3 * 2 * head_dim, dtype=dtype, device=device)
    with triton_forced(), pytest.raises(backend.BackendError, match=f"attention: .*{reason}"):
        attention(qkv, 2, scale=scale)
    with backend.use_backend("auto"), backend.observe() as ran:
        y = attention(qkv, 2, scale=scale)
    assert torch.equal(y, reference(qkv, 2, head_dim**-0.5 if scale is None else scale))
    assert dict(ran) == {("attention", "reference"): 1}


def test_flops_are_counted(device):
    from torch.utils.flop_counter import FlopCounterMode

    with triton_forced(), FlopCounterMode(display=False) as counter:
        attention(randn(3, 7, 3 * 2 * 32, device=device), 2)
    assert counter.get_total_flops() == 2 * 3 * 2 * (7 * 7 * 32) * 2
    assert ATTENTION.cost(torch.empty(3, 7, 192), 2, 1.0).bytes == 4 * 3 * 7 * (192 + 64)
