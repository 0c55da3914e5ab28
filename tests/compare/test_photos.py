from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvr.compare import UsageError, photos
from fastvr.models.preprocessing import Preprocessing

HOW = Preprocessing(32, 40, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), interpolation="bicubic")


def picture(path: Path, width: int = 60, height: int = 50, mode: str = "RGB") -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def test_unreadable_files_are_named_and_skipped(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "below" / "b.jpg", mode="L")
    picture(tmp_path / "cut.png")
    cut = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / ".hidden").write_text("not even looked at")
    found = photos.load(tmp_path)
    assert list(found.names) == ["a.png", str(Path("below", "b.jpg"))]
    assert [name for name, _ in found.skipped] == ["cut.png", "empty.jpg", "notes.txt"]
    assert dict(found.skipped)["notes.txt"] == "not an image"
    assert all(why and "\n" not in why for _, why in found.skipped)
    assert all(image.mode == "RGB" for image in found.images)


@pytest.mark.parametrize("content", [None, "no image"])
def test_nothing_to_look_at(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "notes.txt").write_text(content)
    with pytest.raises(UsageError, match=str(tmp_path)) as raised:
        photos.load(tmp_path)
    assert ("none of its 1 files" if content else "empty") in str(raised.value)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        photos.load(tmp_path / "missing")


def test_the_photographs_that_scikit_learn_ships() -> None:
    pytest.importorskip("sklearn")
    found = photos.load(None)
    assert list(found.names) == ["china.jpg", "flower.jpg"]


def test_large_photographs_are_kept_small(tmp_path: Path) -> None:
    picture(tmp_path / "large.png", 1400, 700)
    (image,) = photos.load(tmp_path).images
    assert image.size == (1024, 512)


def test_a_batch_is_centre_crops_then_random_ones(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", 32, 90)
    found = photos.load(tmp_path)
    batch = found.batch(5, HOW, seed=1)
    assert batch.shape == (5, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert -1 <= batch.min() < -0.5
    assert 0.5 < batch.max() <= 1
    torch.testing.assert_close(found.batch(5, HOW, seed=1), batch, rtol=0, atol=0)
    other = found.batch(5, HOW, seed=2)
    assert torch.equal(other[:2], batch[:2])
    assert not torch.equal(other[2:], batch[2:])
    assert torch.equal(found.batch(1, HOW, seed=1), batch[:1])


def test_the_centre_crop_is_the_centre(tmp_path: Path) -> None:
    # a white square, a little larger than the crop, in the middle of black
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[5:95, 55:145] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    batch = photos.load(tmp_path).batch(1, HOW, seed=0)
    assert batch.min() == 1
