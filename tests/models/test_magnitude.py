"""How large numbers can be, as it is carried from convolution to convolution of a prepared model on a CPU."""

from __future__ import annotations

import importlib
import threading

import pytest
import torch
from contract import needs_onednn, randn
from torch import nn

import fastvr
from fastvr import backend
from fastvr.ops.conv_bn_relu import run_packed
from fastvr.ops.cpu import magnitude, mkldnn, winograd
from fastvr.ops.cpu.prepared_pass import current, running
from fastvr.testing import assert_parity, truth_model

pytestmark = needs_onednn
DTYPES = [d for d in (torch.float32, torch.bfloat16, torch.float16) if mkldnn.supports(d)]


@pytest.fixture(autouse=True)
def _the_mode_of_users(monkeypatch):
    monkeypatch.setattr(backend, "kernels_possible", lambda device: False)
    with torch.no_grad():
        yield


@pytest.fixture
def measured(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of what was measured."""
    found, measure = [], magnitude._measured

    def note(x, run):
        found.append(tuple(x.shape))
        return measure(x, run)

    monkeypatch.setattr(magnitude, "_measured", note)
    return found


def _packed(kind: str, *, groups: int = 1, dtype: torch.dtype = torch.float32) -> mkldnn.AnyPacked:
    weight = randn(32, 16 // groups, 3, 3, dtype=dtype) * 0.3
    scale, shift = randn(32) + 0.5, randn(32) * 3
    direct = mkldnn.pack_convolution(weight, scale, shift, (1, 1), (1, 1), groups, (2, 16, 9, 7))
    if kind == "winograd":
        return winograd.pack(weight, scale, shift, (4, 2), (1, 1), (2, 16, 9, 7), direct)
    return direct


def _run(packed, x, act="relu", residual=None, groups=1) -> torch.Tensor:
    return run_packed(x, packed, (1, 1), (1, 1), groups, act, residual)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("kind", "groups"), [("mkldnn", 1), ("mkldnn", 4), ("winograd", 1)])
def test_no_number_is_larger_than_what_is_carried(kind, groups, residual) -> None:
    packed = _packed(kind, groups=groups)
    # signs as the largest filter has them: as large as it gets
    x = randn(2, 16, 9, 7) * 5
    with running(x, ()):
        for act in ("none", "relu"):
            y = _run(packed, x, act, randn(2, 32, 9, 7) * 100 if residual else None, groups)
            most = magnitude._known(y, current())
            assert y.abs().max() <= most < 1e5
        ones = torch.ones(2, 16, 9, 7)
        signs = mkldnn.pack_convolution(torch.ones(8, 16, 1, 1), None, None, (1, 1), (0, 0), 1, ones.shape)
        y = run_packed(ones, signs, (1, 1), (0, 0), 1, "none", None)
        assert magnitude._known(y, current()) == float(y.max()) == 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_following_changes_no_number(residual, dtype) -> None:
    packed, x = _packed("mkldnn", dtype=dtype), randn(2, 16, 9, 7, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    other = randn(2, 32, 9, 7, dtype=dtype).to(memory_format=torch.channels_last) if residual else None
    alone = _run(packed, x, residual=other)
    with running(x, ()):
        followed = _run(packed, x, residual=other)
    assert torch.equal(alone, followed)


def test_only_what_is_unknown_or_too_large_is_measured(measured) -> None:
    packed = _packed("mkldnn")
    square = mkldnn.pack_convolution(
        torch.full((32, 32, 1, 1), 1e20), None, None, (1, 1), (0, 0), 1, (2, 32, 9, 7)
    )
    x = randn(2, 16, 9, 7)
    _run(packed, x)
    assert not measured
    with running(x, ()):
        y = _run(packed, x)
        assert measured == [(2, 16, 9, 7)]
        z = run_packed(y, square, (1, 1), (0, 0), 1, "relu", None)
        assert len(measured) == 1
        assert magnitude.is_finite(z)
        # 1e40 and more might come out, and does
        w = run_packed(z, square, (1, 1), (0, 0), 1, "relu", None)
        assert measured[1:] == [(2, 32, 9, 7)]
        assert w.isinf().any()
        assert magnitude._known(w, current()) is None
        # what was found is kept, but not on what the caller gave
        assert magnitude._known(z, current()) == float(z.max())
        assert not x.__dict__
    with running(x, ()):
        run_packed(y, square, (1, 1), (0, 0), 1, "relu", None)
    assert measured[2:] == [(2, 32, 9, 7)]


def test_another_thread_follows_nothing() -> None:
    found = []
    with running(torch.ones(1), ()):
        thread = threading.Thread(target=lambda: found.append(current() is not None))
        thread.start()
        thread.join()
        assert current() is not None
    assert found == [False]
    assert current() is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_a_poisoned_image_is_seen_in_its_own_logits_alone(poison, kind, dtype, tiny, images) -> None:
    if dtype == torch.float16 and poison == 3e38:
        pytest.skip("float16 has no such number")
    model = tiny(kind).to(dtype)
    x = images(3).to(dtype)
    prepared = fastvr.prepare(model, x)
    clean = prepared(x)
    x[1, :, 5, 5] = poison
    dirty = prepared(x)
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
    with fastvr.use_backend("reference"):
        expected = model(x)
    assert dirty[1].isnan().tolist() == expected[1].isnan().tolist()
    assert dirty[1].isfinite().all() == (poison == 3e38)


@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer2.0.conv2", "layer4.0.bn2"])
def test_an_overflow_inside_is_seen(name, tiny, images) -> None:
    model = tiny("basic")
    model.conv1.weight.mul_(1e20)
    model.get_submodule(name).weight.mul_(1e25)
    x = images(3)
    with fastvr.use_backend("reference"):
        expected = model(x)
    assert not expected.isfinite().all()
    actual = fastvr.prepare(model, x)(x)
    assert actual.isfinite().tolist() == expected.isfinite().tolist()


def test_weights_that_are_not_finite(tiny, images) -> None:
    model = tiny("bottleneck")
    model.layer3[0].conv2.weight[0, 0, 0, 0] = torch.nan
    assert fastvr.prepare(model, images())(images()).isnan().all()


def test_large_but_finite_numbers_hold_parity(tiny, images) -> None:
    model = tiny("bottleneck")
    model.conv1.weight.mul_(1e20)
    x = images(2)
    prepared = fastvr.prepare(model, x)
    with fastvr.use_backend("reference"):
        assert_parity(prepared(x), model(x), truth_model(model)(x.double()))


def test_nothing_hangs_on_what_is_handed_out(tiny, images) -> None:
    model = tiny("bottleneck")
    x = images(2)
    backbone = fastvr.prepare(fastvr.Backbone(model, (0, 1, 2, 3, 4)), x)
    features = fastvr.prepare(fastvr.Backbone(model, (4,)), x)(x)
    for y in (*backbone(x), *features, fastvr.prepare(model, x)(x), x):
        assert not y.__dict__


def test_what_is_no_tensor_is_named(tiny, images) -> None:
    with pytest.raises(ValueError, match="x must be"):
        fastvr.prepare(tiny("basic"), images())(images().numpy())


def test_modules_of_others_are_not_followed(tiny, images, monkeypatch) -> None:
    class Doubling(nn.Module):
        def forward(self, x):
            return x.mul_(torch.finfo(x.dtype).max)

    def refuse(*given):
        raise AssertionError("taken for granted")

    model = tiny("basic")
    model.layer1[0].downsample = Doubling()
    for name in ("cpu", "prepared"):
        monkeypatch.setattr(importlib.import_module(f"fastvr.prepare.{name}"), "running", refuse)
    prepared = fastvr.prepare(model.eval(), images())
    with fastvr.use_backend("reference"):
        expected = model(images())
    assert prepared(images()).isfinite().tolist() == expected.isfinite().tolist()


@pytest.mark.parametrize(
    "slope", [nn.LeakyReLU(0.2), nn.GELU(), nn.Identity()], ids=lambda m: type(m).__name__
)
def test_another_activation_is_called(slope, tiny, images) -> None:
    model = tiny("bottleneck")
    model.layer1[0].relu = slope.eval()
    x = images(2)
    prepared = fastvr.prepare(model, x)
    with fastvr.use_backend("reference"):
        assert_parity(prepared(x), model(x), truth_model(model)(x.double()))
