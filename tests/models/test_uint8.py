"""Images as decoders give them: 8-bit channels, in either layout."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastvr
from fastvr import backend
from fastvr.reference.image import normalize
from fastvr.testing import assert_parity, truth_model

KINDS = ["vit", "basic", "bottleneck"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(n: int = 2, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def normalized(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return ((x.double() / 255 - mean) / std).to(dtype)


@pytest.mark.parametrize("mode", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_normalising_first(kind, dtype, mode, tiny, device) -> None:
    model = tiny(kind).to(device, dtype).normalize_images(MEAN, STD)
    x = pixels().to(device)
    with torch.no_grad():
        with fastvr.use_backend("reference"):
            eager, exact = (
                model(normalized(x, dtype)),
                truth_model(model)(normalized(x, torch.float64)),
            )
        with fastvr.use_backend(mode):
            prepared = fastvr.prepare(model, x)
            for layout in (torch.contiguous_format, torch.channels_last):
                given = x.contiguous(memory_format=layout)
                assert_parity(model(given), eager, exact)
                assert_parity(prepared(given), eager, exact)


class Readers(TorchDispatchMode):
    """The names of the operators that are given uint8 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(a, torch.Tensor) and a.dtype == torch.uint8 for a in args):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


FIRST = {"vit": "patch_embed", "basic": "conv_bn_relu_max_pool", "bottleneck": "conv_bn_relu_max_pool"}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_first_launch_reads_the_images(kind, grad, tiny, device) -> None:
    model = tiny(kind).to(device).normalize_images(MEAN, STD)
    x = pixels(1).to(device)
    model(x)  # the moments are made once
    with (
        torch.set_grad_enabled(grad),
        fastvr.use_backend("triton"),
        backend.observe() as ran,
        Readers() as readers,
    ):
        model(x)
    # where a gradient is needed the stem's convolution stands alone
    first = "conv_bn_relu" if grad and kind != "vit" else FIRST[kind]
    assert readers.names == [f"fastvr::{first}"]
    assert {implementation for _, implementation in ran} == {"triton"}
    assert ran[first, "triton"] == 1 or first == "conv_bn_relu"


@pytest.mark.parametrize(("name", "most"), [("vit_base", 76), ("resnet50", 38)])
def test_bytes_take_no_launch_of_their_own(name, most) -> None:
    from fastvr.compare.traffic import count

    with torch.device("meta"):
        model = fastvr.create_model(name).bfloat16().eval().normalize_images(MEAN, STD)
        images = torch.empty(8, 3, 224, 224, dtype=torch.bfloat16)
    floating, bytes_ = (count(model, x, arch="sm_90") for x in (images, images.to(torch.uint8)))
    assert floating is not None
    assert bytes_ is not None
    assert floating.launches == bytes_.launches == most
    # an image is read once, in half the bytes; the rest are the moments
    assert 0 <= bytes_.bytes - (floating.bytes - images.numel()) < 100


@pytest.mark.parametrize(
    ("kind", "observed"),
    [
        ("vit", "patch_embed"),
        ("vit", "patch_embed.proj"),
        ("basic", "conv1"),
        ("basic", "bn1"),
        ("bottleneck", "relu"),
        ("bottleneck", "maxpool"),
    ],
)
def test_what_somebody_observes_is_called(kind, observed, tiny, device) -> None:
    model, x = tiny(kind).to(device).normalize_images(MEAN, STD), pixels().to(device)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        with fastvr.use_backend("reference"):
            eager = model(normalized(x, torch.float32))
            exact = truth_model(model)(normalized(x, torch.float64))
        model.get_submodule(observed).register_forward_hook(lambda _, args, y: seen.append(args[0]))
        with fastvr.use_backend("triton"):
            assert_parity(model(x), eager, exact)
    assert [s.dtype for s in seen] == [torch.float32]
    if observed in ("patch_embed", "patch_embed.proj", "conv1"):
        assert torch.equal(seen[0], normalize(x, *model.image_moments(x, torch.float32), torch.float32))


