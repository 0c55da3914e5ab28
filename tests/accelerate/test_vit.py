"""timm's and torchvision's ViTs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastvr
from fastvr import backend
from fastvr.compare.traffic import count, eager_traffic
from fastvr.testing import assert_parity, truth_model

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
}


def _timm(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(**{**TINY, **overrides})


def _torchvision(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 64}
    model = torchvision.models.VisionTransformer(**sizes, mlp_dim=128, num_classes=10, **overrides)
    return model


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("make", [_timm, _torchvision], ids=["timm", "torchvision"])
def test_parity_and_launches(make, mode, hold, images) -> None:
    report, ran = hold(make(), images, mode=mode)
    assert ran["attention", mode] == ran["layernorm_mlp", mode] == 2
    assert ran["linear", mode] == 4
    assert ran["layer_norm", mode] == 3
    # PyTorch's convolution is called where no kernel runs
    assert ran["patch_embed", mode] == (mode == "triton")
    assert {implementation for _, implementation in ran} == {mode}
    assert report.counts["torch Conv2d"] == 1


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_traffic(library) -> None:
    """One launch more than fastvr's own ViT-B/16 makes: the model itself adds class token and positions."""
    with torch.device("meta"):
        if library == "timm":
            model = timm.create_model("vit_base_patch16_224")
        else:
            model = torchvision.models.vit_b_16()
        model = model.to(torch.bfloat16).eval()
        x = torch.empty(64, 3, 224, 224, dtype=torch.bfloat16)
    eager = eager_traffic(model, x)
    fastvr.accelerate(model)
    traffic = count(model, x)
    assert traffic is not None
    assert traffic.launches == 77
    assert traffic.bytes < 0.65 * eager.bytes


