"""ViT beside timm's: keys, logits, features, methods."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import fastvr
from fastvr import backend
from fastvr.models.vit import PRESETS
from fastvr.testing import assert_parity, truth_model

VARIANTS = {
    "plain": {},
    "layerscale-registers": {"init_values": 0.1, "reg_tokens": 4, "no_embed_class": True},
    "registers": {"reg_tokens": 2},
    "avg": {"global_pool": "avg"},
    "avg-without-class-token": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "token-fc-norm": {"fc_norm": True},
    "all-tokens": {"global_pool": ""},
    "no-qkv-bias": {"qkv_bias": False},
    "no-head": {"num_classes": 0},
    "attention-pooling-registers": {"reg_tokens": 2, "global_pool": "map"},
    "no-last-norm": {"final_norm": False},
    "no-last-norm-avg": {"final_norm": False, "global_pool": "avg"},
    "a margin": {"img_size": (30, 39)},
    "oblong": {"img_size": (16, 40), "patch_size": (8, 4)},
}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large", "huge"])
def test_presets_have_timms_keys_in_order(name: str) -> None:
    patch = PRESETS[f"vit_{name}"]["patch_size"]
    with torch.device("meta"):
        ours = fastvr.create_model(f"vit_{name}")
        theirs = timm.create_model(f"vit_{name}_patch{patch}_224", num_classes=1000)
    assert list(_shapes(ours).items()) == list(_shapes(theirs).items())
    assert ours.no_weight_decay() <= theirs.no_weight_decay()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_features_are_timms(variant, tiny_vit, tiny_timm) -> None:
    theirs, ours = tiny_timm(**VARIANTS[variant]), tiny_vit(**VARIANTS[variant])
    assert _shapes(ours) == _shapes(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 3, *ours.img_size)
    truth = truth_model(theirs)
    with torch.no_grad():
        assert_parity(ours(x), theirs(x), truth(x.double()), name="logits")
        features = theirs.forward_features(x)
        assert_parity(ours.forward_features(x), features, truth.forward_features(x.double()), name="features")
        assert_parity(
            ours.forward_head(features, pre_logits=True),
            theirs.forward_head(features, pre_logits=True),
            truth.forward_head(features.double(), pre_logits=True),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["plain", "layerscale-registers", "avg"])
def test_kernels_give_timms_logits(variant, dtype, tiny_vit, tiny_timm, images, device) -> None:
    theirs, ours = tiny_timm(depth=1, **VARIANTS[variant]), tiny_vit(depth=1, **VARIANTS[variant])
    theirs, ours = theirs.to(device, dtype), ours.to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    x = images(2).to(device, dtype)
    with torch.no_grad():
        with fastvr.use_backend("triton"), backend.observe() as ran:
            actual = ours(x)
        assert_parity(actual, theirs(x), truth_model(theirs)(x.double()))
    assert {implementation for _, implementation in ran} == {"triton"}


def test_post_norm_is_the_plain_transformer_encoder(tiny_vit, images) -> None:
    ours = tiny_vit(norm_first=False, act="relu", norm_eps=1e-5)
    layer = nn.TransformerEncoderLayer(64, 2, 256, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    names = {
        "attn.qkv.weight": "self_attn.in_proj_weight",
        "attn.qkv.bias": "self_attn.in_proj_bias",
        "attn.proj": "self_attn.out_proj",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
    }
    state = {}
    for name, tensor in ours.blocks.state_dict().items():
        for mine, yours in names.items():
            name = name.replace(mine, yours)
        state[f"layers.{name}"] = tensor
    encoder.load_state_dict(state)
    x = images(3)
    exact, truth = truth_model(ours), truth_model(encoder)
    tokens, exact_tokens = ours._embed(x), exact._embed(x.double())
    # with autograd on, so that PyTorch does not take its fused inference path, another function of rounding
    assert_parity(ours.blocks(tokens), encoder(tokens), truth(exact_tokens))
    with torch.no_grad():
        assert_parity(ours(x), ours.forward_head(ours.norm(encoder(tokens))), exact(x.double()))


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_activation(act: str, tiny_vit, tiny_timm, images) -> None:
    layers = {
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
        "relu": nn.ReLU,
        "quick_gelu": QuickGELU,
    }
    theirs, ours = tiny_timm(act_layer=layers[act]), tiny_vit(act=act)
    ours.load_state_dict(theirs.state_dict())
    x = images()
    with torch.no_grad():
        assert_parity(ours(x), theirs(x), truth_model(theirs)(x.double()))


def test_intermediate_layers_are_timms(tiny_vit, tiny_timm, images) -> None:
    theirs, ours = tiny_timm(depth=3), tiny_vit(depth=3)
    ours.load_state_dict(theirs.state_dict())
    x, truth = images(), truth_model(theirs)
    for options in (
        {"n": 2},
        {"n": (0, 2), "reshape": True, "norm": True},
        {"n": [-1], "return_prefix_tokens": True},
    ):
        with torch.no_grad():
            actual = ours.get_intermediate_layers(x, **options)
            if options["n"] == [-1]:
                options["n"] = [2]
            expected = theirs.get_intermediate_layers(x, **options)
            exact = truth.get_intermediate_layers(x.double(), **options)
        assert_parity(actual, expected, exact, name=str(options))


def test_reset_classifier(tiny_vit, images) -> None:
    model = tiny_vit()
    assert model.get_classifier() is model.head
    model.reset_classifier(7, "avg")
    assert model(images()).shape == (2, 7)
    assert model.head.weight.std() > 0
    assert not model.head.training
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, 17, 64)
    assert isinstance(model.get_classifier(), nn.Identity)
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(-1)


def test_initial_weights_are_timms_distribution() -> None:
    torch.manual_seed(0)
    ours, theirs = fastvr.ViT(depth=2, num_classes=10), VisionTransformer(depth=2, num_classes=10)
    for (name, mine), yours in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        # 5 standard errors of a standard deviation, and 0 where timm has a constant
        slack = 5 * float(yours.std()) / (2 * yours.numel()) ** 0.5 * 2**0.5
        assert abs(float(mine.std() - yours.std())) <= slack, name
        assert abs(float(mine.mean() - yours.mean())) <= 2 * slack, name


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"embed_dim": 100, "num_heads": 3}, "embed_dim"),
        ({"num_heads": 0}, "num_heads"),
        ({"img_size": 7}, "img_size"),
        ({"img_size": (32, 7)}, "img_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"patch_size": (1, 2, 3)}, "patch_size"),
        ({"depth": -1}, "depth"),
        ({"in_chans": 0}, "in_chans"),
        ({"num_classes": -1}, "num_classes"),
        ({"reg_tokens": -1}, "reg_tokens"),
        ({"global_pool": "max"}, "global_pool"),
        ({"class_token": False}, "global_pool"),
        ({"act": "silu"}, "ViT: act must be one of .*'swiglu'; got 'silu'"),
        ({"act": "swiglu", "global_pool": "map"}, "act must be that of a plain MLP"),
        ({"act": "swiglu", "mlp_ratio": 65 / 64}, "hidden_features must be even"),
    ],
    ids=str,
)
def test_wrong_configurations_are_named(overrides, named, tiny_vit) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_vit(**overrides)


def test_registry() -> None:
    assert set(PRESETS) < set(fastvr.list_models())
    assert fastvr.create_model("vit_tiny", depth=1, num_classes=3).head.out_features == 3
    with pytest.raises(ValueError, match=r"'vit_bse' \(did you mean 'vit_base'\?\)"):
        fastvr.create_model("vit_bse")
