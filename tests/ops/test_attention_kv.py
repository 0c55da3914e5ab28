from __future__ import annotations

import pytest
import torch
from contract import (
    DTYPES,
    GRID,
    assert_autocast,
    assert_compiles,
    assert_order_does_not_matter,
    randn,
    triton_forced,
)

from fastvr import backend, tuning
from fastvr.ops.attention import ATTENTION_KV, attention, attention_kv
from fastvr.reference.attention import attention_kv as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import attention as kernels


def inputs(batch, m, n, num_heads, head_dim, dtype, device, *, requires_grad=False):
    options = {"dtype": dtype, "device": device, "requires_grad": requires_grad}
    width = num_heads * head_dim
    return {"q": randn(batch, m, width, **options), "kv": randn(batch, n, 2 * width, **options)}


def check(given, num_heads, *, scale=None, backward=False):
    head_dim = given["q"].shape[-1] // num_heads
    with triton_forced():
        return check_op(
            lambda q, kv: attention_kv(q, kv, num_heads, scale=scale),
            lambda q, kv: reference(q, kv, num_heads, head_dim**-0.5 if scale is None else scale),
            given,
            backward=backward,
            sample_inputs=("q", "kv"),
            name="attention_kv",
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 197), (5, 64), (16, 50), (17, 70), (130, 5)])
def test_lengths(m, n, dtype, device):
    check(inputs(2, m, n, 2, 32, dtype, device), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
def test_head_dims(head_dim, dtype, device):
    check(inputs(2, 1, 70, 3, head_dim, dtype, device), 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 20])
def test_gradients(m, dtype, device):
    check(inputs(3, m, 37, 2, 32, dtype, device, requires_grad=True), 2, backward=True, scale=0.3)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(few, dtype, device):
    given = inputs(1, 1 if few else 20, 133, 1, 32, dtype, device)
    every = [
        config
        for arch in ("interpreter", *GRID.architectures)
        for config in kernels.candidate_configs(dtype, arch, head_dim=32, few=few)
    ]
    for config in [config for i, config in enumerate(every) if config not in every[:i]]:
        with tuning.force_config("attention_kv", config):
            check(given, 1)


def test_few_queries_take_thin_tiles(device):
    for m in (1, kernels.FEW_QUERIES, kernels.FEW_QUERIES + 1):
        given = inputs(1, m, 20, 1, 32, torch.bfloat16, device)
        with triton_forced(), tuning.consulted() as asked:
            attention_kv(**given, num_heads=1)
        thin = all(config["BLOCK_M"] <= kernels.FEW_QUERIES for config in asked.knobs[0].candidates)
        assert thin == (m <= kernels.FEW_QUERIES)


