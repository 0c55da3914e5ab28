"""transformers' vision towers and ResNets, built from small configurations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastvr
from fastvr import backend
from fastvr.testing import assert_parity, truth_model

transformers = pytest.importorskip("transformers", minversion="5")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}


def _tower(name: str, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **overrides})
    return getattr(transformers, f"{name}Model")(config)


def _tokens(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


TOWERS = [
    ("ViT", {}),
    ("ViT", {"qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"}),
    ("ViT", {"attn_implementation": "eager"}),
    ("DeiT", {}),
    ("Dinov2", {"mlp_ratio": 2}),
    ("Dinov2", {"use_swiglu_ffn": True}),
    ("Dinov2WithRegisters", {"mlp_ratio": 2}),
    ("Dinov2WithRegisters", {"use_swiglu_ffn": True}),
    ("CLIPVision", {}),
    ("SiglipVision", {}),
    ("DINOv3ViT", {}),
    ("DINOv3ViT", {"use_gated_mlp": True, "hidden_act": "silu", "mlp_bias": False}),
    ("ViTMSN", {}),
]


@pytest.mark.parametrize(("name", "overrides"), TOWERS, ids=[f"{n}-{'-'.join(o)}" for n, o in TOWERS])
def test_towers(name, overrides, hold, images) -> None:
    report, ran = hold(_tower(name, **overrides), images, get=_tokens)
    assert ran["attention", "reference"] == (0 if name == "DINOv3ViT" else 2)
    gated = bool({"use_swiglu_ffn", "use_gated_mlp"} & set(overrides))
    assert ran["swiglu", "reference"] == (2 if gated else 0)
    # SigLIP's pooling has one too
    assert ran["layernorm_mlp", "reference"] == (0 if gated else 3 if name == "SiglipVision" else 2)
    assert ran["layer_norm", "reference"] >= 3
    reasons = {entry.what for entry in report.left if entry.kind.endswith("Attention")}
    assert reasons == ({"rotary positions: attention stays PyTorch's"} if name == "DINOv3ViT" else set())


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_siglips_pooling(mode, hold, images) -> None:
    tower = _tower("SiglipVision", num_hidden_layers=1)
    _, ran = hold(tower, images, get=lambda output: output.pooler_output, mode=mode)
    assert ran["attention_kv", mode] == 1
    assert ran["layernorm_mlp", mode] == 2


def test_kernels(hold, images) -> None:
    _, ran = hold(_tower("Dinov2", mlp_ratio=2), images, get=_tokens, mode="triton")
    assert ran["attention", "triton"] == ran["layernorm_mlp", "triton"] == 2
    assert ran["patch_embed", "triton"] == 1


def test_gradients(hold_gradients, images) -> None:
    config = transformers.ViTConfig(**SIZES, num_labels=3)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.ViTForImageClassification(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x).logits

    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    ran = hold_gradients(Logits(), images)
    assert ran["attention", "reference"] == 2


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_resnets(layer_type, hold, images) -> None:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1, 2, 1, 1], layer_type=layer_type
    )
    torch.manual_seed(0)
    _, ran = hold(transformers.ResNetModel(config), images, get=lambda output: output.pooler_output)
    assert ran["conv_bn_relu_max_pool", "reference"] == 1
    shortcuts = 4
    assert ran["conv_bn_relu", "reference"] == (2 if layer_type == "basic" else 3) * 5 + shortcuts


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_resnet_of_another_activation(layer_type, hold, images) -> None:
    """It stands behind the stem and the residual additions alone: inside the blocks transformers has ReLU."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16] * 4, depths=[1] * 4, layer_type=layer_type, hidden_act="gelu"
    )
    torch.manual_seed(0)
    _, ran = hold(transformers.ResNetModel(config), images, get=lambda output: output.pooler_output)
    assert ran["conv_bn_relu", "reference"] >= 9


def test_hidden_states_and_attentions(images) -> None:
    """What transformers records by hooks, which then stay."""
    eager = _tower("ViT", attn_implementation="eager").eval()
    model = copy.deepcopy(eager)
    fastvr.accelerate(model)
    with torch.no_grad(), fastvr.use_backend("reference"), backend.observe() as ran:
        for given in ({"output_hidden_states": True, "output_attentions": True}, {}):
            actual, expected = model(images, **given), eager(images, **given)
            exact = truth_model(eager)(images.double(), **given)
            assert len(actual.hidden_states or ()) == (3 if given else 0)
            assert len(actual.attentions or ()) == (2 if given else 0)
            for name in ("last_hidden_state", "hidden_states", "attentions"):
                assert_parity(*(getattr(output, name) for output in (actual, expected, exact)))
    assert ran["layernorm_mlp", "reference"] == 4


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Backbone"])
def test_attention_is_fused_where_hidden_states_are_recorded(name, hold, images) -> None:
    """The hooks that record them see what attention gives; it ignores that they are asked for."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    given = {} if name == "Dinov2Backbone" else {"output_hidden_states": True}
    model = cls(cls.config_class(**SIZES))

    def last(output: Any) -> torch.Tensor:
        return (output.hidden_states or output.feature_maps)[-1]

    _, ran = hold(model, images, get=last, **given)
    assert ran["attention", "reference"] == 2


def test_checkpointed_layers(images) -> None:
    eager = _tower("ViT").train()
    eager.gradient_checkpointing_enable()
    model, truth = copy.deepcopy(eager), truth_model(eager)
    fastvr.accelerate(model)
    upstream = torch.randn(2, 17, 64)
    with fastvr.use_backend("reference"), backend.observe() as ran:
        for each, dtype in ((eager, torch.float32), (truth, torch.float64), (model, torch.float32)):
            each(images.to(dtype)).last_hidden_state.backward(upstream.to(dtype))
    # the pooler's have none
    grads = [
        {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        for each in (model, eager, truth)
    ]
    assert len(grads[0]) > 30
    assert_parity(*grads, kind="gradient", sample_dim=None)
    # forward, and again in backward
    assert ran["layernorm_mlp", "reference"] == 4


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("ViT", {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}),
        ("Dinov2", {"drop_path_rate": 0.3, "mlp_ratio": 2, "attention_probs_dropout_prob": 0.3}),
    ],
)
def test_dropout_draws_what_it_drew(name, rates, images) -> None:
    eager = _tower(name, **rates).train()
    model = copy.deepcopy(eager)
    fastvr.accelerate(model)
    with torch.no_grad(), fastvr.use_backend("reference"):
        torch.manual_seed(7)
        expected = eager(images).last_hidden_state
        torch.manual_seed(7)
        assert torch.equal(model(images).last_hidden_state, expected)


def test_other_attention_functions_are_left_to_transformers(images) -> None:
    model = _tower("ViT").eval()
    fastvr.accelerate(model)
    model.config._attn_implementation = "flex_attention"
    attention = model.layers[0].attention
    assert attention.separate()
