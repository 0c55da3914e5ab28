"""set_grad_checkpointing: the same step, with less kept for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastvr


def step(model: nn.Module, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
    """Everything a training step leaves, and the bytes it kept."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.train()(x)
    before_backward = sum(kept.values())
    y.square().mean().backward()
    left = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers()) | {"y": y}
    return left, before_backward


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["vit", "basic", "bottleneck"])
def test_a_step_is_the_same_and_keeps_less(kind, backend, tiny, images, device) -> None:
    # dropout draws the same numbers again
    options = {"proj_drop_rate": 0.1, "depth": 3} if kind == "vit" and backend == "reference" else {}
    plain = tiny(kind, **options).to(device)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    x = images(4).to(device)
    with fastvr.use_backend(backend):
        (expected, most), (found, less) = step(plain, x), step(checkpointed, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)
    assert less < most
    checkpointed.set_grad_checkpointing(False)
    assert not checkpointed.grad_checkpointing


def test_inference_and_features_are_as_before(tiny_vit, images, device) -> None:
    model = tiny_vit(global_pool="avg").to(device).eval()
    x = images().to(device)
    with torch.no_grad():
        expected = model(x)
        model.set_grad_checkpointing()
        assert torch.equal(model(x), expected)


def test_a_checkpointed_step_compiles_into_one_graph(tiny_vit, images, device) -> None:
    model = tiny_vit().to(device).train()
    model.set_grad_checkpointing()
    x = images().to(device)
    expected = model(x).square().mean()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().mean()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is not None for p in model.parameters())
