"""The gradient of attention and attention_kv by kernels."""

from __future__ import annotations

import pytest
import torch
from contract import DTYPES, GRID, assert_order_does_not_matter, randn, triton_forced

from fastvr import backend, tuning
from fastvr.ops.attention import ATTENTION, ATTENTION_KV_TRAINING, ATTENTION_TRAINING, attention, attention_kv
from fastvr.ops.attention_backward import ATTENTION_BACKWARD, ATTENTION_KV_BACKWARD
from fastvr.reference import attention as reference
from fastvr.testing import assert_parity, check_op

pytest.importorskip("triton")
from fastvr.kernels import attention_backward as kernels


def check(qkv, num_heads, *, scale=None):
    scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5 if scale is None else scale
    with triton_forced(), backend.observe() as ran:
        check_op(
            lambda qkv: attention(qkv, num_heads, scale=scale),
            lambda qkv: reference.attention(qkv, num_heads, scale),
            {"qkv": qkv.requires_grad_()},
            sample_inputs=("qkv",),
            name="attention",
        )
    assert dict(ran) == {("attention_training", "triton"): 1, ("attention_backward", "triton"): 1}


def check_kv(q, kv, num_heads):
    scale = (q.shape[-1] // num_heads) ** -0.5
    with triton_forced():
        check_op(
            lambda q, kv: attention_kv(q, kv, num_heads),
            lambda q, kv: reference.attention_kv(q, kv, num_heads, scale),
            {"q": q, "kv": kv},
            sample_inputs=("q", "kv"),
            name="attention_kv",
        )


def explicit(qkv, mode):
    """Attention by its own kernel, or by the weights themselves rather than one of PyTorch's kernels."""
    if mode == "triton":
        return attention(qkv, 1)
    q, k, v = qkv.chunk(3, 2)
    return (q * 32**-0.5 @ k.transpose(1, 2)).softmax(-1) @ v


def gradient(qkv, grad, num_heads=2):
    with triton_forced():
        qkv = qkv.detach().requires_grad_()
        return torch.autograd.grad(attention(qkv, num_heads), qkv, grad)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, 49, 197, 257])
def test_sequence_lengths(n, dtype, device):
    check(randn(2, n, 3 * 2 * 32, dtype=dtype, device=device), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_head_dims(head_dim, dtype, device):
    check(randn(2, 70, 3 * 2 * head_dim, dtype=dtype, device=device), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 197), (17, 5), (70, 37)])
def test_queries_of_their_own(m, n, dtype, device):
    heads = 3
    options = {"dtype": dtype, "device": device, "requires_grad": True}
    check_kv(randn(2, m, heads * 32, **options), randn(2, n, 2 * heads * 32, **options), heads)


def configurations(dtype, head_dim, **kind):
    """Of every architecture, each once."""
    every = [
        config
        for arch in ("interpreter", *GRID.architectures)
        for config in kernels.candidate_configs(dtype, arch, head_dim=head_dim, **kind)
    ]
    return [config for i, config in enumerate(every) if config not in every[:i]]


