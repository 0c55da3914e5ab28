"""PyTorch's own tools on the models: compilers, exporters, meta devices, functional calls, hooks, FLOPs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from observed import assert_same, observe
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fastvr
from fastvr import backend
from fastvr.testing import assert_parity, truth_model

KINDS = ["vit", "basic", "bottleneck"]


@pytest.mark.parametrize(
    ("kind", "mode"), [("vit", "reference"), ("vit", "triton"), ("bottleneck", "reference")]
)
def test_three_batch_sizes_are_one_compilation(kind, mode, short, images, device) -> None:
    model = short(kind).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for n in (2, 3, 5):
            x = images(n).to(device)
            with fastvr.use_backend("reference"):
                eager, exact = model(x), truth_model(model)(x.double())
            with fastvr.use_backend(mode):
                assert_parity(compiled(x), eager, exact)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_gradients_by_kernels_of_three_batch_sizes_are_one_compilation(
    kind, training, short, images, device
) -> None:
    """Nothing asks for a number where the batch is a symbol; values and gradients have tests of their own."""
    model = short(kind).to(device).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with fastvr.use_backend("triton"), torch._dynamo.config.patch(error_on_recompile=True):
        for n in (4, 2, 5):
            compiled(images(n).to(device)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


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


def test_a_resnet_is_made_and_trained_of_fake_tensors() -> None:
    """A ViT is not, nor timm's: PyTorch's ``trunc_normal_`` looks at what it drew."""
    with FakeTensorMode():
        model = fastvr.create_model("resnet18d", num_classes=7)
        y = model(torch.empty(2, 3, 64, 64))
        y.sum().backward()
    assert y.shape == (2, 7)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


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


@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_gradients_of_each_sample(kind, tiny, images, device) -> None:
    """By ``vmap``: PyTorch's where a GPU would choose, and one clear error where kernels are forced."""
    model, x = tiny(kind).to(device), images().to(device)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, given, (x[None],)).square().mean()

    def gradients() -> dict[str, torch.Tensor]:
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    with fastvr.use_backend("triton"), pytest.raises(NotImplementedError, match=r"torch\.func's transforms"):
        gradients()
    found = gradients()
    with backend.assume_architecture("sm_90"):
        assumed = gradients()
    truth = truth_model(model)
    for i, image in enumerate(x):
        expected = {}
        for each, pixels in ((model, image), (truth, image.double())):
            each.zero_grad()
            with fastvr.use_backend("reference"):
                each(pixels[None]).square().mean().backward()
            expected[each] = {name: p.grad for name, p in each.named_parameters()}
        for given in (found, assumed):
            mine = {name: gradient[i] for name, gradient in given.items()}
            assert_parity(mine, expected[model], expected[truth], kind="gradient", sample_dim=None)


def test_second_derivatives_where_the_message_says(tiny_vit, tiny_timm, images, device) -> None:
    """Of a gradient penalty, and forward-mode derivatives."""
    theirs, model = tiny_timm(depth=1).to(device), tiny_vit(depth=1).to(device)
    model.load_state_dict(theirs.state_dict())
    truth, x = truth_model(theirs), images().to(device)

    def penalty(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
        gradient.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def tangent(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(model, (x,), (x.flip(0),))[1]

    model.requires_grad_(False)
    with fastvr.use_backend("triton"):
        for derivative, which in ((penalty, "second"), (tangent, "forward-mode")):
            message = (
                rf"no {which} derivative; use_backend\('reference'\) has it.*sdpa_kernel\(SDPBackend.MATH"
            )
            with pytest.raises(NotImplementedError, match=message):
                derivative(model, x)
    model.requires_grad_(True)
    with fastvr.use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        assert_parity(tangent(model, x), tangent(theirs, x), tangent(truth, x.double()))
        found, expected, exact = penalty(model, x), penalty(theirs, x), penalty(truth, x.double())
        assert found.keys() == expected.keys()
        assert_parity(found, expected, exact, kind="gradient", sample_dim=None)


def _out_of_place(model: nn.Module) -> nn.Module:
    """PyTorch's own condition for backward hooks."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


# what timm has besides, as identities
_IDENTITIES = {"norm", "q_norm", "k_norm", "patch_drop", "head_drop", "attn_drop", "fc_norm", "norm_pre"}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_hooks_see_what_timms_see(training, tiny_vit, tiny_timm, images) -> None:
    """Every hook as often, with the same values and gradients; without them everything is fused again."""
    theirs, model, x = tiny_timm().train(training), tiny_vit().train(training), images()
    model.load_state_dict(theirs.state_dict())
    truth = truth_model(theirs).train(training)
    with fastvr.use_backend("reference"):
        with backend.observe() as before:
            model(x)  # hooks may come after a call
        seen = observe(model, lambda m: m(x))
        expected, exact = observe(theirs, lambda m: m(x)), observe(truth, lambda m: m(x.double()))
        for ours, eager, true in zip(seen, expected, exact, strict=True):
            # timm has heads before tokens where it normalises queries and keys
            transposed = {key for key in eager if "q_norm" in key or "k_norm" in key}
            for key in (eager.keys() ^ ours.keys()) | transposed:
                assert key.partition(":")[0].rpartition(".")[2] in _IDENTITIES
                for each in (ours, eager, true):
                    each.pop(key, None)
        assert len(seen[0]) > 60
        assert_same(seen, expected, exact)
        with backend.observe() as after:
            model(x)
    assert after == before


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_hooks_in_a_resnet_see_what_its_modules_compute(kind, training, tiny, images) -> None:
    model, x = _out_of_place(tiny(kind)).train(training), images(4)
    with fastvr.use_backend("reference"):
        with backend.observe() as before:
            model(x)
        modules = copy.deepcopy(dict(model.named_modules()))
        values, gradients = observe(model, lambda m: m(x))
        for name, module in modules.items():
            # a block's own is called behind each of its convolutions
            calls = (2 if kind == "basic" else 3) if name.endswith("0.relu") else 1
            for i in range(calls):
                assert f"{name}: gradient {i}" in gradients
                if next(module.children(), None) is None:
                    assert torch.equal(module(values[f"{name}: input {i}"]), values[f"{name}: output {i}"])
            assert not {f"{name}: input {calls}", f"{name}: gradient {calls}"} & {*values, *gradients}
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
    # its hooks on every module have them called one by one
    for model in (ours, accelerated):
        assert _pytorchs(step(model)) == pytest.approx(expected, rel=1e-2)
    for mode in ("reference", "triton"):
        with fastvr.use_backend(mode), backend.assume_architecture("sm_90"), _unlaunched():
            # a fused residual block makes some of its maps again for the gradient, instead of keeping them
            again = 1.017 if (name, backward, mode) == ("resnet50", True, "triton") else 1.0
            assert _fused(step(accelerated)) == pytest.approx(again * expected, rel=1e-2)
            # the last block computes for the class token alone: 7 % of a ViT-B/16's arithmetic
            share = 0.93 if name.startswith("vit") else again
            assert _fused(step(ours)) == pytest.approx(share * expected, rel=1e-2)


def _unlaunched() -> Any:
    from fastvr.kernels.common import record_launches

    return record_launches(lambda *launch: None)


@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_threads_share_a_model(kind, short, images, device) -> None:
    model = short(kind).to(device)
    batches = [images(2, seed=seed).to(device) for seed in range(4)]

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    with fastvr.use_backend("triton"):
        expected = [run(x) for x in batches]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(run, batches))
    for y, alone in zip(found, expected, strict=True):
        assert torch.equal(y, alone)
