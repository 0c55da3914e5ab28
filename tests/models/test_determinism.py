"""With ``torch.use_deterministic_algorithms`` on, a step of training gives the same bits every time."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fastvr
from fastvr import backend

pytest.importorskip("triton")


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # without it PyTorch refuses to call cuBLAS
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def step(model: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """Forward and backward: the result, all gradients, and the buffers that they leave."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    y = model(x)
    y.backward(upstream)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert None not in gradients.values()
    return {"y": y, "x": x.grad, **gradients, **dict(model.named_buffers())}


@pytest.fixture(params=["vit", "resnet"])
def model(request: pytest.FixtureRequest, tiny_vit, tiny_resnet, randomise) -> nn.Module:
    """A block of a ViT; the stem, two bottlenecks and the head of a ResNet."""
    if request.param == "vit":
        return tiny_vit(depth=1)
    model = tiny_resnet()
    model.layer3, model.layer4 = nn.Sequential(), nn.Sequential()
    model.fc = randomise(nn.Linear(64, 10))
    return model


def test_a_step_of_training_is_repeatable(model, images, device, deterministic) -> None:
    model = model.to(device).train()
    x, upstream = images(2).to(device), torch.randn(2, 10, device=device)
    with fastvr.use_backend("triton"):
        if device.type == "cuda":
            first = step(model, x, upstream)
            runs = (step(model, x, upstream) for _ in range(249))
        else:
            from fastvr.testing import interpreter

            def shuffled(seed: int) -> dict[str, torch.Tensor]:
                # a GPU's tiles: the interpreter's would leave few programs to run in another order
                with backend.assume_architecture("sm_80"), interpreter.shuffle(seed):
                    return step(model, x, upstream)

            first = shuffled(0)
            runs = (shuffled(seed) for seed in ((1, 2, 3) if isinstance(model, fastvr.ViT) else (1,)))
        for run in runs:
            assert run.keys() == first.keys()
            for name, tensor in run.items():
                assert torch.equal(tensor, first[name]), name