@pytest.mark.parametrize("head_dim", [32, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_configuration(head_dim, dtype, device):
    qkv = randn(1, 69, 3 * head_dim, dtype=dtype, device=device)
    for config in configurations(dtype, head_dim):
        with tuning.force_config("attention_backward", config):
            check(qkv, 1)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scale(scale, device):
    check(randn(2, 40, 3 * 2 * 32, dtype=torch.bfloat16, device=device), 2, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_peaked_softmax(dtype, device):
    """One key takes all: probabilities come out of scores and sums in the hundreds."""
    check(4 * randn(2, 70, 3 * 2 * 32, dtype=dtype, device=device), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 2), (3, 3), (5, 5), (17, 17), (1, 5), (37, 3), (70, 16)])
def test_peaked_scores_of_a_few_keys(m, n, dtype, device):
    """One key takes nearly all, so that dp - delta is little but rounding; no other rows outweigh it."""
    peaked = torch.tensor([3.0, 1.0], dtype=dtype, device=device).repeat_interleave(2 * 32)
    for seed in range(2):
        torch.manual_seed(seed)
        q, kv = (randn(4, rows, w, dtype=dtype, device=device) for rows, w in ((m, 64), (n, 128)))
        check_kv((3 * q).requires_grad_(), (kv * peaked).requires_grad_(), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_configuration_for_a_few_keys(dtype, device):
    qkv = 3 * randn(2, 7, 3 * 80, dtype=dtype, device=device)
    for config in configurations(dtype, 80, few=True) + configurations(dtype, 80):
        with tuning.force_config("attention_backward", config):
            check(qkv.detach(), 1)


@pytest.mark.parametrize("where", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_among_a_few_keys(value, where, device):
    """Keys past the end repeat the last one in some programs and are zeros in others."""
    qkv, grad = randn(2, 3, 3, 32, device=device), randn(2, 3, 32, device=device)
    (grad if where == "grad" else qkv[:, :, "qkv".index(where)])[0, 2, 5] = value
    found = []
    for mode, dtype in (
        ("triton", torch.float32),
        ("reference", torch.float32),
        ("reference", torch.float64),
    ):
        leaf = qkv.flatten(2).to(dtype).requires_grad_()
        with backend.use_backend(mode):
            found.append(torch.autograd.grad(explicit(leaf, mode), leaf, grad.to(dtype))[0])
    assert_parity(*found, kind="gradient")


@pytest.mark.parametrize("layout", ["offset", "every second row", "sequence first", "expanded"])
def test_layouts(layout, device):
    width = 3 * 2 * 32
    qkv = {
        "offset": lambda: randn(4, 40, width + 8, device=device)[1:, 3:, 8:],
        "every second row": lambda: randn(6, 74, width, device=device)[::2, ::2],
        "sequence first": lambda: randn(37, 3, width, device=device).transpose(0, 1),
        "expanded": lambda: randn(1, 37, width, device=device).expand(3, 37, width),
    }[layout]()
    check(qkv.detach(), 2)


@pytest.mark.parametrize("layout", ["one value", "one row", "transposed", "every second row"])
def test_layouts_of_the_upstream_gradient(layout, device):
    size, dtype = (2, 20, 64), torch.bfloat16
    grad = {
        "one value": lambda: randn(1, 1, 1, dtype=dtype, device=device).expand(size),
        "one row": lambda: randn(2, 1, 64, dtype=dtype, device=device).expand(size),
        "transposed": lambda: randn(2, 64, 20, dtype=dtype, device=device).transpose(1, 2),
        "every second row": lambda: randn(2, 40, 80, dtype=dtype, device=device)[:, ::2, 8:72],
    }[layout]()
    qkv = randn(2, 20, 192, dtype=dtype, device=device)
    assert torch.equal(gradient(qkv, grad), gradient(qkv, grad.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sum_exp(dtype, device):
    qkv = randn(2, 70, 3 * 2 * 40, dtype=dtype, device=device)
    with triton_forced(), torch.no_grad():
        actual = ATTENTION_TRAINING(qkv, 2, 0.2)
    eager = reference.attention_training(qkv, 2, 0.2)
    assert_parity(actual, eager, reference.attention_training(qkv.double(), 2, 0.2))


@pytest.mark.parametrize("shape", [(0, 197, 96), (2, 0, 96)])
def test_empty(shape, device):
    qkv = randn(*shape, device=device)
    assert gradient(qkv, qkv.new_empty(*shape[:2], 32), 1).shape == shape


def test_keys_that_no_query_asks(device):
    q, kv = (randn(2, m, w, device=device, requires_grad=True) for m, w in ((0, 64), (9, 128)))
    with triton_forced():
        dq, dkv = torch.autograd.grad(attention_kv(q, kv, 2), (q, kv), q.new_empty(2, 0, 64))
    assert dq.shape == (2, 0, 64)
    assert dkv.shape == (2, 9, 128)
    assert not dkv.any()


@pytest.mark.parametrize("where", ["qkv", "grad"])
@pytest.mark.parametrize("n", [5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_sample(n, where, dtype, device):
    """Samples lie side by side, and the last block of one reaches into the next."""
    qkv, grad = (randn(3, n, w, dtype=dtype, device=device) for w in (192, 64))
    clean = gradient(qkv, grad)
    for poison in (float("nan"), float("inf")):
        poisoned = {"qkv": qkv.clone(), "grad": grad.clone()}
        poisoned[where][1] = poison
        dqkv = gradient(**poisoned)
        assert torch.equal(dqkv[[0, 2]], clean[[0, 2]])
        assert not dqkv[1].isfinite().all()


def test_keys_at_minus_infinity_have_no_gradient(device):
    """Nor do the missing queries of a tail make one: their zeros times infinity are NaN."""
    qkv = randn(2, 70, 3, 1, 32, device=device)
    qkv[:, :, 0, 0, 0] = 1.0
    qkv[:, 66, 1, 0, 0] = float("-inf")
    dqkv = gradient(qkv.flatten(2), randn(2, 70, 32, device=device), 1).view_as(qkv)
    assert not dqkv[:, 66, 1:].any()
    assert dqkv[:, :, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    qkv, grad = (randn(3, 37, w, dtype=dtype, device=device) for w in (192, 64))
    assert torch.equal(gradient(qkv, grad)[:1], gradient(qkv[:1], grad[:1]))


def test_the_order_of_programs_does_not_matter(device):
    qkv, grad = (randn(2, 150, w, device=device) for w in (192, 64))
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
    with tuning.force_config("attention_backward", config):
        assert_order_does_not_matter(lambda: gradient(qkv, grad))


@pytest.mark.parametrize("frozen", ["q", "kv"])
def test_only_what_is_asked_for_is_computed(frozen, device):
    given = {"q": randn(2, 3, 64, device=device), "kv": randn(2, 40, 128, device=device)}
    grads = {}
    for asked in (["q", "kv"], [name for name in given if name != frozen]):
        tensors = {name: t.detach().requires_grad_(name in asked) for name, t in given.items()}
        with triton_forced():
            attention_kv(**tensors, num_heads=2).backward(torch.ones(2, 3, 64, device=device))
        for name in asked:
            assert torch.equal(grads.setdefault(name, tensors[name].grad), tensors[name].grad)
        assert all(tensors[name].grad is None for name in given if name not in asked)
    y, lse = ATTENTION_KV_TRAINING.reference(*given.values(), 2, 0.2)
    with triton_forced():
        results = ATTENTION_KV_BACKWARD(y, *given.values(), y, lse, 2, 0.2, frozen != "q", frozen != "kv")
    assert [t.numel() for t in results] == [0 if name == frozen else given[name].numel() for name in given]


def test_what_is_kept_is_qkv_and_what_the_next_op_keeps_anyhow(device):
    kept = []
    qkv = randn(2, 9, 192, device=device, requires_grad=True)
    with (
        triton_forced(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = attention(qkv, 2)
    assert [t.data_ptr() for t in kept[:2]] == [qkv.data_ptr(), y.data_ptr()]
    assert [tuple(t.shape) for t in kept[2:]] == [(2, 2, 9)]


def test_without_a_gradient_nothing_more_is_computed(device):
    qkv = randn(2, 9, 192, device=device)
    with triton_forced(), backend.observe() as ran:
        attention(qkv, 2)
        with torch.no_grad():
            attention(qkv.requires_grad_(), 2)
    assert dict(ran) == {("attention", "triton"): 2}


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_pytorch_differentiates_its_own_attention(mode, device):
    """Where no kernel was measured to be faster, and where none is wanted."""
    qkv = randn(2, 9, 192, dtype=torch.bfloat16, device=device, requires_grad=True)
    with backend.use_backend(mode), backend.observe() as ran:
        y = attention(qkv, 2)
        y.sum().backward()
    assert dict(ran) == {("attention", "reference"): 1}
    assert "fastvr" not in str(y.grad_fn)


def test_operators(device):
    qkv = randn(2, 9, 192, device=device, requires_grad=True)
    q, kv = (t.detach().requires_grad_() for t in qkv.tensor_split([64], dim=2))
    y, lse = reference.attention_training(qkv.detach(), 2, 0.2)
    with triton_forced():
        torch.library.opcheck(ATTENTION_TRAINING.overload, (qkv, 2, 0.2))
        # tracing with symbolic sizes takes seconds; the others are built alike
        others = [
            (ATTENTION_KV_TRAINING, (q, kv, 2, 0.2)),
            (ATTENTION_BACKWARD, (y, qkv.detach(), y, lse, 2, 0.2)),
            (ATTENTION_KV_BACKWARD, (y, q.detach(), kv.detach(), y, lse, 2, 0.2, True, False)),
        ]
        for op, args in others:
            utils = ("test_schema", "test_autograd_registration", "test_faketensor")
            torch.library.opcheck(op.overload, args, test_utils=utils)


def test_the_operator_of_a_traced_program_is_differentiable(device):
    qkv, grad = randn(2, 9, 192, device=device), randn(2, 9, 64, device=device)
    leaf = qkv.clone().requires_grad_()
    with triton_forced():
        (dqkv,) = torch.autograd.grad(ATTENTION.overload(leaf, 2, 32**-0.5), leaf, grad)
    assert torch.equal(dqkv, gradient(qkv, grad))


def test_autocast(device):
    """Products in its dtype, the gradient in the argument's own."""
    qkv, grad = randn(2, 9, 192, device=device), randn(2, 9, 64, dtype=torch.bfloat16, device=device)
    with torch.autocast(qkv.device.type, dtype=torch.bfloat16):
        dqkv = gradient(qkv, grad)
    assert torch.equal(dqkv, gradient(qkv.bfloat16(), grad).float())


def test_no_second_derivative(device):
    qkv = randn(2, 9, 192, device=device, requires_grad=True)
    with triton_forced(), pytest.raises(NotImplementedError, match="attention_training has no second deriv"):
        torch.autograd.grad(attention(qkv, 2).sum(), qkv, create_graph=True)


def test_flops_are_counted(device):
    from torch.utils.flop_counter import FlopCounterMode

    qkv = randn(3, 7, 192, device=device, requires_grad=True)
    with triton_forced():
        y = attention(qkv, 2)
        with FlopCounterMode(display=False) as counter:
            y.backward(y.detach())
    assert counter.get_total_flops() == 5 * 2 * 3 * 2 * (7 * 7 * 32)


def test_one_grid_dimension_for_any_number_of_heads():
    from fastvr.kernels.common import record_launches

    grids = []
    qkv, y = (torch.empty(5000, 197, w * 16 * 64, dtype=torch.bfloat16, device="meta") for w in (3, 1))
    lse = torch.empty(5000, 16, 197, device="meta")
    config = kernels.default_config(torch.bfloat16, "sm_90", head_dim=64)
    with record_launches(lambda kernel, grid, arguments, options: grids.append(grid)):
        kernels.launch_attention_bwd(
            grad=y, q=qkv, kv=qkv, y=y, lse=lse, delta=lse, dq=qkv, dkv=qkv, num_heads=16, scale=0.125,
            config=config,
        )  # fmt: skip
    assert grids == [(5000 * 16 * 4,), (5000 * 16 * 8,)]