@pytest.mark.parametrize(
    "overrides",
    [
        {"init_values": 0.1},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 4, "no_embed_class": True},
        {"qkv_bias": False},
        {"pre_norm": True, "norm_layer": nn.LayerNorm},
        {"act_layer": "quick_gelu"},
        {"act_layer": "gelu_tanh"},
        {"dynamic_img_size": True},
        {"drop_path_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1},
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_timm_configurations(overrides, hold, images) -> None:
    _, ran = hold(_timm(**overrides), images)
    assert ran["layernorm_mlp", "reference"] == 2
    assert ran["attention", "reference"] == 2


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_attention_pooling(mode, hold, hold_gradients, images) -> None:
    pooled = {"class_token": False, "global_pool": "map", "depth": 1}
    report, ran = hold(_timm(**pooled), images, mode=mode)
    assert ran["attention_kv", mode] == 1
    assert ran["layernorm_mlp", mode] == 2
    assert "timm AttentionPoolLatent" in report.counts
    ran = hold_gradients(_timm(**pooled), images, mode=mode)
    assert ran["attention_kv_training" if mode == "triton" else "attention_kv", mode] == 1


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("layer", ["SwiGLUPacked", "SwiGLU"])
def test_swiglu(layer, mode, hold, hold_gradients, images) -> None:
    gated = {"mlp_layer": getattr(timm.layers, layer), "act_layer": nn.SiLU, "depth": 1}
    report, ran = hold(_timm(**gated), images, mode=mode)
    assert ran["swiglu", mode] == 1
    assert ran["linear", mode] == 4
    assert not {entry.kind for entry in report.left} & {"timm GluMlp", "timm SwiGLU"}
    ran = hold_gradients(_timm(init_values=0.1, **gated), images, mode=mode)
    assert ran["swiglu", mode] == 1


@pytest.mark.parametrize(
    ("layer", "options", "reason"),
    [
        ("GluMlp", {"act_layer": nn.SiLU}, "it is gated otherwise than SwiGLU"),
        ("GluMlp", {"act_layer": nn.Sigmoid, "gate_last": False}, "it is gated otherwise than SwiGLU"),
        ("GluMlp", {"act_layer": nn.SiLU, "gate_last": False, "norm_layer": nn.LayerNorm}, "it normalises"),
        ("SwiGLU", {"norm_layer": nn.LayerNorm}, "it normalises between its layers"),
    ],
    ids=str,
)
def test_other_gated_mlps_are_left(layer, options, reason, hold, tokens) -> None:
    mlp = getattr(timm.layers, layer)(64, 96, **options)
    report, ran = hold(nn.Sequential(mlp), tokens)
    assert ("swiglu", "reference") not in ran
    assert [entry.what.startswith(reason) for entry in report.left if layer in entry.kind] == [True]


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_normalised_queries_and_keys(mode, hold, hold_gradients, images) -> None:
    normed = {"qk_norm": True, "depth": 1}
    report, ran = hold(_timm(**normed), images, mode=mode)
    assert ran["attention_kv", mode] == 1
    assert not [entry for entry in report.left if entry.kind == "timm Attention"]
    hold_gradients(_timm(**normed), images, mode=mode)


@pytest.mark.parametrize(
    "overrides",
    [{"qk_norm": True, "norm_layer": timm.layers.RmsNorm}, {"scale_attn_norm": True}],
    ids=["qk", "scale"],
)
def test_normalised_attention_stays_pytorchs(overrides, hold, images) -> None:
    report, ran = hold(_timm(**overrides), images)
    assert not {("attention", "reference"), ("attention_kv", "reference")} & ran.keys()
    assert ran["layernorm_mlp", "reference"] == (0 if "norm_layer" in overrides else 2)
    (reason,) = {entry.what for entry in report.left if entry.kind == "timm Attention"}
    assert "normalises" in reason


def test_normalised_mlp(hold, images) -> None:
    report, ran = hold(_timm(scale_mlp_norm=True), images)
    assert ("layernorm_mlp", "reference") not in ran
    assert ran["attention", "reference"] == 2
    assert [entry.what for entry in report.left if entry.kind == "timm Mlp"] == [
        "it normalises between its layers"
    ] * 2


@pytest.mark.parametrize("make", [_timm, _torchvision], ids=["timm", "torchvision"])
def test_gradients(make, hold_gradients, images) -> None:
    ran = hold_gradients(make(), images)
    assert ran["attention", "reference"] == 2


def test_gradients_of_kernels(hold_gradients, images) -> None:
    ran = hold_gradients(_timm(depth=1, init_values=0.1), images, mode="triton")
    assert ran["attention_backward", "triton"] == ran["linear_act_backward", "triton"] == 1


@pytest.mark.parametrize(("rate", "fused"), [("drop_path", 1), ("proj_drop", 0)])
def test_drop_path_stays_within_the_launches_and_dropout_pytorchs(rate, fused, device) -> None:
    block = Block(64, 2, mlp_ratio=1, init_values=0.3, **{rate: 0.5})
    eager = block.to(device).train()
    ours, exact, x = copy.deepcopy(eager), truth_model(eager), torch.randn(4, 9, 64, device=device)
    fastvr.accelerate(ours)
    upstream, found = torch.randn(4, 9, 64, device=device), []
    for model, mode in ((ours, "triton"), (eager, "reference"), (exact, "reference")):
        torch.manual_seed(3)
        dtype = next(model.parameters()).dtype
        with fastvr.use_backend(mode), backend.observe() as ran:
            model(x.to(dtype)).backward(upstream.to(dtype))
        found.append({name: p.grad for name, p in model.named_parameters()})
        assert mode == "reference" or ran["layernorm_mlp_training", "triton"] == fused
        assert ran["dropout", "triton"] == 0
    assert_parity(*found, kind="gradient", sample_dim=None)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_rotary_towers_around_their_attention(name, hold, images) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
    report, ran = hold(timm.create_model(name, pretrained=False, **sizes), images)
    assert ran["layer_norm", "reference"] >= 3
    reasons = {entry.what for entry in report.left if "Attention" in entry.kind}
    assert reasons == {"rotary positions: attention stays PyTorch's"}
    assert ran["layernorm_mlp", "reference"] == (2 if "dinov3" in name else 0)


@pytest.mark.parametrize(
    "given", [{"is_causal": True}, {"attn_mask": torch.ones(17, 17).tril().bool()}], ids=["causal", "mask"]
)
def test_masks_are_run_by_timm_itself(given, tokens) -> None:
    block = _timm().blocks[0].eval()
    x = torch.randn(2, 17, 64)
    expected = block(x, **given)
    fastvr.accelerate(block)
    with fastvr.use_backend("reference"):
        assert torch.equal(block(x, **given), expected)


@pytest.mark.parametrize(
    "rates", [{"attn_drop_rate": 0.5}, {"proj_drop_rate": 0.5}, {"drop_path_rate": 0.5}], ids=str
)
def test_dropout_draws_what_it_drew(rates, images) -> None:
    """In training the same random numbers are drawn in the same order."""
    eager = _timm(**rates).train()
    model = copy.deepcopy(eager)
    fastvr.accelerate(model)
    with fastvr.use_backend("reference"):
        torch.manual_seed(7)
        expected = eager(images)
        torch.manual_seed(7)
        assert torch.equal(model(images), expected)