def test_one_number_for_every_channel(tiny) -> None:
    x = pixels()
    with torch.no_grad():
        one = tiny("vit").normalize_images(0.5, 0.25)(x)
        each = tiny("vit").normalize_images([0.5] * 3, [0.25] * 3)(x)
    assert torch.equal(one, each)


def test_floating_images_are_taken_as_they_are(tiny, images) -> None:
    model = tiny("vit")
    with torch.no_grad():
        before = model(images())
        assert torch.equal(model.normalize_images(MEAN, STD)(images()), before)


def test_the_numbers_keep_their_digits_and_stay_out_of_the_state(tiny) -> None:
    model = tiny("basic")
    keys = set(model.state_dict())
    model.normalize_images(MEAN, STD).bfloat16()
    mean, std = model.image_moments(pixels(), torch.bfloat16)
    assert mean is not None
    assert std is not None
    assert mean.tolist() == torch.tensor(MEAN).tolist()
    assert std.tolist() == torch.tensor(STD).tolist()
    assert set(model.state_dict()) == keys
    assert copy.deepcopy(model).image_moments(pixels(), torch.float64)[0].tolist() == list(MEAN)


def test_a_prepared_model_goes_stale(tiny) -> None:
    model = tiny("vit").normalize_images(MEAN, STD)
    prepared = fastvr.prepare(model, pixels())
    before = prepared(pixels())
    model.normalize_images(0.5, 0.5)
    with pytest.raises(RuntimeError, match="refresh"):
        prepared(pixels())
    prepared.refresh()
    with torch.no_grad():
        torch.testing.assert_close(prepared(pixels()), model(pixels()))
    assert not torch.equal(prepared(pixels()), before)


# batch statistics are their own launches: there the stem is called module by module
@pytest.mark.parametrize(("kind", "training"), [("vit", False), ("basic", True), ("bottleneck", False)])
def test_gradients_reach_the_weights(kind, training, tiny) -> None:
    model, grads = tiny(kind).train(training).normalize_images(MEAN, STD), []
    upstream = torch.randn(4, 10, dtype=torch.float64)
    for mode, dtype in (("triton", None), ("reference", torch.float32), ("reference", torch.float64)):
        twin = copy.deepcopy(model).to(dtype)
        with fastvr.use_backend(mode):
            y = twin(pixels(4) if dtype is None else normalized(pixels(4), dtype))
            y.backward(upstream.to(y.dtype))
        grads.append([p.grad for p in twin.parameters()])
    assert_parity(*grads, kind="gradient", sample_dim=None)


@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_an_exported_model_runs_on(kind, short) -> None:
    """Nothing of what a tracer made stays in the model: its tensors hold no numbers."""
    model, x = short(kind).normalize_images(MEAN, STD), pixels()
    with fastvr.use_backend("reference"), torch.no_grad():
        expected = copy.deepcopy(model)(x)
        program = torch.export.export(model, (x,), strict=False)
        assert type(model(x)) is torch.Tensor
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.parametrize("kind", ["vit", "bottleneck"])
def test_inference_mode_leaves_nothing_that_training_cannot_read(kind, tiny, device) -> None:
    model, x = tiny(kind).to(device).normalize_images(MEAN, STD), pixels().to(device)
    with fastvr.use_backend("triton"):
        with torch.inference_mode():
            model(x)
        model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input(kind, tiny) -> None:
    model = tiny(kind)
    with pytest.raises(ValueError, match=r"uint8 after normalize_images\(mean, std\); got torch\.uint8"):
        model(pixels())
    for arguments in [((0.5, 0.5), 0.5), (float("nan"), 0.5), ("0.5", 0.5)]:
        with pytest.raises(ValueError, match="mean must be one number, or one for each of 3 channels"):
            model.normalize_images(*arguments)
    for std in (0.0, (0.5, 0.5, -1.0)):
        with pytest.raises(ValueError, match="std must be one positive number"):
            model.normalize_images(0.5, std)
    with pytest.raises(ValueError, match="x must be floating"):
        model.normalize_images(0.5, 0.5)(pixels().to(torch.int32))
