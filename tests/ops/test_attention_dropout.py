"""Dropout of attention weights: the words of Philox, and attention forward and backward with their mask."""

from __future__ import annotations

import math

import pytest
import torch
from contract import DTYPES, GRID, randn, triton_forced
from torch.utils.checkpoint import checkpoint

import fastvr
from fastvr import backend, tuning
from fastvr.nn.attention import Attention
from fastvr.nn.block import Block
from fastvr.ops.attention import ATTENTION_TRAINING, attention
from fastvr.ops.dropout import draw_seed
from fastvr.ops.layernorm_attention import layernorm_attention
from fastvr.reference import attention as reference
from fastvr.reference import dropout
from fastvr.reference.layernorm_attention import layernorm_attention as attention_reference
from fastvr.testing import check_op

pytest.importorskip("triton")
import triton
import triton.language as tl

from fastvr.kernels import attention as forward_kernels
from fastvr.kernels import attention_backward as backward_kernels
from fastvr.kernels.dropout import kept

HEADS = 2


def seeds(device, value=7):
    generator = torch.Generator().manual_seed(value)
    return torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator).to(device)


@triton.jit
def _words_kernel(seed_ptr, words_ptr, uniform_ptr, N: tl.constexpr):
    seed, places = tl.load(seed_ptr), tl.arange(0, N)
    words = tl.randint4x(seed, places)
    for i in tl.static_range(4):
        tl.store(words_ptr + i * N + places, words[i])
    tl.store(uniform_ptr + places, tl.rand(seed, places))


@triton.jit
def _kept_kernel(
    seed_ptr, stays_ptr, plane, query, key, threshold, QUERIES: tl.constexpr, KEYS: tl.constexpr
):
    stays = kept(seed_ptr, plane, query, key, threshold, QUERIES, KEYS)
    cells = tl.arange(0, QUERIES)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    tl.store(stays_ptr + cells, stays.to(tl.int8))


@pytest.mark.parametrize("value", [1, 2])
def test_the_words_are_tritons(value, device):
    seed, n = seeds(device, value), 64
    words = torch.empty(4, n, dtype=torch.int32, device=device)
    uniform = torch.empty(n, device=device)
    _words_kernel[(1,)](seed, words, uniform, n)
    zero = torch.zeros(n, dtype=torch.int64, device=device)
    found = dropout.philox(seed[0], (torch.arange(n, device=device), zero, zero, zero))
    assert torch.equal(torch.stack(found), words.long() & 0xFFFFFFFF)
    # tl.rand's is the first word, its sign folded away
    first = words[0].long()
    assert torch.equal(torch.where(first < 0, -first - 1, first) * torch.tensor(4.6566127342e-10), uniform)


def test_known_words():
    """The authors' own test vectors for Philox 4x32-10, of their library Random123."""
    for word, key, expected in (
        (0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ):
        counter = (torch.tensor(word),) * 4
        assert [int(found) for found in dropout.philox(torch.tensor(key), counter)] == expected


@pytest.mark.parametrize("p", [0.3, 1e-300, 1.0])
def test_a_block_of_the_mask(p, device):
    seed, threshold = seeds(device), dropout.threshold(p)
    stays = torch.empty(16, 32, dtype=torch.int8, device=device)
    _kept_kernel[(1,)](seed, stays, 5, 16, 32, threshold, 16, 32)
    whole = dropout.kept(seed, 3, HEADS, 40, 70, p)
    assert whole.shape == (3, HEADS, 40, 70)
    assert torch.equal(stays.bool(), whole[2, 1, 16:32, 32:64])


@pytest.mark.parametrize("p", [0.01, 0.5, 0.99])
def test_how_many_stay(p):
    stays = dropout.kept(seeds("cpu"), 2, 4, 64, 250, p).double()
    assert abs(float(stays.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / stays.numel())
    # neighbours are independent: 5 standard errors of a correlation
    centred = stays - stays.mean()
    for dim in range(4):
        together = (centred * centred.roll(1, dim)).mean() / centred.square().mean()
        assert abs(float(together)) < 5 / math.sqrt(stays.numel())


def check(qkv, p, *, device):
    scale, seed = 32**-0.5, seeds(device)
    given = {"qkv": qkv.requires_grad_(), "seed": seed}
    with triton_forced(), backend.observe() as ran:
        check_op(
            lambda qkv, seed: ATTENTION_TRAINING(qkv, HEADS, scale, p, seed)[0],
            lambda qkv, seed: reference.attention(qkv, HEADS, scale, p, seed),
            given,
            sample_inputs=("qkv",),
        )
    assert dict(ran) == {("attention_training", "triton"): 1, ("attention_backward", "triton"): 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "p"), [(69, 0.1), (1, 0.5)])
def test_parity(n, p, dtype, device):
    check(randn(2, n, 3 * HEADS * 32, dtype=dtype, device=device), p, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 17])
