"""What a run learns from: the digits, or a folder of images; in an order that depends on the seed alone.

Every draw (order, crops, flips) depends on the seed, the epoch and the image. So neither the number of
workers, nor of processes, nor an interruption changes what the model sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastvr.compare import UsageError
from fastvr.models.preprocessing import Preprocessing
from fastvr.train import digits
from fastvr.train.randomness import drawing_from, generator_of
from fastvr.train.settings import DIGITS, Arguments

# an image's number, and the epoch; epoch -1 is padding, whose label is -1
Key = tuple[int, int]
Sample = tuple[Tensor, int]
_ORDER, _CROP, _SPLIT = range(3)  # what a draw is for: part of its key


@dataclass(frozen=True)
class Data:
    """Samples by :data:`Key`, and what belongs to them."""

    train: Dataset[Any]
    val: Dataset[Any]
    sizes: tuple[int, int]  # samples in train and val
    classes: tuple[str, ...]
    in_chans: int
    preprocessing: dict[str, Any]  # with mean and std of images from 0 to 1, for each channel
    fingerprint: str  # of names and classes


class Unreadable(Exception):
    """An image that cannot be read; the message says which and why."""


def load(arguments: Arguments, how: Preprocessing) -> Data:
    """The digits or the folder that ``arguments`` name.

    Raises:
        UsageError: there is no such folder, it holds no classes, or a package is missing.
    """
    return _digits(arguments) if arguments.data == DIGITS else _folder(arguments, how)


# ---------------------------------------------------------------------------------------- digits


class _Digits(Dataset[Sample]):
    def __init__(self, x: Tensor, y: Tensor, image_size: int) -> None:
        self._x, self._y, self._size = x, y.tolist(), image_size

    def __getitem__(self, key: Key) -> Sample:
        row, epoch = key
        image = self._x[row]
        if image.shape[-1] != self._size:
            image = F.interpolate(image[None], self._size)[0]
        return image, self._y[row] if epoch >= 0 else -1


def _digits(arguments: Arguments) -> Data:
    try:
        parts = digits.load(test_share=arguments.val_share, seed=arguments.seed)
    except ImportError:
        raise UsageError(
            "the digits come with scikit-learn: pip install 'fastvr[train]', or give --data FOLDER"
        ) from None
    except ValueError:
        share = arguments.val_share
        raise UsageError(
            f"--val-share {share} leaves no digits to {'learn from' if share > 0.5 else 'validate on'}"
        ) from None
    size = arguments.image_size
    return Data(
        _Digits(parts.train_x, parts.train_y, size),
        _Digits(parts.test_x, parts.test_y, size),
        (len(parts.train_y), len(parts.test_y)),
        tuple(map(str, range(10))),
        1,
        {"image_size": size, "interpolation": "nearest", "mean": [parts.mean], "std": [parts.std]},
        _fingerprint(map(str, (*parts.train_y.tolist(), -1, *parts.test_y.tolist()))),
    )


# ---------------------------------------------------------------------------------------- folders


class _Images(Dataset[Any]):
    """Files with their classes; uint8 [3, H, W]."""

    def __init__(self, files: Sequence[tuple[str, int]], transform: Callable[[Any], Tensor], seed: int):
        self._files, self._transform, self._seed = files, transform, seed

    def __getitem__(self, key: Key) -> Sample | Unreadable:
        from torchvision.datasets.folder import default_loader

        row, epoch = key
        path, label = self._files[row]
        try:
            image = default_loader(path)
        except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
            # handed on, not raised: from a worker only a traceback would come
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Unreadable(f"{path}: cannot be read as an image: {reason}")
        with drawing_from(self._seed, _CROP, max(epoch, 0), row):
            return self._transform(image), label if epoch >= 0 else -1


def _folder(arguments: Arguments, how: Preprocessing) -> Data:
    root = Path(arguments.data)
    if not root.is_dir():
        raise UsageError(f"--data {root}: no such folder (or {DIGITS!r}, for the digits of scikit-learn)")
    try:
        from torchvision.transforms import v2
    except ImportError:
        raise UsageError("a folder of images is read by torchvision: pip install 'fastvr[train]'") from None
    if (root / "train").is_dir():
        classes, train = _classes(root / "train")
        if not (root / "val").is_dir():
            raise UsageError(f"--data {root}: has train/, but no val/ beside it")
        others, val = _classes(root / "val")
        if classes != others:
            odd = ", ".join(sorted(set(classes) ^ set(others)))
            raise UsageError(f"--data {root}: train/ and val/ must hold the same classes; only one has {odd}")
    else:
        classes, files = _classes(root)
        train, val = _split(files, arguments.val_share, arguments.seed)
        if not val:
            raise UsageError(f"--data {root}: too few images for --val-share {arguments.val_share}")
    resampling = v2.InterpolationMode(how.interpolation)
    crop = [
        v2.RandomResizedCrop(how.size, interpolation=resampling),
        v2.RandomHorizontalFlip(),
    ]
    centre = [v2.Resize(how.resize, interpolation=resampling), v2.CenterCrop(how.size)]
    end = [v2.PILToTensor()]
    names = (str(Path(path).relative_to(root)) for path, _ in (*train, *val))
    return Data(
        _Images(train, v2.Compose([*crop, *end]), arguments.seed),
        _Images(val, v2.Compose([*centre, *end]), arguments.seed),
        (len(train), len(val)),
        classes,
        3,
        {
            "image_size": how.size,
            "resize": how.resize,
            "interpolation": how.interpolation,
            "mean": list(how.mean),
            "std": list(how.std),
        },
        _fingerprint(names),
    )


def _classes(folder: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The class of every subfolder, and (file, class) of every image."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise UsageError(f"--data {folder}: one subfolder with images for each class: {error}") from None
    if len(found.classes) < 2:
        raise UsageError(f"--data {folder}: holds one class, {found.classes[0]!r}; at least two are needed")
    return tuple(found.classes), found.samples


def _split(files: list[tuple[str, int]], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """By class, the same for a seed always; each class keeps an image to learn from."""
    rows: dict[int, list[int]] = {}
    for row, (_, label) in enumerate(files):
        rows.setdefault(label, []).append(row)
    held_out: set[int] = set()
    for label, own in rows.items():
        order = torch.randperm(len(own), generator=generator_of(seed, _SPLIT, label)).tolist()
        most = min(max(round(share * len(own)), 1), len(own) - 1)
        held_out.update(own[i] for i in order[:most])
    train = [file for row, file in enumerate(files) if row not in held_out]
    return train, [files[row] for row in sorted(held_out)]


def _fingerprint(names: Any) -> str:
    # a file's name may be bytes that are no text
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]


# ---------------------------------------------------------------------------------------- batches


class TrainBatches(Sampler[list[Key]]):
    """This process's part of every batch of an epoch, from batch ``first`` on; a rest below one batch is left
    out, since BatchNorm over a sample or two is noise."""

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int, processes: int) -> None:
        self.batches = samples // batch_size
        self._samples, self._batch_size, self._seed = samples, batch_size, seed
        self._part = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.batches - self.first

    def __iter__(self) -> Iterator[list[Key]]:
        generator = generator_of(self._seed, _ORDER, self.epoch)
        order = torch.randperm(self._samples, generator=generator).split(self._batch_size)
        for batch in order[self.first : self.batches]:
            yield [(row, self.epoch) for row in batch[self._part].tolist()]


class ValBatches(Sampler[list[Key]]):
    """This process's part of all samples, once; padded, so that every process has as many batches."""

    def __init__(self, samples: int, batch_size: int, rank: int, processes: int) -> None:
        own = range(rank, samples, processes)
        padding = -(-samples // processes) - len(own)
        keys = [(row, 0) for row in own] + [(0, -1)] * padding
        self._batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self._batches)


def loader(dataset: Dataset[Any], batches: Sampler[list[Key]], workers: int, pin: bool) -> DataLoader[Any]:
    """(images, int64 labels) a batch, or an :class:`Unreadable`."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
        collate_fn=_collate,
        # its own, so that making an iterator draws nothing from the model's generator
        generator=torch.Generator(),
    )


def _collate(samples: list[Sample | Unreadable]) -> tuple[Tensor, Tensor] | Unreadable:
    images, labels = [], []
    for sample in samples:
        if isinstance(sample, Unreadable):
            return sample
        images.append(sample[0])
        labels.append(sample[1])
    return torch.stack(images), torch.tensor(labels)
