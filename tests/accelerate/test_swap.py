"""What stays as it was: parameters, keys, hooks, copies; and what restore() gives back."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from randomise import randomise
from torch import nn
from torch.nn.utils import parametrize

import fastvr
from fastvr import backend
from fastvr.testing import assert_parity, truth_model

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def _vit(depth: int = 2) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": depth, "num_heads": 2}
    return randomise(VisionTransformer(**sizes, num_classes=10, init_values=0.1)).eval()


def _resnet() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    torch.manual_seed(0)
    return randomise(ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10)).eval()


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 96, dropout=0.0)
    stem = nn.Sequential(nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(2))
    return randomise(
        nn.Sequential(stem, nn.Linear(900, 64), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    ).eval()


MODELS = pytest.mark.parametrize("make", [_vit, _resnet, _encoder], ids=["vit", "resnet", "encoder"])


def _train(model: nn.Module, optimiser: torch.optim.Optimizer, x: torch.Tensor) -> None:
    model.train()
    model(x).square().mean().backward()
    optimiser.step()
    optimiser.zero_grad()
    model.eval()


@MODELS
def test_parameters_stay_the_same_objects(make, images) -> None:
    model = make()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    keys, text, kinds = list(model.state_dict()), repr(model), [type(m) for m in model.modules()]
    report = fastvr.accelerate(model)
    assert len(report.swapped) > 3
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert len(after) == len(before)
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), kinds, strict=True))
    old = {name: p.detach().clone() for name, p in before.items()}
    with fastvr.use_backend("reference"):
        _train(model, optimiser, images)
    assert not any(torch.equal(old[name], p) for name, p in model.named_parameters() if p.requires_grad)


@MODELS
def test_restore_is_bitwise(make, images) -> None:
    """Also after the model trained and moved to another dtype and back."""
    model, twin = make(), make()
    fastvr.accelerate(model)
    x = images
    for each in (model, twin):
        # without a GPU nothing but the model's own modules run here
        _train(each, torch.optim.SGD(each.parameters(), lr=0.1), x)
        each.double().float()
    fastvr.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    assert all(
        set(a.__dict__) == set(b.__dict__) for a, b in zip(model.modules(), twin.modules(), strict=True)
    )
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run there")
@MODELS
def test_without_a_gpu_the_modules_own_forwards_run(make, images) -> None:
    model = make()
    with torch.no_grad():
        expected = model(images)
        fastvr.accelerate(model)
        with backend.observe() as ran:
            assert torch.equal(model(images), expected)
    assert not ran


def test_twice_is_harmless(images) -> None:
    model = _vit()
    first = fastvr.accelerate(model)
    kinds = [type(module) for module in model.modules()]
    assert fastvr.accelerate(model) == first
    assert [type(module) for module in model.modules()] == kinds
    fastvr.restore(model)
    fastvr.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in _vit().modules()]


def _saved(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), _saved],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
@MODELS
def test_copies(make: Callable[[], nn.Module], copied, images) -> None:
    model = make()
    fastvr.accelerate(model)
    same = copied(model)
    assert [type(m) for m in same.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad(), fastvr.use_backend("reference"), backend.observe() as ran:
        assert torch.equal(same(images), model(images))
    assert ran
    fastvr.restore(same)
    assert [type(m) for m in same.modules()] == [type(m) for m in make().modules()]


def test_tied_weights_stay_tied(images) -> None:
    model = _vit()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    fastvr.accelerate(model)
    model.double()
    assert model.blocks[1].mlp.fc1.weight is model.blocks[0].mlp.fc1.weight
    with torch.no_grad(), fastvr.use_backend("reference"):
        assert model(images.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "name",
    [
        *("patch_embed.proj", "blocks.0", "blocks.0.norm1", "blocks.0.attn", "blocks.0.attn.qkv"),
        *("blocks.0.attn.proj", "blocks.0.ls1", "blocks.1.norm2", "blocks.1.mlp", "blocks.1.mlp.fc1"),
        *("blocks.1.mlp.act", "blocks.1.mlp.fc2", "blocks.1.drop_path2", "norm", "head"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_are_called(name, when, images) -> None:
    model, eager, seen = _vit(), _vit(), []
    for change in (fastvr.accelerate, None) if when == "after" else (None, fastvr.accelerate):
        if change is None:
            model.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
        else:
            change(model)
    with torch.no_grad(), fastvr.use_backend("reference"), backend.observe() as ran:
        actual = model(images)
        assert seen == [name]
        assert_parity(actual, eager(images), truth_model(eager)(images.double()))
    assert ran["layer_norm", "reference"]
    assert ran["attention", "reference"] >= 1


@pytest.mark.parametrize("name", ["conv1", "bn1", "relu", "maxpool", "layer1", "layer1.0", "layer1.0.conv2"])
def test_hooks_in_a_resnet_are_called(name, images) -> None:
    model, eager, seen = _resnet(), _resnet(), []
    fastvr.accelerate(model)
    model.get_submodule(name).register_forward_pre_hook(lambda *_: seen.append(name))
    with torch.no_grad(), fastvr.use_backend("reference"):
        actual = model(images)
        assert seen == [name]
        assert_parity(actual, eager(images), truth_model(eager)(images.double()))


def test_the_report_names_what_has_hooks() -> None:
    model = _vit()
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: None)
    report = fastvr.accelerate(model)
    (entry,) = [entry for entry in report.left if entry.name.startswith("blocks")]
    assert (entry.name, entry.what) == ("blocks.0.attn.qkv", "it has hooks or another forward: it is called")


class _Shifted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_replaced_layer_is_called(name, images) -> None:
    """A subclass with the same parameters, as LoRA and quantisation put in place."""
    model, eager = _vit(), _vit()
    fastvr.accelerate(model)
    model.blocks[0].get_submodule(name).__class__ = _Shifted
    with torch.no_grad(), fastvr.use_backend("reference"):
        eager.blocks[0].get_submodule(name).bias += 1
        assert_parity(model(images), eager(images), truth_model(eager)(images.double()))


def test_a_replaced_forward_and_a_subclass_are_left(images) -> None:
    from timm.models.vision_transformer import Block

    class MyBlock(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    def changed() -> nn.Module:
        model = _vit()
        model.blocks[0].__class__ = MyBlock
        forward = model.blocks[1].forward
        model.blocks[1].forward = lambda x: forward(x) + 1
        return model

    model = changed()
    with torch.no_grad():
        expected, exact = model(images), changed().double()(images.double())
        report = fastvr.accelerate(model)
        reasons = {entry.name: entry.what for entry in report.left}
        assert reasons["blocks.0"] == "a subclass of timm Block, which may compute something else"
        assert reasons["blocks.1"] == "its forward was replaced"
        with fastvr.use_backend("reference"), backend.observe() as ran:
            assert_parity(model(images), expected, exact)
    # what is in them is accelerated by itself
    assert ran["attention", "reference"] == 2
    assert ran["layer_norm", "reference"] == 5


@pytest.mark.parametrize("name", ["norm", "blocks.0", "blocks.0.norm1", "blocks.1.attn", "blocks.1.mlp"])
def test_a_subclass_made_since_is_called(name, images) -> None:
    """Of an accelerated module's class, with a forward of its own."""
    model, eager = _vit(), _vit()
    fastvr.accelerate(model)
    for each in (model, eager):
        module = each.get_submodule(name)

        class Shifted(type(module)):  # type: ignore[misc]
            def forward(self, x: torch.Tensor, **given: Any) -> torch.Tensor:
                return super().forward(x, **given) + 1

        module.__class__ = Shifted
    with torch.no_grad(), fastvr.use_backend("reference"), backend.observe() as ran:
        assert_parity(model(images), eager(images), truth_model(eager)(images.double()))
    assert ran["attention", "reference"] == 2
    report = fastvr.accelerate(model)
    assert [entry.name for entry in report.left if entry.what.startswith("a subclass")] == [name]