def test_peaked_scores_of_a_few_keys(n, dtype, device):
    """One key takes nearly all, so that dp - delta is little but rounding; no other rows outweigh it."""
    peaked = torch.tensor([3.0, 3.0, 1.0], dtype=dtype, device=device).repeat_interleave(HEADS * 32)
    for seed in range(4):
        torch.manual_seed(seed)
        qkv = (randn(4, n, 3 * HEADS * 32, dtype=dtype, device=device) * peaked).detach()
        check(qkv, 0.1 if seed % 2 else 0.3, device=device)


@pytest.mark.parametrize("p", [1e-300, 0.999, 1.0])
def test_almost_nothing_and_almost_everything(p, device):
    check(randn(2, 20, 3 * HEADS * 32, device=device), p, device=device)


def test_every_configuration_drops_the_same(device):
    qkv = randn(1, 69, 3 * HEADS * 32, dtype=torch.bfloat16, device=device)
    for name, module in (("attention_training", forward_kernels), ("attention_backward", backward_kernels)):
        every = [
            config
            for arch in GRID.architectures
            for head_dim in (32, 128)
            for config in module.candidate_configs(torch.bfloat16, arch, head_dim=head_dim, dropout=True)
        ]
        for config in {tuple(config.items()): config for config in every}.values():
            with tuning.force_config(name, config):
                check(qkv, 0.2, device=device)


def test_one_seed_one_result(device):
    qkv = randn(2, 20, 3 * HEADS * 32, device=device, requires_grad=True)

    def run():
        y = attention(qkv, HEADS, dropout_p=0.4)
        return y.detach(), torch.autograd.grad(y, qkv, torch.ones_like(y))[0]

    with triton_forced():
        torch.manual_seed(1)
        first, second = run(), run()
        torch.manual_seed(1)
        again = run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_draws_anew_at_each_replay(device):
    qkv = randn(2, 20, 3 * HEADS * 32, device=device)

    def run():
        return ATTENTION_TRAINING(qkv, HEADS, 0.2, 0.5, draw_seed(qkv))[0]

    with triton_forced(), torch.no_grad():
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
    found = []
    for _ in range(2):
        graph.replay()
        found.append(y.clone())
    assert not torch.equal(*found)


def test_elsewhere_pytorch_drops(device):
    """Without kernels the stream is that of PyTorch's own attention; at 0 nothing is drawn."""
    qkv = randn(2, 20, 3 * HEADS * 32, device=device, requires_grad=True)
    with fastvr.use_backend("reference"):
        torch.manual_seed(1)
        y, after = attention(qkv, HEADS, dropout_p=0.4), torch.rand(1)
        torch.manual_seed(1)
        q, k, v = qkv.unflatten(-1, (3, HEADS, 32)).permute(2, 0, 3, 1, 4)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
        assert torch.equal(y, expected.transpose(1, 2).flatten(2))
        assert torch.equal(after, torch.rand(1))
    with triton_forced():
        torch.manual_seed(1)
        undropped = torch.rand(1)
        torch.manual_seed(1)
        attention(qkv, HEADS, dropout_p=0.0)
        assert torch.equal(torch.rand(1), undropped)


