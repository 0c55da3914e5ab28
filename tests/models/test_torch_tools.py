"""PyTorch's own tools on the models: compilers, exporters, meta devices, functional calls, hooks, FLOPs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastvr
from fastvr import backend
from fastvr.testing import assert_parity, truth_model

KINDS = ["vit", "basic", "bottleneck"]


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_three_batch_sizes_are_one_compilation(kind, mode, tiny, images, device) -> None:
    model = tiny(kind, **({"depth": 1} if kind == "vit" else {})).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for n in (2, 3, 5):
            x = images(n).to(device)
            with fastvr.use_backend("reference"):
                eager, exact = model(x), truth_model(model)(x.double())
            with fastvr.use_backend(mode):
                assert_parity(compiled(x), eager, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_made_on_meta_and_filled_is_the_model(kind, tiny, images) -> None:
    """Nothing but parameters and buffers has to be brought: no other state is lost on the way."""
    expected = tiny(kind)
    with torch.device("meta"):
        model = tiny(kind)
    with pytest.raises(ValueError, match="to_empty"):
        fastvr.load_checkpoint(model, expected.state_dict())
    model = model.to_empty(device="cpu")
    assert fastvr.load_checkpoint(model, expected.state_dict()).missing == ()
    with torch.device("meta"):
        assigned = tiny(kind)
    assigned.load_state_dict(expected.state_dict(), assign=True)
    with torch.no_grad():
        for each in (model, assigned):
            assert torch.equal(each(images()), expected(images()))


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_functional_calls_use_the_given_parameters(kind, mode, tiny, images, device) -> None:
    model, other = tiny(kind).to(device), tiny(kind).to(device)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.25
        given = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        x = images().to(device)
        with fastvr.use_backend("reference"):
            expected, exact = other(x), truth_model(other)(x.double())
        with fastvr.use_backend(mode):
            assert_parity(torch.func.functional_call(model, given, (x,)), expected, exact)


def test_gradients_of_functions(tiny_vit, images) -> None:
    """``torch.func.grad`` is a transform, which meets the references."""
    model, x = tiny_vit(depth=1), images()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, given, (x,)).square().mean()

    found = torch.func.grad(loss)(parameters)
    model(x).square().mean().backward()
    truth = truth_model(model)
    truth(x.double()).square().mean().backward()
    exact = {name: p.grad for name, p in truth.named_parameters()}
    actual = {name: p.grad for name, p in model.named_parameters()}
    assert_parity(found, actual, exact, kind="gradient", sample_dim=None)


Seen = dict[tuple[str, str], list[torch.Tensor]]


def _observe(model: nn.Module) -> tuple[Seen, list[Any]]:
    """What hooks of every kind on every module see, by (module, kind)."""
    seen: Seen = {}
    handles: list[Any] = []
    for name, module in model.named_modules():

        def note(kind: str, value: Any, name: str = name) -> None:
            value = value[0] if isinstance(value, tuple) else value
            seen.setdefault((name, kind), []).append(value.detach().clone())

        handles += [
            module.register_forward_pre_hook(lambda _, args, note=note: note("input", args)),
            module.register_forward_hook(lambda _, __, out, note=note: note("output", out)),
            module.register_full_backward_hook(lambda _, __, grads, note=note: note("gradient", grads)),
        ]
    return seen, handles


def _out_of_place(model: nn.Module) -> nn.Module:
    """PyTorch's own condition for backward hooks."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_hooks_see_what_timms_see(training, tiny_vit, tiny_timm, images) -> None:
    """Every hook once a call with the same values and gradients; without them everything is fused again."""
    theirs, model, x = tiny_timm().train(training), tiny_vit().train(training), images()
    model.load_state_dict(theirs.state_dict())
    with fastvr.use_backend("reference"):
        with backend.observe() as before:
            model(x)  # hooks may come after a call
        (expected, _), (seen, handles) = _observe(theirs), _observe(model)
        for each in (theirs, model):
            each(x).square().mean().backward()
        common = expected.keys() & seen.keys()
        # what fastvr has no modules for is an identity in timm
        assert {name.rpartition(".")[2] for name, _ in expected.keys() - common} <= {
            *("norm", "q_norm", "k_norm", "patch_drop", "head_drop", "attn_drop", "fc_norm", "norm_pre"),
        }
        assert len(common) > 100
        for key in common:
            assert len(seen[key]) == len(expected[key]) == 1, key
            torch.testing.assert_close(seen[key], expected[key], rtol=1e-3, atol=1e-5)
        for handle in handles:
            handle.remove()
        with backend.observe() as after:
            model(x)
    assert after == before


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_hooks_in_a_resnet_are_called_once_a_call(kind, training, tiny, images) -> None:
    """With every value that the modules themselves make of what they were given."""
    model, x = _out_of_place(tiny(kind)).train(training), images(4)
    with fastvr.use_backend("reference"):
        with backend.observe() as before:
            model(x)
        modules = copy.deepcopy(dict(model.named_modules()))
        seen, handles = _observe(model)
        model(x).square().mean().backward()
        for name, module in modules.items():
            times = (2 if kind == "basic" else 3) if name.endswith("0.relu") else 1
            assert [len(seen[name, how]) for how in ("input", "output", "gradient")] == [times] * 3, name
            if next(module.children(), None) is None:
                for given, made in zip(seen[name, "input"], seen[name, "output"], strict=True):
                    torch.testing.assert_close(module(given), made)
        for handle in handles:
            handle.remove()
        with backend.observe() as after:
            model(x)
    assert after == before


class Flops(TorchDispatchMode):
    """Without the hooks on every module by which PyTorch's own counter names them, so that ops stay fused."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _fused(counted: Callable[[], None]) -> int:
    with Flops() as counter:
        counted()
    return counter.total


def _pytorchs(counted: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        counted()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "resnet50"])
def test_flops_are_the_peers(name, backward) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), fastvr.create_model(name)
        accelerated = timm.create_model(name)
        x = torch.empty(2, 3, 224, 224)
    fastvr.accelerate(accelerated)

    def step(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(backward):
                y = model(x)
                if backward:
                    y.sum().backward()

        return run

    expected = _pytorchs(step(theirs))
    for mode in ("reference", "triton"):
        with fastvr.use_backend(mode), backend.assume_architecture("sm_90"), _unlaunched():
            # its hooks on every module have them called one by one
            for model in (ours, accelerated):
                assert _pytorchs(step(model)) == pytest.approx(expected, rel=1e-2)
            # a fused residual block makes some of its maps again for the gradient, instead of keeping them
            again = 1.017 if (name, backward, mode) == ("resnet50", True, "triton") else 1.0
            assert _fused(step(accelerated)) == pytest.approx(again * expected, rel=1e-2)
            # the last block computes for the class token alone: 7 % of a ViT-B/16's arithmetic
            share = 0.93 if name.startswith("vit") else again
            assert _fused(step(ours)) == pytest.approx(share * expected, rel=1e-2)


def _unlaunched() -> Any:
    from fastvr.kernels.common import record_launches

    return record_launches(lambda *launch: None)
