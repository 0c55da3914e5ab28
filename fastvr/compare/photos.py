"""Real photographs, cut to what a model takes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastvr.compare import UsageError
from fastvr.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST = 64  # photographs decoded; a directory may hold millions
_SHORT_SIDE = 512  # kept of each: enough for every crop, and 64 of them stay below 100 MB


@dataclass(frozen=True)
class Photographs:
    """RGB photographs with their names, and the files that were skipped with the reason."""

    source: str
    images: Sequence[Image]
    names: Sequence[str]
    skipped: Sequence[tuple[str, str]] = field(default=())

    def batch(self, count: int, how: Preprocessing, *, seed: int) -> Tensor:
        """[count, 3, size, size] float32: centre crops first, then random crops and flips."""
        rng = np.random.default_rng(seed)
        images = [_centre(image, how) for image in self.images[:count]]
        while len(images) < count:
            image = self.images[len(images) % len(self.images)]
            images.append(_random_crop(image, how, rng))
        pixels = torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in images]) / 255)
        normalised = (pixels - torch.tensor(how.mean)) / torch.tensor(how.std)
        return normalised.permute(0, 3, 1, 2).contiguous()


def load(directory: Path | None) -> Photographs:
    """The photographs in ``directory`` and below it, or the two that scikit-learn ships.

    Files that are no readable image are skipped and listed.

    Raises:
        UsageError: no such directory, nothing in it that can be read, or Pillow or scikit-learn missing.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise UsageError("photographs need Pillow: pip install 'fastvr[cli]'") from None
    if directory is None:
        return _shipped()
    if not directory.is_dir():
        raise UsageError(f"--images {directory}: no such directory")
    images: list[Image] = []
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    for path in _files(directory):
        if len(images) == _MOST:
            break
        name = str(path.relative_to(directory))
        try:
            images.append(_read(path))
        except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
            skipped.append((name, _reason(error)))
        else:
            names.append(name)
    if not images:
        found = (
            f"none of its {len(skipped)} files is a readable image" if skipped else "the directory is empty"
        )
        raise UsageError(f"--images {directory}: {found}")
    return Photographs(str(directory), images, names, skipped)


def _shipped() -> Photographs:
    from PIL import Image

    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UsageError(
            "the sample photographs come with scikit-learn: pip install 'fastvr[data]', or give --images DIR"
        ) from None
    samples = load_sample_images()
    return Photographs(
        "scikit-learn's sample photographs",
        [Image.fromarray(pixels) for pixels in samples.images],
        [Path(name).name for name in samples.filenames],
    )


def _files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            yield path


def _read(path: Path) -> Image:
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        # the error beyond twice the limit still comes
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    if min(image.size) > _SHORT_SIDE:
        scale = _SHORT_SIDE / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )
    return image


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "not an image" if "cannot identify image file" in text else text


def _centre(image: Image, how: Preprocessing) -> Image:
    short = min(image.size)
    width, height = (
        (length if how.squash else short) * how.size / how.resize for length in (image.width, image.height)
    )
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return _cut(image, (left, top, left + width, top + height), how)


def _random_crop(image: Image, how: Preprocessing, rng: np.random.Generator) -> Image:
    from PIL import ImageOps

    side = min(image.size) * float(rng.uniform(0.4, 1.0))
    left, top = (float(rng.uniform(0, length - side)) for length in image.size)
    crop = _cut(image, (left, top, left + side, top + side), how)
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


def _cut(image: Image, box: tuple[float, float, float, float], how: Preprocessing) -> Image:
    from PIL import Image as module

    resampling = module.Resampling[how.interpolation.upper()]
    return image.resize((how.size, how.size), resampling, box=box)
