"""What ``prepare`` does on a CPU: the fused calls that hold the parity rule and are faster there."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from contract import needs_onednn

import fastvr
from fastvr import backend
from fastvr.ops.cpu import mkldnn, winograd
from fastvr.ops.cpu.prepared_pass import Parts
from fastvr.prepare import cpu
from fastvr.testing import assert_parity, truth_model

KINDS = ["vit", "basic", "bottleneck"]
pytestmark = needs_onednn


@pytest.fixture(autouse=True)
def _the_mode_of_users(monkeypatch):
    monkeypatch.setattr(backend, "kernels_possible", lambda device: False)


@pytest.fixture
def choose(monkeypatch):
    """Lets the candidate of the given index win, 0 being PyTorch, where the parity rule allows it."""

    def pick(index: int) -> None:
        def fastest(calls, **given):
            for call in calls:
                call()
            return min(index, len(calls) - 1)

        monkeypatch.setattr(cpu, "_fastest", fastest)

    return pick


def _packed(prepared) -> list[mkldnn.AnyPacked]:
    found = (mkldnn.kept(p) for p in prepared._snapshot.parameters())
    return [packed for packed in found if packed is not None]


def _implementations(prepared, x) -> set[str]:
    with backend.observe() as ran:
        prepared(x)
    return {name for op, name in ran if op in ("linear", "conv_bn_relu")}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("candidate", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_forced_everywhere_it_holds_parity_at_any_batch(
    kind, candidate, layout, choose, tiny, images
) -> None:
    choose(candidate)
    model = tiny(kind)
    prepared = fastvr.prepare(model, images(3).contiguous(memory_format=layout))
    ran = _implementations(prepared, images(3))
    assert "mkldnn" in ran
    # a basic block's 3x3 convolutions have two candidates, of which the second is to win
    assert ("winograd" in ran) == (kind == "basic")
    with torch.no_grad(), fastvr.use_backend("reference"):
        exact = truth_model(model)
        for n in (1, 2, 3, 5):
            x = images(n, seed=n).contiguous(memory_format=layout)
            before = x.clone()
            assert_parity(prepared(x), model(x), exact(x.double()))
            assert torch.equal(x, before)
        assert prepared(images(0)).shape == (0, 10)


def test_winograds_larger_tiles_hold_parity_at_any_size(choose, tiny_resnet, images) -> None:
    choose(2)
    model = tiny_resnet("basic", width=64)
    prepared = fastvr.prepare(model, images(size=64))
    tiles = {packed.tile for packed in _packed(prepared) if isinstance(packed, winograd.Winograd)}
    # maps of 16 and 8 pixels are large enough for them
    assert tiles == set(winograd.TILES)
    with torch.no_grad(), fastvr.use_backend("reference"):
        exact = truth_model(model)
        for n, size in ((1, 64), (3, 64), (2, 96), (2, 32), (2, (80, 33))):
            x = images(n, size)
            assert_parity(prepared(x), model(x), exact(x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_resnet_in_parts_is_the_resnet(kind, dtype, choose, tiny, images) -> None:
    def of(n: int, size: int = 32, seed: int = 3) -> torch.Tensor:
        x = images(n, size, seed).contiguous(memory_format=torch.channels_last)
        return x if dtype == torch.float32 else (x * 40 + 128).clamp(0, 255).byte()

    choose(0)
    model = tiny(kind)
    model.normalize_images((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    whole = fastvr.prepare(model, of(4))
    choose(2)
    parts = fastvr.prepare(model, of(4))
    assert whole._parts is None
    # two images of the example at once
    assert parts._parts == Parts(2, 2 * 32 * 32)
    assert [parts._parts.images(of(1, size)) for size in (16, 32, 40, 64)] == [8, 2, 1, 1]
    with torch.no_grad(), fastvr.use_backend("reference"):
        exact = truth_model(model)
        for n, size in ((4, 32), (5, 32), (1, 32), (0, 32), (3, 48)):
            x = of(n, size)
            before = x.clone()
            y = parts(x)
            assert torch.equal(x, before)
            assert y.shape == (n, 10)
            if n:
                assert_parity(y, model(x), exact(x.double() if x.is_floating_point() else x))
    again, other = parts(of(5)), parts(of(5, seed=4))
    assert torch.equal(again, parts(of(5)))
    assert not torch.equal(again, other)


def test_one_image_and_a_backbone_are_not_run_in_parts(choose, tiny_resnet, images) -> None:
    choose(2)
    assert fastvr.prepare(tiny_resnet(), images(1))._parts is None
    backbone = fastvr.Backbone(tiny_resnet(num_classes=0, global_pool=""), (1, 3))
    prepared = fastvr.prepare(backbone, images(4))
    assert prepared._parts is None
    with torch.no_grad(), fastvr.use_backend("reference"):
        for found, expected in zip(prepared(images(4)), backbone(images(4)), strict=True):
            torch.testing.assert_close(found, expected)


def test_where_pytorch_is_faster_nothing_is_kept(choose, tiny_vit, images) -> None:
    choose(0)
    prepared = fastvr.prepare(tiny_vit(), images())
    assert not _packed(prepared)
    assert _implementations(prepared, images()) == {"reference"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_breaks_the_parity_rule_cannot_win(kind, choose, tiny, images, monkeypatch) -> None:
    choose(1)

    def spoil(module, name: str) -> None:
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **given: right(*args, **given) * 1.001)

    spoil(mkldnn, "linear")
    spoil(mkldnn, "conv_bn_relu")
    spoil(winograd, "conv_bn_relu")
    model = tiny(kind)
    prepared = fastvr.prepare(model, images())
    assert not _packed(prepared)
    with torch.no_grad(), fastvr.use_backend("reference"):
        assert_parity(prepared(images()), model(images()), truth_model(model)(images().double()))


def test_sums_that_are_not_exact_enough_are_cut(choose, tiny_vit, images, monkeypatch) -> None:
    choose(1)
    right = mkldnn.linear
    monkeypatch.setattr(cpu, "_MOST_TERMS", 16)

    def spoil(x, packed, *args):
        return right(x, packed, *args) * (1 if packed.parts else 1.001)

    monkeypatch.setattr(mkldnn, "linear", spoil)
    model = tiny_vit()
    prepared = fastvr.prepare(model, images())
    assert _packed(prepared)
    assert all(packed.parts for packed in _packed(prepared))
    with torch.no_grad(), fastvr.use_backend("reference"):
        assert_parity(prepared(images()), model(images()), truth_model(model)(images().double()))


def test_the_faster_call_wins() -> None:
    large, small = torch.randn(400, 400), torch.randn(4, 4)
    slow, fast = (lambda: large @ large), (lambda: small @ small)
    assert cpu._fastest([slow, fast]) == 1
    assert cpu._fastest([fast, slow]) == 0
    assert cpu._fastest([slow]) == 0
    assert cpu._fastest([slow, fast], share=0.0) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_results_and_images_are_never_written_over(kind, choose, tiny, images) -> None:
    choose(1)
    prepared = fastvr.prepare(tiny(kind), images().contiguous(memory_format=torch.channels_last))
    x = images().contiguous(memory_format=torch.channels_last)
    before, first = x.clone(), prepared(x)
    kept = first.clone()
    prepared(images(seed=9))
    assert torch.equal(x, before)
    assert torch.equal(first, kept)
    assert torch.equal(prepared(x), kept)


def test_a_residual_that_somebody_reads_again_is_left(choose, tiny_resnet, images) -> None:
    choose(1)
    plain = fastvr.prepare(tiny_resnet(), images())
    last = plain._snapshot.layer1[0].conv3.weight
    assert mkldnn.kept(last).onto_residual
    assert not mkldnn.kept(plain._snapshot.layer1[0].conv1.weight).onto_residual

    class Shortcut(torch.nn.Identity):
        """Gives what is kept elsewhere."""

    model = tiny_resnet()
    model.layer1[0].downsample = Shortcut()
    model.layer1[0].conv1 = torch.nn.Conv2d(8, 8, 1, bias=False)
    model.layer1[0].conv3 = torch.nn.Conv2d(8, 8, 1, bias=False)
    model.layer1[0].bn3 = torch.nn.BatchNorm2d(8)
    model.layer2 = torch.nn.Sequential()
    model.layer3, model.layer4, model.fc = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Linear(8, 10)
    other = fastvr.prepare(model.eval(), images())
    assert not mkldnn.kept(other._snapshot.layer1[0].conv3.weight).onto_residual


@pytest.mark.parametrize("kind", KINDS)
def test_a_poisoned_sample_keeps_to_itself(kind, choose, tiny, images) -> None:
    choose(1)
    prepared = fastvr.prepare(tiny(kind), images(3))
    x = images(3)
    clean = prepared(x)
    x[1] = torch.nan
    dirty = prepared(x)
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
    assert dirty[1].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_are_packed_anew(kind, choose, tiny, images) -> None:
    choose(1)
    model = tiny(kind)
    prepared = fastvr.prepare(model, images())
    old = prepared(images())
    packed = [weakref.ref(p) for p in _packed(prepared)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with pytest.raises(RuntimeError, match="refresh"):
        prepared(images())
    prepared.refresh()
    gc.collect()
    assert not any(p() for p in packed)
    with torch.no_grad(), fastvr.use_backend("reference"):
        assert_parity(prepared(images()), model(images()), truth_model(model)(images().double()))
    assert not torch.equal(prepared(images()), old)


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_and_its_copies_carry_nothing(kind, choose, tiny, images, tmp_path) -> None:
    choose(1)
    model = tiny(kind)
    prepared = fastvr.prepare(model, images())
    assert _packed(prepared)
    assert not any(mkldnn.kept(p) for p in model.parameters())
    assert not any(t.is_mkldnn for t in prepared._snapshot.state_dict().values())
    snapshot = copy.deepcopy(prepared._snapshot)
    assert not any(mkldnn.kept(p) for p in snapshot.parameters())
    with torch.no_grad():
        y, expected = snapshot(images()), prepared(images())
    torch.testing.assert_close(y, expected)
    torch.save(prepared._snapshot.state_dict(), tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert not any(t.is_mkldnn or mkldnn.kept(t) for t in loaded.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes(kind, dtype, choose, tiny, images) -> None:
    choose(1)
    model = tiny(kind).to(dtype)
    prepared = fastvr.prepare(model, images().to(dtype))
    assert ("mkldnn" in _implementations(prepared, images().to(dtype))) == mkldnn.supports(dtype)
    with torch.no_grad(), fastvr.use_backend("reference"):
        x = images().to(dtype)
        assert_parity(prepared(x), model(x), truth_model(model)(x.double()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_mode_reference_and_autocast_take_the_plain_way(kind, choose, tiny, images) -> None:
    choose(1)
    model = tiny(kind)
    with fastvr.use_backend("reference"):
        assert not _packed(fastvr.prepare(model, images()))
    prepared = fastvr.prepare(model, images())
    with fastvr.use_backend("reference"):
        assert _implementations(prepared, images()) == {"reference"}
        with torch.no_grad():
            torch.testing.assert_close(prepared(images()), model(images()))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert _implementations(prepared, images()) == {"reference"}
        torch.testing.assert_close(prepared(images()), model(images()), rtol=0.05, atol=0.05)


def test_uint8_images(choose, tiny_resnet, images) -> None:
    choose(1)
    model = tiny_resnet()
    model.normalize_images((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    prepared = fastvr.prepare(model, x)
    assert "mkldnn" in _implementations(prepared, x)
    with torch.no_grad(), fastvr.use_backend("reference"):
        exact = truth_model(model)
        assert_parity(prepared(x), model(x), exact(x))
