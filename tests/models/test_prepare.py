"""A prepared model is the model, until the model changes."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import fastvr
from fastvr.testing import assert_parity, truth_model

KINDS = ["vit", "basic", "bottleneck"]


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gives_what_the_model_gives(kind, dtype, mode, tiny, images, device) -> None:
    model = tiny(kind).to(device, dtype)
    x = images(2).to(device, dtype)
    with torch.no_grad(), fastvr.use_backend("reference"):
        eager, exact = model(x), truth_model(model)(x.double())
    with fastvr.use_backend(mode):
        prepared = fastvr.prepare(model, x)
        assert_parity(prepared(x), eager, exact)
    assert prepared.captured == (device.type == "cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_float64_and_other_shapes(kind, tiny, images) -> None:
    model = tiny(kind).double()
    prepared = fastvr.prepare(model, images(2).double())
    with torch.no_grad():
        for n in (0, 1, 2, 5):
            x = images(n).double()
            torch.testing.assert_close(prepared(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_is_untouched_and_nothing_is_shared(kind, tiny, images) -> None:
    model, x = tiny(kind), images()
    before = copy.deepcopy(model.state_dict())
    prepared = fastvr.prepare(model, x)
    expected = prepared(x)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert torch.equal(prepared(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_results_belong_to_the_caller(kind, tiny, images, device) -> None:
    model = tiny(kind).to(device)
    prepared = fastvr.prepare(model, images(2).to(device))
    first = prepared(images(2, seed=1).to(device))
    kept = first.clone()
    second = prepared(images(2, seed=2).to(device))
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    first.add_(1)
    assert torch.equal(prepared(images(2, seed=2).to(device)), second)


def test_no_gradient_flows(tiny_vit, images) -> None:
    x = images().requires_grad_()
    y = fastvr.prepare(tiny_vit(), images())(x)
    assert not y.requires_grad
    # and the result may still be used where gradients do
    (y * torch.ones(10, requires_grad=True)).sum().backward()


def test_prepares_in_inference_mode_and_runs_outside(tiny_resnet, images) -> None:
    model = tiny_resnet()
    with torch.inference_mode():
        prepared = fastvr.prepare(model, images())
    with torch.no_grad():
        torch.testing.assert_close(prepared(images()), model(images()))


def _reload(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()))


CHANGES = {
    "train": lambda model: model.train(),
    "train and eval": lambda model: model.train().eval(),
    "load_state_dict": _reload,
    "load_checkpoint": lambda model: fastvr.load_checkpoint(model, copy.deepcopy(model.state_dict())),
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "reset_classifier": lambda model: model.reset_classifier(3),
    "inside a larger model": lambda model: nn.Sequential(model).bfloat16(),
    "loaded in a larger model": lambda model: _reload(nn.Sequential(model)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_goes_stale_and_is_refreshed(kind, change, tiny, images) -> None:
    model = tiny(kind)
    prepared = fastvr.prepare(model, images())
    prepared(images())
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match=r"changed after prepare.*call refresh\(\)"):
        prepared(images())
    if model.training:
        with pytest.raises(ValueError, match="eval"):
            prepared.refresh()
        model.eval()
    prepared.refresh()
    x = images().to(next(model.parameters()).dtype)
    with torch.no_grad():
        assert_parity(prepared(x), model(x), truth_model(model)(x.double()))


def test_eval_again_does_not_make_it_stale(tiny_vit, images) -> None:
    model = tiny_vit()
    prepared = fastvr.prepare(model, images())
    model.eval()
    prepared(images())


@pytest.mark.parametrize("kind", KINDS)
def test_refresh_takes_weights_written_by_hand(kind, tiny, images) -> None:
    model = tiny(kind)
    prepared = fastvr.prepare(model, images())
    old = prepared(images())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1)
        prepared.refresh()
        new = model(images())
        assert_parity(prepared(images()), new, truth_model(model)(images().double()))
    assert not torch.equal(old, new)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "backbone"])
def test_refresh_takes_another_input_size(wrapped, layout, tiny_vit, images) -> None:
    vit = tiny_vit()
    model = fastvr.Backbone(vit, 1) if wrapped else vit
    prepared = fastvr.prepare(model, images().to(memory_format=layout))
    vit.set_input_size((40, 24))
    with pytest.raises(RuntimeError, match=r"call refresh\(\)"):
        prepared(images(2, (40, 24)))
    vit.blocks.train()
    with pytest.raises(ValueError, match="must be in eval mode"):
        prepared.refresh()
    assert "[2, 3, 32, 32]" in repr(prepared)
    model.eval()
    prepared.refresh()
    assert "[2, 3, 40, 24]" in repr(prepared)
    for n in (2, 3):
        x = images(n, (40, 24)).to(memory_format=layout)
        with torch.no_grad():
            assert_parity(prepared(x), model(x), truth_model(model)(x.double()))


def test_a_size_that_is_free_stays_as_it_was_prepared(tiny_vit, images) -> None:
    model = tiny_vit(dynamic_img_size=True)
    prepared = fastvr.prepare(model, images(2, 48))
    prepared.refresh()
    assert "[2, 3, 48, 48]" in repr(prepared)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_copies_share_what_is_there_and_refresh_by_themselves(kind, duplicate, tiny, images, device) -> None:
    model, x = tiny(kind).to(device), images().to(device)
    prepared = fastvr.prepare(model, x)
    expected = prepared(x)
    other = duplicate(prepared)
    assert torch.equal(other(x), expected)
    model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()})
    for stale in (prepared, other):
        with pytest.raises(RuntimeError, match=r"call refresh\(\)"):
            stale(x)
    other.refresh()
    assert not torch.equal(other(x), expected)
    with pytest.raises(RuntimeError, match=r"call refresh\(\)"):
        prepared(x)


def test_a_copy_together_with_its_source_is_the_copys(tiny_vit, images) -> None:
    pair = [model := tiny_vit(), fastvr.prepare(model, images())]
    other, prepared = copy.deepcopy(pair)
    model.train()
    expected = prepared(images())
    with torch.no_grad():
        other.head.bias.add_(1)
    prepared.refresh()
    torch.testing.assert_close(prepared(images()), expected + 1)


def test_it_says_that_it_cannot_be_pickled(tiny_vit, images) -> None:
    with pytest.raises(TypeError, match=r"PreparedModel: cannot be pickled.*call prepare\(\) where"):
        pickle.dumps(fastvr.prepare(tiny_vit(), images()))


def test_a_failed_refresh_leaves_the_snapshot(tiny_vit, images) -> None:
    model = tiny_vit()
    prepared = fastvr.prepare(model, images())
    before = prepared(images())
    model.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"model\.blocks\.0 must have no hooks"):
        prepared.refresh()
    assert torch.equal(prepared(images()), before)


def test_outlives_its_source(tiny_vit, images) -> None:
    model = tiny_vit()
    prepared = fastvr.prepare(model, images())
    before = prepared(images())
    del model
    gc.collect()
    assert torch.equal(prepared(images()), before)
    with pytest.raises(RuntimeError, match="gone"):
        prepared.refresh()


def test_what_it_does_not_take(tiny_vit, tiny_resnet, images) -> None:
    with pytest.raises(ValueError, match="model must be a ViT or ResNet of fastvr's; got Linear"):
        fastvr.prepare(nn.Linear(1, 1), images())
    with pytest.raises(ValueError, match=r"example must be a torch.Tensor; got NoneType"):
        fastvr.prepare(tiny_vit(), None)
    with pytest.raises(ValueError, match=r"x must be \[N, 3, 32, 32\]"):
        fastvr.prepare(tiny_vit(), images(size=40))
    with pytest.raises(ValueError, match=r"x must be torch\.float32"):
        fastvr.prepare(tiny_resnet(), images().double())
    model = tiny_resnet()
    model.layer1.train()
    with pytest.raises(ValueError, match=r"model\.layer1 must be in eval mode"):
        fastvr.prepare(model, images())
    prepared = fastvr.prepare(tiny_resnet(), images())
    with pytest.raises(ValueError, match="x must be"):
        prepared(images().to(torch.uint8))
    with pytest.raises(ValueError, match=r"x must be a torch\.Tensor; got NoneType"):
        prepared(None)


@pytest.mark.parametrize("kind", ["vit", "basic"])
def test_a_backbone(kind, tiny, images, device) -> None:
    model = fastvr.Backbone(tiny(kind).to(device), out_indices=(0, 1))
    x = images(2).to(device)
    with torch.no_grad(), fastvr.use_backend("reference"):
        eager, exact = model(x), truth_model(model)(x.double())
    prepared = fastvr.prepare(model, x)
    for maps in (prepared(x), prepared(x)):
        assert_parity(maps, eager, exact)
        maps[0].zero_()
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"its Backbone changed after prepare.*call refresh\(\)"):
        prepared(x)
    prepared.refresh()
    assert_parity(prepared(x), eager, exact)


def test_prepared_batch_norm_without_affine(tiny_resnet, images) -> None:
    model = tiny_resnet()
    model.bn1 = nn.BatchNorm2d(8, affine=False)
    model.bn1.running_mean.normal_()
    model.eval()
    with torch.no_grad():
        actual = fastvr.prepare(model, images())(images())
        assert_parity(actual, model(images()), truth_model(model)(images().double()))


def test_says_what_it_is(tiny_vit, images) -> None:
    assert repr(fastvr.prepare(tiny_vit(), images(3))) == "PreparedModel(ViT, [3, 3, 32, 32], no graph)" or (
        torch.cuda.is_available()
    )
