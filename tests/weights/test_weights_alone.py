"""What weights without a configuration tell of their model, and what they do not."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
from tiny import TINY_VIT
from torch import nn

import fastvr
from fastvr.testing import assert_parity, truth_model


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_oblong_images_of_weights_alone(no_embed_class) -> None:
    """3 x 5 patches and a class token make 16 positions, which are not those of 4 x 4 patches."""
    sizes = {**TINY_VIT, "img_size": (24, 40), "no_embed_class": no_embed_class}
    theirs = timm.models.vision_transformer.VisionTransformer(**sizes).eval()
    nn.init.normal_(theirs.pos_embed)
    model = fastvr.load_model(theirs.state_dict(), num_heads=2, img_size=(24, 40))
    assert model.no_embed_class == no_embed_class
    x = torch.randn(2, 3, 24, 40)
    with torch.no_grad(), fastvr.use_backend("reference"):
        assert_parity(model(x), theirs(x), truth_model(theirs)(x.double()))
    if no_embed_class:
        with pytest.raises(fastvr.CheckpointError, match="if its images are oblong, give their img_size="):
            fastvr.load_model(theirs.state_dict(), num_heads=2)


def test_square_images_in_oblong_patches_of_weights_alone() -> None:
    """8 of them and a class token, which are not 3 x 3 patches either."""
    state = fastvr.ViT(**{**TINY_VIT, "patch_size": (8, 16)}).state_dict()
    model = fastvr.load_model(state, num_heads=2)
    assert (model.img_size, model.no_embed_class) == ((32, 32), False)
    state = fastvr.ViT(**{**TINY_VIT, "patch_size": (8, 16), "img_size": (32, 64)}).state_dict()
    assert fastvr.load_model(state, num_heads=2).img_size == (32, 64)


def test_rotary_positions_are_not_forgotten(caplog) -> None:
    """The weights do not hold them."""
    peer = timm.create_model("vit_pe_core_tiny_patch16_384", img_size=32, depth=1)
    with pytest.raises(fastvr.CheckpointError, match="whose rotary positions fastvr's ViT has not"):
        fastvr.load_model(peer.state_dict())
    peer = timm.create_model("vit_small_patch16_rope_ape_224", img_size=32, depth=1)
    with caplog.at_level(logging.WARNING, "fastvr"):
        fastvr.load_model(peer.state_dict())
    assert "does not say whether it has rotary positions; it is taken for DeiT-III's own" in caplog.text


def test_three_stages_are_no_resnet(make_peer) -> None:
    state = {k: t for k, t in make_peer("timm-resnet").state_dict().items() if not k.startswith("layer4.")}
    with pytest.raises(fastvr.CheckpointError, match=r"has stages of \(1, 1, 1, 0\) blocks"):
        fastvr.load_model(state)


@pytest.mark.parametrize(
    "name", ["vit_giantopt_patch16_siglip_256", "vit_giant_patch16_radio_v3", "vit_giant_patch14_dinov2"]
)
def test_heads_of_one_width(name) -> None:
    """Of 1536 features one giant has 16 heads and two have 24."""
    model = fastvr.create_model(name, depth=1, img_size=32, mlp_ratio=1 / 16)
    again = fastvr.load_model(model.state_dict(), final_norm="radio" not in name)
    assert again.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads
