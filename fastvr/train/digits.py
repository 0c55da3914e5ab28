"""The 1,797 handwritten digits that scikit-learn ships: 8 x 8 pixels, ten classes.

They come from E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """x [N, 1, 8, 8] float32, normalised: (ink - mean) / std, ink from 0 to 1; y [N] int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: float
    std: float

    def to(self, device: torch.device) -> Digits:
        tensors = {
            name: getattr(self, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y")
        }
        return replace(self, **tensors)

    def fewer_labels(self, share: float) -> Digits:
        """The same test set with the first ``share`` of every class's training digits."""
        kept = [rows[: max(1, round(share * len(rows)))] for rows in _rows_by_class(self.train_y)]
        rows = torch.cat(kept)
        return replace(self, train_x=self.train_x[rows], train_y=self.train_y[rows])


def load(*, test_share: float = 0.25, seed: int = 0) -> Digits:
    """Split by class, so that both parts hold every digit equally often; the same split for a seed always.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: one of the parts would be empty.
    """
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    y = torch.from_numpy(classes).long()
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for rows in _rows_by_class(y):
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held_out = round(test_share * len(rows))
        test.append(rows[:held_out])
        train.append(rows[held_out:])
    train_rows, test_rows = torch.cat(train), torch.cat(test)
    if not len(train_rows) or not len(test_rows):
        raise ValueError(f"digits: test_share must leave some for both parts; got {test_share}")
    mean, std = float(x[train_rows].mean()), float(x[train_rows].std())
    x = (x - mean) / std
    return Digits(x[train_rows], y[train_rows], x[test_rows], y[test_rows], mean, std)


def _rows_by_class(y: Tensor) -> list[Tensor]:
    return [(y == digit).nonzero().flatten() for digit in range(10)]