@pytest.mark.parametrize("layout", ["packed", "strided", "expanded", "channels last", "far apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype, device):
    def packed():
        q, kv = randn(3, 37, 192, dtype=dtype, device=device).tensor_split([64], dim=2)
        return q[:, :1], kv

    def far_apart():
        rows = torch.zeros(2**23 + 128, dtype=dtype, device=device).as_strided((2, 128), (2**23, 1))
        rows.copy_(randn(2, 128, dtype=dtype, device=device))
        return randn(1, 1, 64, dtype=dtype, device=device), rows[None]

    q, kv = {
        "packed": packed,
        "strided": lambda: (
            randn(6, 4, 80, dtype=dtype, device=device)[::2, 1::2, 8:72],
            randn(6, 40, 128, dtype=dtype, device=device)[1::2, 3:],
        ),
        "expanded": lambda: (
            randn(1, 1, 64, dtype=dtype, device=device).expand(3, 4, 64),
            randn(1, 9, 128, dtype=dtype, device=device).expand(3, 9, 128),
        ),
        "channels last": lambda: (
            randn(3, 64, 2, dtype=dtype, device=device).transpose(1, 2),
            randn(3, 128, 7, dtype=dtype, device=device).transpose(1, 2),
        ),
        "far apart": far_apart,
    }[layout]()
    check({"q": q, "kv": kv}, 2)


@pytest.mark.parametrize("m", [1, 17])
def test_is_attention_of_the_first_tokens(m, device):
    qkv = randn(2, 50, 3 * 2 * 32, device=device)
    exact = attention(qkv.double(), 2)[:, :m]
    q, kv = qkv.tensor_split([64], dim=2)
    with triton_forced():
        y = attention_kv(q[:, :m], kv, 2)
    torch.testing.assert_close(y, exact.float())


@pytest.mark.parametrize("shape", [(0, 1), (2, 0)])
def test_empty(shape, device):
    batch, m = shape
    with triton_forced():
        y = attention_kv(**inputs(batch, m, 9, 2, 32, torch.float32, device), num_heads=2)
    assert y.shape == (batch, m, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["q", "kv"])
def test_nan_stays_in_its_sample(part, dtype, device):
    given = inputs(3, 1, 70, 2, 32, dtype, device)
    with triton_forced():
        clean = attention_kv(**given, num_heads=2)
        given[part] = given[part].clone()
        given[part][1, -1] = float("nan")
        y = attention_kv(**given, num_heads=2)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert y[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    given = inputs(4, 1, 37, 2, 32, dtype, device)
    with triton_forced():
        whole = attention_kv(**given, num_heads=2)
        for i in range(4):
            alone = {name: t[i : i + 1].contiguous() for name, t in given.items()}
            assert torch.equal(whole[i : i + 1], attention_kv(**alone, num_heads=2))


def test_the_order_of_programs_does_not_matter(device):
    given = inputs(3, 40, 70, 2, 32, torch.float32, device)
    with tuning.force_config(
        "attention_kv", kernels.candidate_configs(torch.float32, "sm_90", head_dim=32)[0]
    ):
        assert_order_does_not_matter(lambda: attention_kv(**given, num_heads=2))


def test_compiles_and_exports(device):
    given = inputs(2, 1, 9, 2, 32, torch.float32, device, requires_grad=True)
    assert_compiles(lambda q, kv: attention_kv(q, kv, 2, scale=0.3), list(given.values()))
    with triton_forced():
        torch.library.opcheck(ATTENTION_KV.overload, (*given.values(), 2, 0.3))


def test_autocast_is_eagers(device):
    given = inputs(2, 1, 9, 2, 32, torch.float32, device)
    assert_autocast(
        lambda q, kv: attention_kv(q, kv, 2), lambda q, kv: reference(q, kv, 2, 32**-0.5), **given
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None}, "q must be a torch.Tensor; got NoneType"),
        ({"q": torch.zeros(2, 96)}, r"q must be \[B, M, num_heads \* head_dim\] .*; got \[2, 96\]"),
        ({"q": torch.zeros(2, 1, 0)}, r"q must be .*got \[2, 1, 0\]"),
        ({"num_heads": 5}, r"q must be .* num_heads=5; got \[2, 1, 96\]"),
        ({"num_heads": True}, "num_heads must be a positive int; got True"),
        ({"kv": torch.zeros(2, 4, 96)}, r"kv must be \[2, N, 192\], N > 0; got \[2, 4, 96\]"),
        ({"kv": torch.zeros(3, 4, 192)}, r"kv must be \[2, N, 192\], N > 0; got \[3, 4, 192\]"),
        ({"kv": torch.zeros(2, 0, 192)}, r"kv must be \[2, N, 192\], N > 0; got \[2, 0, 192\]"),
        ({"kv": torch.zeros(2, 4, 192, dtype=torch.float16)}, "kv must be torch.float32"),
        ({"kv": torch.zeros(2, 4, 192, device="meta")}, "kv must be on cpu, where x is; got meta"),
        ({"kv": torch.zeros(2, 4, 192, dtype=torch.int32)}, "kv must be float32.*got torch.int32"),
        ({"scale": float("inf")}, "scale must be a finite number or None; got inf"),
    ],
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_bad_input_names_the_argument(change, message, mode):
    given = {"q": torch.zeros(2, 1, 96), "kv": torch.zeros(2, 4, 192), "num_heads": 1} | change
    with backend.use_backend(mode), pytest.raises(ValueError, match=f"attention_kv: {message}"):
        attention_kv(**given)


@pytest.mark.parametrize(
    ("head_dim", "scale", "dtype", "reason"),
    [
        (24, 1.0, torch.float32, "head_dim 24; the kernel takes 32 to 128 in multiples of 8"),
        (32, -1.0, torch.float32, "scale -1.0; the kernel takes positive ones"),
        (32, 1.0, torch.float64, "dtype torch.float64"),
    ],
)
def test_what_the_kernel_cannot_take_runs_in_pytorch(head_dim, scale, dtype, reason, device):
    given = inputs(2, 1, 6, 2, head_dim, dtype, device)
    with triton_forced(), pytest.raises(backend.BackendError, match=f"attention_kv: .*{reason}"):
        attention_kv(**given, num_heads=2, scale=scale)
    with backend.use_backend("auto"), backend.observe() as ran:
        y = attention_kv(**given, num_heads=2, scale=scale)
    assert torch.equal(y, reference(**given, num_heads=2, scale=scale))
    assert dict(ran) == {("attention_kv", "reference"): 1}


def test_flops_are_counted(device):
    from torch.utils.flop_counter import FlopCounterMode

    given = inputs(3, 1, 7, 2, 32, torch.float32, device)
    with triton_forced(), FlopCounterMode(display=False) as counter:
        attention_kv(**given, num_heads=2)
    assert counter.get_total_flops() == 2 * 3 * 2 * (7 * 32) * 2
    assert ATTENTION_KV.cost(*given.values(), 2, 1.0).bytes == 4 * 3 * (64 + 7 * 128 + 64)
