"""What some members of the family have and the plain ViT has not, beside timm's own: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import timm.layers
import torch
from torch import nn

import fastvr
from fastvr import backend
from fastvr.testing import assert_parity, truth_model

# ours, and timm's where its arguments differ
MEMBERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "quick_gelu": ({"act": "quick_gelu"}, {"act_layer": "quick_gelu"}),
    "a margin": ({"img_size": (35, 38)},) * 2,
    "qk_norm": ({"qk_norm": True},) * 2,
    "attention pooling": ({"class_token": False, "global_pool": "map"},) * 2,
    "swiglu": (
        {"act": "swiglu", "mlp_ratio": 5.5},
        {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 5.5},
    ),
}
# the gradient that only this member calls
BACKWARD = {
    "swiglu": "swiglu_backward",
    "qk_norm": "attention_kv_backward",
    "attention pooling": "attention_kv_backward",
}


@pytest.fixture(params=MEMBERS)
def pair(request, tiny_vit, tiny_timm) -> tuple[str, nn.Module, nn.Module]:
    ours, theirs = MEMBERS[request.param]
    ours, theirs = tiny_vit(depth=1, **ours), tiny_timm(depth=1, **theirs)
    assert {name: t.shape for name, t in ours.state_dict().items()} == {
        name: t.shape for name, t in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict())
    return request.param, ours, theirs


def trained(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of all parameters for the same random upstream."""
    y = model(x)
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
    parameters = dict(model.named_parameters())
    return y.detach(), dict(
        zip(parameters, torch.autograd.grad(y, parameters.values(), upstream), strict=True)
    )


@pytest.mark.parametrize("mode", ["reference", "triton"])
def test_values_and_gradients_are_timms(mode, pair, images, device) -> None:
    name, ours, theirs = pair
    # of few rows, as the class tokens of a small batch are, PyTorch's products on a CPU have larger errors
    ours, theirs, x = ours.to(device), theirs.to(device), images(6, ours.img_size).to(device)
    with fastvr.use_backend("reference"):
        (values, gradients), (exact, truth) = trained(theirs, x), trained(truth_model(theirs), x.double())
    with fastvr.use_backend(mode), backend.observe() as ran:
        actual, actual_gradients = trained(ours, x)
    assert_parity(actual, values, exact, name=name)
    assert_parity(actual_gradients, gradients, truth, kind="gradient", sample_dim=None, name=name)
    assert {implementation for _, implementation in ran} == {mode}
    if name in BACKWARD:
        assert ran[BACKWARD[name], mode] == (mode == "triton")


def test_kernels_give_timms_logits_in_16_bits(pair, images, device) -> None:
    name, ours, theirs = pair
    ours, theirs = ours.to(device, torch.bfloat16), theirs.to(device, torch.bfloat16)
    x = images(2, ours.img_size).to(device, torch.bfloat16)
    with torch.no_grad():
        with fastvr.use_backend("triton"):
            actual, prepared = ours(x), fastvr.prepare(ours, x)(x)
        expected, exact = theirs(x), truth_model(theirs)(x.double())
    assert_parity(actual, expected, exact, name=name)
    assert_parity(prepared, expected, exact, name=f"{name} prepared")
