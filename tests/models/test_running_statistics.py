"""Running statistics move together behind a model's blocks, and whoever looks at them sees them moved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastvr
from fastvr import backend
from fastvr.nn.residual import BasicBlock, run_stage
from fastvr.nn.running_statistics import Moves
from fastvr.testing import assert_parity, truth_model

pytest.importorskip("triton")


def moving(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if "running" in name}


def counts(model: nn.Module) -> list[int]:
    return [int(t) for name, t in model.state_dict().items() if "num_batches_tracked" in name]


@pytest.fixture
def stage(randomise, device) -> nn.Sequential:
    torch.manual_seed(0)
    return randomise(nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))).to(device).train()


def channels_last(device, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 8, 6, 5).to(device).to(memory_format=torch.channels_last)


def test_all_of_a_model_move_at_once(tiny_resnet, images, device, monkeypatch) -> None:
    model, moved = tiny_resnet().to(device).train(), []
    apply = Moves.apply

    def noted(self: Moves) -> None:
        moved.append(len(self._norms))
        apply(self)

    monkeypatch.setattr(Moves, "apply", noted)
    with fastvr.use_backend("triton"):
        model(images(2).to(device)).sum().backward()
    assert moved == [sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())]
    assert set(counts(model)) == {1}


@pytest.mark.parametrize("where", ["layer3", "layer3.0.conv2"])
def test_a_hook_sees_what_has_moved(where, tiny_resnet, images, device) -> None:
    model, seen = tiny_resnet().to(device).train(), {}
    before = {name: t.clone() for name, t in moving(model).items()}

    def look(*args: object) -> None:
        seen.update({name: t.clone() for name, t in moving(model).items()})

    model.get_submodule(where).register_forward_pre_hook(look)
    with fastvr.use_backend("triton"):
        model(images(2).to(device)).sum().backward()
    for name, final in moving(model).items():
        earlier = name.split(".")[0] in ("bn1", "layer1", "layer2")
        if earlier:
            assert torch.equal(seen[name], final), name
        elif not name.startswith("layer3"):
            assert torch.equal(seen[name], before[name]), name


def test_a_block_that_is_used_twice_moves_twice(stage, device) -> None:
    twice = nn.Sequential(stage[0], stage[1], stage[0])
    eager, truth = copy.deepcopy(twice), truth_model(twice)
    x = channels_last(device)
    with fastvr.use_backend("triton"), backend.observe() as ran:
        run_stage(twice, x)
    assert ran["residual_block", "triton"] == 3
    for model in (eager, truth):
        with fastvr.use_backend("reference"):
            model(x.to(next(model.parameters()).dtype))
    assert_parity(moving(twice), moving(eager), moving(truth), sample_dim=None)
    assert counts(twice) == counts(eager)
    assert max(counts(twice)) == 2


def test_a_norm_that_a_block_holds_twice_moves_twice(stage, device) -> None:
    shared = nn.Sequential(stage[0])
    shared[0].bn2 = shared[0].bn1
    eager, truth = copy.deepcopy(shared), truth_model(shared)
    x = channels_last(device)
    with fastvr.use_backend("triton"), backend.observe() as ran:
        run_stage(shared, x)
    assert ran["residual_block", "triton"] == 1
    for model in (eager, truth):
        with fastvr.use_backend("reference"):
            model(x.to(next(model.parameters()).dtype))
    assert_parity(moving(shared), moving(eager), moving(truth), sample_dim=None)
    assert set(counts(shared)) == set(counts(eager)) == {2}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_narrow_buffers_and_cumulative_averages(momentum, stage, device) -> None:
    """Buffers of 16 bits are moved in float32, as a model in bfloat16 has them."""
    narrow = stage.bfloat16()
    for module in narrow.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    eager, truth = copy.deepcopy(narrow), truth_model(narrow)
    for _ in range(2):
        x = channels_last(device, 4).bfloat16()
        for model, mode in ((narrow, "triton"), (eager, "reference"), (truth, "reference")):
            with fastvr.use_backend(mode):
                run_stage(model, x.to(next(model.parameters()).dtype))
    assert_parity(moving(narrow), moving(eager), moving(truth), sample_dim=None)
    assert counts(narrow) == counts(eager)


def test_a_stage_compiles_into_one_graph(stage, device) -> None:
    compiled, x = copy.deepcopy(stage), channels_last(device)
    with fastvr.use_backend("triton"):
        run = torch.compile(lambda x: run_stage(compiled, x), fullgraph=True, backend="aot_eager")
        expected, found = run_stage(stage, x), run(x)
    assert torch.equal(found, expected)
    assert counts(compiled) == counts(stage)
    for name, statistic in moving(stage).items():
        assert torch.equal(moving(compiled)[name], statistic), name
