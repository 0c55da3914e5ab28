"""nn.TransformerEncoderLayer and nn.MultiheadAttention, in PyTorch's own models and in anybody's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastvr
from fastvr import backend
from fastvr.testing import assert_parity, truth_model

ORDERS = pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
NORMS = pytest.mark.parametrize("norm_first", [True, False], ids=["pre_norm", "post_norm"])


def _encoder(depth: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 96, **options)
    return nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(64), enable_nested_tensor=False)


class PlainViT(nn.Module):
    """The ViT that tutorials print: [B, N, D] tokens in an encoder that takes [N, B, D].

    It gives the logits of every token. Those of the class token, which tutorials take, do not depend on the
    images: over the batch it only sees itself.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 64, kernel_size=8, stride=8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 64))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 64))
        layer = nn.TransformerEncoderLayer(64, 2, 96, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.encoder(x)))


@NORMS
@ORDERS
def test_encoder(batch_first, norm_first, hold, tokens) -> None:
    report, ran = hold(_encoder(batch_first=batch_first, norm_first=norm_first), tokens)
    assert ran["attention", "reference"] == 2
    assert ran["layernorm_mlp", "reference"] == (2 if norm_first else 0)
    assert any("batch" in note for note in report.notes) != batch_first


@pytest.mark.parametrize(
    "activation", ["gelu", F.relu, F.silu, nn.GELU("tanh")], ids=["gelu", "relu", "silu", "tanh"]
)
def test_activations(activation, hold, tokens) -> None:
    _, ran = hold(_encoder(activation=activation, norm_first=True), tokens)
    assert ran["layernorm_mlp", "reference"] == (0 if activation is F.silu else 2)


class _Shifted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def _changed(what: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 2, 96, dropout=0.0, batch_first=True)
    if what == "tanh":
        return nn.TransformerEncoderLayer(
            64, 2, 96, dropout=0.0, batch_first=True, activation=nn.GELU("tanh")
        )
    if what == "later":
        layer.activation = F.silu
    if what == "linear1":
        layer.linear1.__class__ = _Shifted
    return layer


@pytest.mark.parametrize("what", ["tanh", "later", "linear1"])
def test_what_pytorchs_own_call_for_a_layer_ignores(what, hold, hold_gradients, tokens) -> None:
    """In eval PyTorch computes a layer from its weights alone, as exact GELU or ReLU; in training it calls
    the modules. So does the accelerated layer."""
    _, ran = hold(_changed(what), tokens)
    assert not ran
    ran = hold_gradients(_changed(what), tokens)
    assert ran["attention", "reference"] == 1


def test_without_biases(hold, tokens) -> None:
    _, ran = hold(_encoder(bias=False, batch_first=True), tokens)
    assert ran["attention", "reference"] == 2


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_the_plain_vit_gives_its_own_numbers(mode, hold, images) -> None:
    """Its attention runs over the batch: two samples see each other, and the report says so."""
    model = PlainViT()
    report, ran = hold(model, images, mode=mode)
    assert ran["attention", mode] == 2
    assert ran["patch_embed", mode] == (mode == "triton")
    assert report.notes == (
        "batch_first=False: attention runs over the first dimension; fed with [B, N, D], that is the batch",
    )
    with torch.no_grad(), fastvr.use_backend(mode):
        assert not torch.allclose(model(images)[:1], model(images[:1]))


@NORMS
@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_gradients(norm_first, mode, hold_gradients, tokens) -> None:
    ran = hold_gradients(_encoder(1, dropout=0.0, norm_first=norm_first), tokens, mode=mode)
    assert ran["attention" if mode == "reference" else "attention_training", mode] == 1


def _padding(batch_first: bool) -> torch.Tensor:
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    return padding if batch_first else torch.zeros(7, 3, dtype=torch.bool)


@ORDERS
@pytest.mark.parametrize("which", ["mask", "causal", "float", "padding", "both"])
def test_masks_are_run_by_pytorch_itself(which, batch_first, tokens) -> None:
    eager = _encoder(batch_first=batch_first).eval()
    length = tokens.shape[1 if batch_first else 0]
    causal = torch.ones(length, length).triu(1).bool()
    given: dict[str, Any] = {}
    if which in ("mask", "both"):
        given["mask"] = causal
    if which == "float":
        given["mask"] = nn.Transformer.generate_square_subsequent_mask(length)
    if which == "causal":
        given |= {"mask": causal, "is_causal": True}
    if which in ("padding", "both"):
        given["src_key_padding_mask"] = _padding(batch_first)
    model = copy.deepcopy(eager)
    fastvr.accelerate(model)
    with torch.no_grad(), fastvr.use_backend("reference"), backend.observe() as ran:
        expected, actual = eager(tokens, **given), model(tokens, **given)
        exact = truth_model(eager)(
            tokens.double(),
            **{k: v.double() if k == "mask" and which == "float" else v for k, v in given.items()},
        )
    assert_parity(actual, expected, exact, sample_dim=0 if batch_first else 1)
    assert ("attention", "reference") not in ran


