"""The last block for the class token alone: the same numbers and gradients, and only where nobody notices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fastvr
from fastvr import backend
from fastvr.compare import traffic
from fastvr.nn.block import Block
from fastvr.testing import assert_parity, truth_model

VARIANTS = {
    "plain": {},
    "post-norm": {"norm_first": False, "act": "relu"},
    "layerscale-registers": {"init_values": 0.1, "reg_tokens": 4, "no_embed_class": True},
    "norm after the pooling": {"fc_norm": True},
    "no-qkv-bias": {"qkv_bias": False},
    "one block": {"depth": 1},
}


def alone(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether the last block computes for the class token alone."""
    with torch.no_grad(), backend.observe() as ran:
        model(x)
    counts = {op: n for (op, _), n in ran.items()}
    if "attention_kv" not in counts:
        return False
    assert (counts["attention_kv"], counts.get("attention", 0)) == (1, len(model.blocks) - 1)
    return True


def whole(model: nn.Module) -> nn.Module:
    """The same model, whose last block runs whole because somebody observes it."""
    model.blocks[-1].register_forward_hook(lambda *_: None)
    return model


def run(model: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(upstream.to(y.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert None not in gradients.values()
    return {**gradients, "x": x.grad}


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_the_whole_blocks(variant, mode, tiny_vit, images, device) -> None:
    ours, theirs = tiny_vit(**VARIANTS[variant]).to(device), whole(tiny_vit(**VARIANTS[variant]).to(device))
    exact, x = truth_model(theirs), images(3).to(device)
    upstream = torch.randn(3, 10, device=device)
    for model in (ours, theirs, exact):
        model.train()
    with fastvr.use_backend(mode):
        assert alone(ours, x)
        assert not alone(theirs, x)
        logits = ours(x)
        gradients = run(ours, x, upstream)
    with fastvr.use_backend("reference"):
        assert_parity(logits, theirs(x), exact(x.double()))
        eager, true = run(theirs, x, upstream), run(exact, x.double(), upstream)
    assert_parity(gradients, eager, true, kind="gradient", sample_dim=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_logits_are_the_whole_blocks(dtype, tiny_vit, images, device) -> None:
    ours, theirs = tiny_vit().to(device, dtype), whole(tiny_vit().to(device, dtype))
    x = images(3).to(device, dtype)
    with torch.no_grad():
        with fastvr.use_backend("triton"):
            actual = ours(x)
        assert_parity(actual, theirs(x), truth_model(theirs)(x.double()))


INSIDE = [name for name, _ in Block(64, 2, init_values=0.1, drop_path=0.1).named_modules() if name]


@pytest.mark.parametrize("name", INSIDE)
def test_who_observes_anything_inside_sees_every_token(name, tiny_vit, images) -> None:
    model, seen = tiny_vit(init_values=0.1, drop_path_rate=0.1), []
    part = model.blocks[-1].get_submodule(name)
    handle = part.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        model(images())
    (given,) = seen
    assert given.shape[:2] == (2, 2 if name == "attn.attn_drop" else 17)
    handle.remove()
    assert alone(model, images())


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_replaced_layer_is_called(name, tiny_vit, images) -> None:
    model = tiny_vit()
    model.blocks[-1].get_submodule(name).__class__ = Doubled
    assert not alone(model, images())


def test_a_replaced_container_is_called(tiny_vit, images) -> None:
    class Twice(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(super().forward(x))

    class Other(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model, x = tiny_vit(), images()
    model.blocks.__class__ = Twice
    with torch.no_grad():
        assert_parity(
            model(x),
            model.forward_head(model.forward_features(x)),
            truth_model(model)(x.double()),
        )
    model = tiny_vit()
    model.blocks[-1].__class__ = Other
    assert not alone(model, x)


RATES = ("proj_drop_rate", "attn_drop_rate", "drop_path_rate")


@pytest.mark.parametrize("rate", RATES)
def test_where_dropping_is_active_the_random_numbers_stay(rate, tiny_vit, images) -> None:
    ours, theirs, x = tiny_vit(**{rate: 0.3}), whole(tiny_vit(**{rate: 0.3})), images()
    assert alone(ours, x)
    results = []
    with torch.no_grad():
        for model in (ours.train(), theirs.train()):
            torch.manual_seed(5)
            results.append((model(x), torch.rand(1)))
        torch.manual_seed(5)
        exact = truth_model(theirs)(x.double())
    assert torch.equal(results[0][1], results[1][1])
    if rate == "drop_path_rate":
        # of whole branches the class token's share is dropped with the rest
        assert alone(ours, x)
        assert_parity(results[0][0], results[1][0], exact)
    else:
        assert not alone(ours, x)
        assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("overrides", [{"global_pool": "avg"}, {"global_pool": ""}, {"depth": 0}], ids=str)
def test_elsewhere_all_tokens_are_computed(overrides, tiny_vit, images) -> None:
    assert not alone(tiny_vit(**overrides), images())


def test_features_are_those_of_all_tokens(tiny_vit, images) -> None:
    model = tiny_vit()
    with torch.no_grad():
        assert model.forward_features(images()).shape == (2, 17, 64)
        assert model.get_intermediate_layers(images())[0].shape == (2, 16, 64)


class Flops(TorchDispatchMode):
    """PyTorch's own counter hooks every module, and so sees every block run whole."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def test_a_fourteenth_less_arithmetic() -> None:
    x, counts = torch.empty(1, 3, 224, 224, device="meta"), []
    for change in (lambda model: model, whole):
        with torch.device("meta"):
            model = change(fastvr.ViT().eval())
        with torch.no_grad(), fastvr.use_backend("triton"), Flops() as counter:
            model(x)
        counts.append(counter.total)
    alone, all_tokens = counts
    # of 196 tokens: query, projection and the MLP's two layers, scores and their product with the values
    assert all_tokens - alone == 196 * (2 * 768 * (768 + 768 + 2 * 3072) + 4 * 197 * 768)
    assert alone / all_tokens < 0.94
    assert all_tokens == traffic.flops(model, x)