@pytest.mark.parametrize("wanted", [None, ("proj_weight",)], ids=str)
def test_in_half_a_block(wanted, device):
    given = {
        "x": randn(2, 20, 64, device=device),
        "ln_weight": randn(64, device=device),
        "ln_bias": randn(64, device=device),
        "qkv_weight": randn(192, 64, device=device) / 8,
        "qkv_bias": randn(192, device=device),
        "proj_weight": randn(64, 64, device=device) / 8,
        "proj_bias": randn(64, device=device),
    }
    for name, value in given.items():
        value.requires_grad_(wanted is None or name in wanted)

    def ours(x, **rest):
        torch.manual_seed(5)
        return layernorm_attention(x, **rest, num_heads=HEADS, residual=x, dropout_p=0.3)

    def eager(x, **rest):
        torch.manual_seed(5)
        seed = draw_seed(x)
        numbers = {"num_heads": HEADS, "scale": 32**-0.5, "eps": 1e-6, "dropout_p": 0.3, "seed": seed}
        return attention_reference(x, **rest, gamma=None, residual=x, **numbers)

    with triton_forced(), backend.observe() as ran:
        check_op(ours, eager, given)
    assert ran["layernorm_attention_training", "triton"] == 1


def test_a_block_is_one_op_and_computed_again_the_same(device):
    block = Block(64, HEADS, mlp_ratio=1, attn_drop=0.5, proj_drop=0.5, drop_path=0.5).to(device)
    x, upstream, found = randn(2, 5, 64, device=device), randn(2, 5, 64, device=device), []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(2)
        block.zero_grad()
        with triton_forced(), backend.observe() as ran, torch.autocast(device.type, torch.bfloat16):
            run(x).backward(upstream)
        found.append([p.grad for p in block.parameters()])
    assert ran["transformer_block_training", "triton"] == 2
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_without_kernels_a_block_draws_what_timms_does(device):
    from timm.models.vision_transformer import Block as Timms

    rates = {"attn_drop": 0.4, "proj_drop": 0.3, "drop_path": 0.5}
    theirs, x = Timms(64, HEADS, qkv_bias=True, **rates).to(device), randn(4, 9, 64, device=device)
    ours = Block(64, HEADS, **rates).to(device)
    ours.load_state_dict(theirs.state_dict())
    found = []
    for block in (theirs, ours):
        torch.manual_seed(6)
        with fastvr.use_backend("reference"):
            found.append((block(x), torch.rand(1)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_in_a_module(device):
    module, x = Attention(64, HEADS, attn_drop=0.5).to(device).train(), randn(2, 9, 64, device=device)
    with triton_forced(), backend.observe() as ran:
        module(x).square().mean().backward()
    assert ran["attention_training", "triton"] == ran["attention_backward", "triton"] == 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_operators(device):
    qkv = randn(2, 9, 3 * HEADS * 32, device=device, requires_grad=True)
    with triton_forced():
        torch.library.opcheck(ATTENTION_TRAINING.overload, (qkv, HEADS, 0.2, 0.3, seeds(device)))
        y, lse = ATTENTION_TRAINING(qkv.detach(), HEADS, 0.2, 0.3, seeds(device))
        args = (torch.ones_like(y), qkv.detach(), y, lse, HEADS, 0.2, 0.3, seeds(device))
        torch.library.opcheck(torch.ops.fastvr.attention_backward.default, args)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan"), True, "half"])
def test_bad_arguments(p):
    with pytest.raises(ValueError, match="attention: dropout_p must be a number from 0 to 1; got"):
        attention(torch.zeros(1, 2, 192), HEADS, dropout_p=p)