def test_nested_tensors_are_run_by_pytorch_itself() -> None:
    layer = nn.TransformerEncoderLayer(64, 2, 96, batch_first=True)
    eager = nn.TransformerEncoder(layer, 2).eval()
    model = copy.deepcopy(eager)
    fastvr.accelerate(model)
    x = torch.nested.nested_tensor([torch.randn(3, 64), torch.randn(5, 64)])
    with torch.no_grad(), fastvr.use_backend("reference"):
        expected, actual = eager(x), model(x)
    for mine, its in zip(actual.unbind(), expected.unbind(), strict=True):
        assert torch.equal(mine, its)


def test_dropout_draws_what_it_drew(tokens) -> None:
    eager = _encoder(dropout=0.3).train()
    model = copy.deepcopy(eager)
    fastvr.accelerate(model)
    with fastvr.use_backend("reference"), backend.observe() as ran:
        torch.manual_seed(7)
        expected = eager(tokens)
        torch.manual_seed(7)
        assert torch.equal(model(tokens), expected)
    assert ran["linear", "reference"] == 4
    assert ("attention", "reference") not in ran


class _Attends(nn.Module):
    """Attention of ``tokens`` to themselves, or across to other ones."""

    def __init__(self, across: bool, need_weights: bool, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(64, 2, **options)
        self.across, self.need_weights = across, need_weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x.flip(0)[: 5 if not self.attn.batch_first else None] if self.across else x
        y, weights = self.attn(x, other, other, need_weights=self.need_weights)
        assert (weights is not None) == self.need_weights
        return y


@ORDERS
@pytest.mark.parametrize("across", [False, True], ids=["self", "across"])
@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_attention_alone(mode, across, batch_first, hold, tokens) -> None:
    x = tokens if batch_first else tokens.transpose(0, 1)
    _, ran = hold(_Attends(across, need_weights=False, batch_first=batch_first), x, mode=mode)
    assert ran["attention_kv" if across else "attention", mode] == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"add_zero_attn": True}, "it adds keys and values of its own"),
        ({"add_bias_kv": True}, "it adds keys and values of its own"),
    ],
    ids=["weights", "zero", "bias_kv"],
)
def test_what_attention_leaves_to_pytorch(options, reason, hold, tokens) -> None:
    report, ran = hold(_Attends(False, need_weights=True, batch_first=True, **options), tokens)
    assert not ran
    assert [entry.what for entry in report.left if entry.name == "attn"] == ([reason] if reason else [])


def test_keys_of_another_width_are_left(tokens) -> None:
    attn = nn.MultiheadAttention(64, 2, kdim=32, vdim=32)
    report = fastvr.accelerate(attn)
    assert not report.swapped
    assert report.left[0].what == "its keys or values have another width than its queries"


class _Mixes(nn.Module):
    """In place of a layer's attention, with the arguments that the layer gives, and no defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(64, 64)

    def forward(self, query, key, value, *, attn_mask, key_padding_mask, need_weights, is_causal) -> Any:
        assert (attn_mask, key_padding_mask, need_weights, is_causal) == (None, None, False, False)
        return self.mix(query) + key - value, None


def test_a_module_in_attentions_place_is_called_as_it_was(hold, tokens) -> None:
    layer = nn.TransformerEncoderLayer(64, 2, 96, batch_first=True, norm_first=True)
    layer.self_attn = _Mixes()
    # in eval PyTorch's own layer asks it for what only its own attention has
    layer.self_attn.batch_first = layer.self_attn._qkv_same_embed_dim = False
    layer.self_attn.in_proj_bias = None
    _, ran = hold(layer, tokens)
    assert ran["layernorm_mlp", "reference"] == 1


def test_decoder_layers_run_around_their_masks(hold, tokens) -> None:
    layer = nn.TransformerDecoderLayer(64, 2, 96, batch_first=True)
    report, ran = hold(layer, tokens, tokens.flip(0))
    assert ran["attention", "reference"] == ran["attention_kv", "reference"] == 1
    assert "only its attention and its norms are accelerated" in {entry.what for entry in report.left}
