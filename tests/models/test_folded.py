"""Prepared ViTs with their LayerNorms folded into the products: the same function in fewer launches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import fastvr
from fastvr import backend
from fastvr.prepare.folded import FoldedViT
from fastvr.testing import assert_parity, truth_model

pytest.importorskip("triton")

VARIANTS = {
    "plain": {},
    "layer scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 2},
    "positions for patches only": {"reg_tokens": 1, "no_embed_class": True},
    "average": {"global_pool": "avg", "class_token": False},
    "average of patches": {"global_pool": "avg", "fc_norm": False},
    "every token": {"global_pool": "", "num_classes": 0},
    "no classifier": {"num_classes": 0},
    "norm behind the pooling": {"fc_norm": True},
    "tanh": {"act": "gelu_tanh"},
    "no qkv bias": {"qkv_bias": False},
    "one block": {"depth": 1},
}


def ran(model, x: torch.Tensor) -> tuple[torch.Tensor, Counter]:
    with fastvr.use_backend("triton"), backend.observe() as seen:
        y = fastvr.prepare(model, x)(x)
    return y, seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gives_what_the_model_gives(variant, dtype, tiny_vit, images, device) -> None:
    if dtype == torch.float16 and variant != "plain":
        pytest.skip("one variant says what float16 does")
    model = tiny_vit(**VARIANTS[variant]).to(device, dtype)
    x = images(3).to(device, dtype)
    with torch.no_grad(), fastvr.use_backend("reference"):
        eager, exact = model(x), truth_model(model)(x.double())
    y, seen = ran(model, x)
    assert_parity(y, eager, exact)
    assert seen["norm_linear", "triton"] > 0
    assert seen["layernorm_mlp", "triton"] == 0


def test_launches(tiny_vit, images) -> None:
    from fastvr.compare.traffic import count

    model = tiny_vit(depth=5).bfloat16().to("meta")
    x = images(2).bfloat16().to("meta")
    with fastvr.use_backend("triton"), backend.assume_architecture("sm_90"):
        prepared = fastvr.prepare(model, x)
    traffic = count(prepared, x)
    # the embedding, five a block, one more for the class token's query, and the head with its norm
    assert traffic is not None
    assert traffic.launches == 1 + 5 * 5 + 1 + 1


def _folded(model: nn.Module, x: torch.Tensor) -> bool:
    with fastvr.use_backend("triton"):
        return isinstance(fastvr.prepare(model, x)._snapshot, FoldedViT)


def test_where_it_is_not_folded(tiny_vit, images) -> None:
    x = images(1)
    assert not _folded(tiny_vit(), x)
    assert not _folded(tiny_vit(norm_first=False).bfloat16(), x.bfloat16())
    model = tiny_vit().bfloat16()
    assert _folded(model, x.bfloat16())
    model.blocks[1].mlp.act = nn.SiLU().eval()
    assert not _folded(model, x.bfloat16())
    # without a GPU's measurement nothing says that it is faster
    prepared = fastvr.prepare(tiny_vit().bfloat16(), x.bfloat16())
    assert not isinstance(prepared._snapshot, FoldedViT)


def test_large_means_and_outlier_channels(tiny_vit, images, device) -> None:
    model = tiny_vit().to(device, torch.bfloat16)
    with torch.no_grad():
        model.pos_embed[..., 5] += 50
        model.pos_embed[:, 1:] += 20
    x = images(2).to(device, torch.bfloat16)
    with torch.no_grad(), fastvr.use_backend("reference"):
        eager, exact = model(x), truth_model(model)(x.double())
    assert_parity(ran(model, x)[0], eager, exact)


def test_the_source_keeps_its_blocks(tiny_vit, images) -> None:
    model = tiny_vit().bfloat16()
    x = images(1).bfloat16()
    before = model(x)
    ran(model, x)
    assert len(model.blocks) == 2
    assert torch.equal(model(x), before)
