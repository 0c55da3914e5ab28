"""Attention of bfloat16 heads by oneDNN's products, as prepared models on a CPU may choose it."""

from __future__ import annotations

import pytest
import torch
from contract import randn

import fastvr
from fastvr import backend
from fastvr.ops.attention import attention
from fastvr.ops.cpu import mkldnn, onednn_attention
from fastvr.ops.cpu.prepared_pass import running
from fastvr.prepare import cpu
from fastvr.reference.attention import attention as reference
from fastvr.testing import assert_parity, truth_model

pytestmark = pytest.mark.skipif(
    not mkldnn.supports(torch.bfloat16), reason="this CPU has no bfloat16 instructions"
)


@pytest.fixture(autouse=True)
def _the_mode_of_users(monkeypatch):
    monkeypatch.setattr(backend, "kernels_possible", lambda device: False)
    with torch.no_grad():
        yield


def _qkv(batch: int, n: int, num_heads: int, head_dim: int, size: float = 1.0) -> torch.Tensor:
    return (randn(batch, n, 3 * num_heads * head_dim) * size).bfloat16()


def _check(qkv: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    actual = onednn_attention.attention(qkv, num_heads, scale)
    assert actual.dtype == torch.bfloat16
    assert_parity(actual, reference(qkv, num_heads, scale), reference(qkv.double(), num_heads, scale))
    return actual


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 128])
@pytest.mark.parametrize("n", [5, 50, 197, 257])
def test_scores_of_any_size(n, head_dim, size) -> None:
    _check(_qkv(2, n, 3, head_dim, size), 3, head_dim**-0.5)


@pytest.mark.parametrize("scale", [1.0, 0.125, 0.3])
@pytest.mark.parametrize(("batch", "n"), [(0, 17), (1, 1), (1, 577), (9, 33)])
def test_batches_and_scales(batch, n, scale) -> None:
    qkv = _qkv(batch, n, 2, 64)
    if not batch:
        assert onednn_attention.attention(qkv, 2, scale).shape == (0, n, 128)
        assert not onednn_attention.takes(qkv)
        return
    _check(qkv, 2, scale)


def test_layouts() -> None:
    qkv = _qkv(3, 20, 2, 32)
    plain = _check(qkv, 2, 0.25)
    strided = torch.cat([qkv, qkv], -1)[..., : qkv.shape[-1]]
    turned = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (strided, turned):
        assert torch.equal(_check(other, 2, 0.25), plain)
    assert torch.equal(_check(qkv[:1].expand_as(qkv), 2, 0.25)[2], plain[0])


def test_parts_and_batches_change_no_number(monkeypatch) -> None:
    qkv = _qkv(5, 40, 3, 32)
    whole = onednn_attention.attention(qkv, 3, 0.2)
    assert torch.equal(onednn_attention.attention(qkv[2:3], 3, 0.2), whole[2:3])
    for scores in (1, 40**2 * 4, 40**2 * 7):
        monkeypatch.setattr(onednn_attention, "_SCORES", scores)
        assert torch.equal(onednn_attention.attention(qkv, 3, 0.2), whole)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_sample_keeps_to_itself(poison) -> None:
    qkv = _qkv(3, 9, 2, 32)
    clean = onednn_attention.attention(qkv, 2, 0.2)
    qkv[1, 4, 3] = poison
    dirty = onednn_attention.attention(qkv, 2, 0.2)
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
    # the query itself, in its own head; and as a key nothing else is read of it
    assert dirty[1, 4, :32].isnan().all()
    assert torch.equal(dirty[1, :, 32:], clean[1, :, 32:])


def test_only_a_prepared_pass_that_chose_it_takes_it() -> None:
    qkv = _qkv(2, 9, 2, 32)
    key = onednn_attention.key(qkv, 2, 0.2)

    def implementations() -> set[str]:
        with backend.observe() as ran:
            attention(qkv, 2, scale=0.2)
        return {name for _, name in ran}

    assert implementations() == {"reference"}
    with running(qkv, ()):
        assert implementations() == {"reference"}
    with running(qkv, {key}):
        assert implementations() == {"mkldnn"}
        # any batch, and no other length
        assert onednn_attention.key(qkv[:1], 2, 0.2) == key
        assert onednn_attention.key(qkv[:, :8], 2, 0.2) != key


@pytest.mark.parametrize("faster", [False, True])
def test_a_prepared_vit_takes_what_was_faster(faster, monkeypatch, tiny_vit, images) -> None:
    monkeypatch.setattr(cpu, "_fastest", lambda calls, **given: len(calls) - 1 if faster else 0)
    model = tiny_vit().bfloat16()
    prepared = fastvr.prepare(model, images().bfloat16())
    for n in (1, 2, 5):
        x = images(n).bfloat16()
        with backend.observe() as ran:
            actual = prepared(x)
        assert (("attention", "mkldnn") in ran) == faster
        with fastvr.use_backend("reference"):
            assert_parity(actual, model(x), truth_model(model)(x.double()))


def test_what_breaks_the_parity_rule_cannot_win(monkeypatch, tiny_vit, images) -> None:
    monkeypatch.setattr(cpu, "_fastest", lambda calls, **given: len(calls) - 1)
    right = onednn_attention.attention
    monkeypatch.setattr(onednn_attention, "attention", lambda *args, **given: right(*args, **given) * 1.05)
    prepared = fastvr.prepare(tiny_vit().bfloat16(), images().bfloat16())
    with backend.observe() as ran:
        prepared(images().bfloat16())
    assert ("attention", "mkldnn") not in ran
