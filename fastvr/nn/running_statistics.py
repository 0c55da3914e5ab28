"""Running statistics of BatchNorms that ops normalised for, moved as the modules' own forward moves them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn


class Moves:
    """Batch statistics that were taken and have not moved the running ones yet.

    Each launch of a move takes longer than what it does, so whoever runs several blocks hands them one of
    these, and applies it behind them, and before any module is called that somebody may look at them from.
    """

    def __init__(self) -> None:
        self._norms: list[nn.BatchNorm2d] = []
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._pixels: list[int] = []

    def add(
        self,
        norms: Sequence[nn.BatchNorm2d],
        statistics: Iterable[tuple[torch.Tensor, torch.Tensor]],
        pixels: Iterable[int],
    ) -> None:
        """Moves to come.

        Args:
            statistics: of each, the batch's mean and biased variance, [C].
            pixels: of each, how many they were taken of.
        """
        for bn, moments, count in zip(norms, statistics, pixels, strict=True):
            if bn in self._norms:
                # a module that is used twice moves twice, one after the other
                self.apply()
            self._norms.append(bn)
            self._statistics.append(moments)
            self._pixels.append(count)

    def apply(self) -> None:
        """Move, by the unbiased variance, all together."""
        # torch.export cannot take a block without gradients in which nothing happens
        if self._norms:
            with torch.no_grad():
                self._move()

    def _move(self) -> None:
        norms, statistics, pixels = self._norms, self._statistics, self._pixels
        self._norms, self._statistics, self._pixels = [], [], []
        tracking = [bn.training and bn.track_running_stats for bn in norms]
        counters = [bn.num_batches_tracked for bn, on in zip(norms, tracking, strict=True) if on]
        if counted := [counter for counter in counters if counter is not None]:
            torch._foreach_add_(counted, 1)
        running: list[torch.Tensor] = []
        batches: list[torch.Tensor] = []
        kept: list[float] = []
        taken: list[float] = []
        for bn, on, (mean, var), count in zip(norms, tracking, statistics, pixels, strict=True):
            if not on or count == 0:
                continue
            factor = bn.momentum or 0.0
            if bn.momentum is None and bn.num_batches_tracked is not None:
                factor = 1.0 / float(bn.num_batches_tracked)
            unbiased = count / (count - 1)
            for buffer, batch, scale in ((bn.running_mean, mean, 1.0), (bn.running_var, var, unbiased)):
                if buffer is not None:
                    running.append(buffer)
                    batches.append(batch)
                    kept.append(1.0 - factor)
                    taken.append(factor * scale)
        if not running:
            return
        # in the batch's float32, also where the model's buffers are of 16 bits
        narrow = any(buffer.dtype != batch.dtype for buffer, batch in zip(running, batches, strict=True))
        moved = running
        if narrow:
            moved = [torch.empty_like(batch) for batch in batches]
            torch._foreach_copy_(moved, running)
        torch._foreach_mul_(moved, kept)
        torch._foreach_add_(moved, torch._foreach_mul(batches, taken))
        if narrow:
            torch._foreach_copy_(running, moved)


def track(
    norms: Sequence[nn.BatchNorm2d],
    statistics: Iterable[tuple[torch.Tensor, torch.Tensor]],
    pixels: Iterable[int],
    moves: Moves | None = None,
) -> None:
    """Move the running statistics of ``norms``, with ``moves`` or, without, at once; as :meth:`Moves.add`."""
    pending = Moves() if moves is None else moves
    pending.add(norms, statistics, pixels)
    if moves is None:
        pending.apply()