def test_the_report_names_replaced_linear_layers(images) -> None:
    model = _vit()
    model.blocks[0].attn.qkv.__class__ = model.blocks[1].mlp.fc2.__class__ = _Shifted
    report = fastvr.accelerate(model)
    own = [entry.name for entry in report.swapped if entry.what.startswith("its own forward: ")]
    assert own == ["blocks.0.attn", "blocks.1.mlp"]
    with torch.no_grad(), fastvr.use_backend("reference"), backend.observe() as ran:
        model(images)
    assert ran["attention", "reference"] == ran["layernorm_mlp", "reference"] == 1


def test_parametrized_weights_and_restoring_under_them(images) -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model, eager = _vit(), _vit()
    fastvr.accelerate(model)
    parametrize.register_parametrization(model.blocks[0].norm1, "weight", Double())
    parametrize.register_parametrization(model.blocks[0].mlp.fc1, "weight", Double())
    with torch.no_grad(), fastvr.use_backend("reference"):
        eager.blocks[0].norm1.weight *= 2
        eager.blocks[0].mlp.fc1.weight *= 2
        assert_parity(model(images), eager(images), truth_model(eager)(images.double()))
    with pytest.raises(ValueError, match=r"model\.blocks\.0\.norm1 .* ParametrizedLayerNorm .* undo that"):
        fastvr.restore(model)
    parametrize.remove_parametrizations(model.blocks[0].norm1, "weight")
    parametrize.remove_parametrizations(model.blocks[0].mlp.fc1, "weight")
    fastvr.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in _vit().modules()]


