"""How images were prepared in training, read from other libraries' files and written into them."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastvr
from fastvr.compare.photos import _centre
from fastvr.models.preprocessing import Preprocessing
from fastvr.weights.errors import CheckpointError
from fastvr.weights.preprocessing import for_transformers, read

PROCESSORS = {
    "vit": (
        {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        Preprocessing(32, 32, (0.5,) * 3, (0.5,) * 3, "bilinear", squash=True),
    ),
    "deit": (
        {
            "do_center_crop": True,
            "size": {"height": 36, "width": 36},
            "crop_size": {"height": 32, "width": 32},
            "resample": 3,
            "image_mean": [0.4] * 3,
            "image_std": [0.2] * 3,
        },
        Preprocessing(32, 36, (0.4,) * 3, (0.2,) * 3, "bicubic", squash=True),
    ),
    "convnext": (
        {
            "size": {"shortest_edge": 224},
            "crop_pct": 0.875,
            "resample": 3,
            "image_mean": [0.4] * 3,
            "image_std": [0.2] * 3,
        },
        Preprocessing(224, 256, (0.4,) * 3, (0.2,) * 3, "bicubic"),
    ),
}


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_transformers_preprocessing_is_read(kind, make_peer, tmp_path) -> None:
    written, expected = PROCESSORS[kind]
    make_peer("transformers-vit").save_pretrained(tmp_path)
    path = tmp_path
    (path / "preprocessor_config.json").write_text(json.dumps(written))
    assert fastvr.load_model(path).preprocessing == expected
    # another image size takes the numbers with it
    assert fastvr.load_model(path, img_size=64).preprocessing.size == 64
    (path / "preprocessor_config.json").write_text(json.dumps({**written, "resample": 9}))
    with pytest.raises(fastvr.CheckpointError, match="the preprocessing beside it cannot be read"):
        fastvr.load_model(path)


def test_convnexts_processor() -> None:
    written, expected = PROCESSORS["convnext"]
    assert read(None, written, "it") == expected
    # as older files have it
    assert read(None, {**written, "size": 224}, "it") == expected
    squashed = expected._replace(size=384, resize=384, squash=True)
    assert read(None, {**written, "size": {"shortest_edge": 384}}, "it") == squashed


@pytest.fixture
def photograph() -> Image.Image:
    """Oblong, and smooth enough that half a pixel makes little difference."""
    tiles = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize((720, 480), Image.Resampling.BICUBIC)


def prepared(image: Image.Image, how: Preprocessing) -> torch.Tensor:
    """As ``fastvr compare`` does it."""
    x = torch.from_numpy(np.asarray(_centre(image, how)).copy()).double() / 255
    return ((x - torch.tensor(how.mean)) / torch.tensor(how.std)).permute(2, 0, 1)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what resampling in bytes or in floats differs by; another crop differs by more than a tenth."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().mean() < 1e-2 * expected.double().std()


MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViT", {}),
    "DeiT": ("DeiT", {}),
    "BiT": ("Bit", {}),
    "CLIP": ("CLIP", {}),
    "SigLIP": ("Siglip", {}),
    "ConvNeXT": ("ConvNext", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}),
    "not normalised": ("ViT", {"do_normalize": False}),
    "from -1 to 1 by the factor": (
        "ViT",
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ),
    "in bytes": ("ViT", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [60.0] * 3}),
}


@pytest.mark.parametrize("kind", MADE)
def test_images_are_prepared_as_transformers_does(kind, photograph, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    name, arguments = MADE[kind]
    processor = getattr(transformers, f"{name}ImageProcessor")(**arguments)
    processor.save_pretrained(tmp_path)
    how = read(None, json.loads((tmp_path / "preprocessor_config.json").read_text()), "it")
    theirs = processor(photograph, return_tensors="pt")["pixel_values"][0].double()
    close(prepared(photograph, how), theirs)
    # and what is written says the same to transformers
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(for_transformers(how)))
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    close(again(photograph, return_tensors="pt")["pixel_values"][0].double(), theirs)


def test_the_processor_of_images_and_text(make_peer, tmp_path) -> None:
    """transformers writes a CLIP's into one file, and reads that before the other."""
    transformers = pytest.importorskip("transformers")
    make_peer("transformers-clip").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSORS["vit"][0], "size": 48}))
    written = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).to_dict()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": written}))
    how = fastvr.load_model(tmp_path).preprocessing
    assert (how.size, how.squash, how.mean) == (32, False, tuple(written["image_mean"]))
    # one of text alone, as older files have it, says nothing of images
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert fastvr.load_model(tmp_path, img_size=48).preprocessing.mean == (0.5,) * 3


@pytest.mark.parametrize(("mode", "share"), [("center", 0.875), ("squash", 0.9), ("squash", 1.0)])
def test_images_are_prepared_as_timm_does(mode, share, photograph) -> None:
    from timm.data import create_transform

    written = {"input_size": [3, 224, 224], "crop_pct": share, "crop_mode": mode, "interpolation": "bicubic"}
    written |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    how = read({"pretrained_cfg": written}, None, "it")
    theirs = create_transform(**{**written, "input_size": (3, 224, 224)}, is_training=False)(photograph)
    close(prepared(photograph, how), theirs.double())
    assert read({"pretrained_cfg": how.for_timm()}, None, "it") == how


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "no mean": ({"image_mean": None}, "TypeError"),
    "words": ({"image_mean": "abc"}, "could not convert"),
    "zero": ({"image_std": [0] * 3}, "std must be positive"),
    "infinite": ({"image_std": [float("inf")] * 3}, "std"),
    "no size": ({"size": {}}, "height"),
    "negative": ({"size": -1}, "a crop of -1 pixels"),
    "crop above the image": ({"do_center_crop": True, "crop_size": 64}, "a crop of 64 pixels from 32"),
    "no factor": ({"rescale_factor": 0}, "float division by zero"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_values_are_named(case) -> None:
    change, message = ODD[case]
    written, _ = PROCESSORS["vit"]
    with pytest.raises(CheckpointError, match=f"it: the preprocessing beside it cannot be read: .*{message}"):
        read(None, {**written, **change}, "it")


def test_sizes_that_timm_would_not_write_are_named() -> None:
    for size in ([], [3, 32], {"height": 32}, 3):
        with pytest.raises(CheckpointError, match="the preprocessing beside it cannot be read"):
            read({"pretrained_cfg": {"input_size": size, "mean": [0.5] * 3, "std": [0.5] * 3}}, None, "it")


def test_oblong_images_are_not_prepared_as_squares(caplog) -> None:
    written, _ = PROCESSORS["vit"]
    with caplog.at_level(logging.WARNING, "fastvr"):
        assert read(None, {**written, "size": {"height": 32, "width": 64}}, "it") is None
        timms = {"input_size": [3, 32, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
        assert read({"pretrained_cfg": timms}, None, "it") is None
    assert "it: prepares images of 32x64 pixels" in caplog.text
    assert "it: prepares images of 32x16 pixels" in caplog.text