def test_functional_calls_and_transforms(images) -> None:
    model, eager = _vit(), _vit()
    fastvr.accelerate(model)
    doubled = {name: 2 * p for name, p in eager.named_parameters()}
    with torch.no_grad(), fastvr.use_backend("reference"):
        actual = torch.func.functional_call(model, doubled, (images,))
        # transforms meet the model's own forward
        mapped = torch.func.vmap(lambda x: model(x[None])[0])(images)
        assert_parity(mapped, eager(images), truth_model(eager)(images.double()))
        eager.load_state_dict(doubled)
        assert_parity(actual, eager(images), truth_model(eager)(images.double()))


def test_autocast(images) -> None:
    model, eager = _vit(), _vit()
    fastvr.accelerate(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with fastvr.use_backend("reference"), backend.observe() as ran:
            actual = model(images)
        expected = eager(images)
    assert actual.dtype == expected.dtype
    with torch.no_grad():
        assert_parity(actual, expected, truth_model(eager)(images.double()))
    assert ran["attention", "reference"] == 2


@pytest.mark.parametrize("function", [fastvr.accelerate, fastvr.restore])
def test_what_is_no_module(function) -> None:
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module; got dict"):
        function({})


def test_an_accelerated_model_is_not_one_of_fastvrs(images) -> None:
    model = _vit()
    fastvr.accelerate(model)
    with pytest.raises(ValueError, match="prepare: model must be a ViT or ResNet of fastvr's"):
        fastvr.prepare(model, images)


def test_traced_and_extracted_features(images) -> None:
    """A tracer that hands proxies through meets the modules' own forwards."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model, eager = _resnet(), _resnet()
    fastvr.accelerate(model)
    with torch.no_grad(), fastvr.use_backend("reference"):
        mine, its = (create_feature_extractor(each, ["layer2", "flatten"]) for each in (model, eager))
        assert_parity(mine(images), its(images), truth_model(its)(images.double()))


def test_no_library_is_imported(monkeypatch) -> None:
    for library in ("timm", "torchvision", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)  # whoever imports it gets an ImportError
    report = fastvr.accelerate(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8)))
    assert report.counts == {"torch Sequential": 1, "torch LayerNorm": 1}
