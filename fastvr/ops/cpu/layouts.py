"""A weight as oneDNN reads it, for whatever size of x comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_MOST_SIZES = 256  # that a weight is laid out for; what comes after them takes one's layout


class Layouts:
    """A weight in the layouts that oneDNN asks for.

    Which layout is the best depends on the size, and a weight in another one would be laid out anew at every
    call. So each size is asked for once; those that want the same layout share it.
    """

    def __init__(self, pack: Callable[[Sequence[int]], torch.Tensor], size: Sequence[int]) -> None:
        """``pack`` lays the weight out for a size; ``size`` is that whose layout serves where there are too
        many others."""
        self._pack, self._size = pack, tuple(size)
        self._by_size: dict[tuple[int, ...], torch.Tensor] = {}
        self._by_layout: dict[bytes, torch.Tensor] = {}

    def of(self, size: Sequence[int]) -> torch.Tensor:
        size = tuple(size)
        found = self._by_size.get(size)
        if found is None:
            if size != self._size and (0 in size or len(self._by_size) >= _MOST_SIZES):
                return self.of(self._size)
            found = self._pack(size)
            found = self._by_size[size] = self._by_layout.setdefault(_layout(found), found)
        return found


def _layout(packed: torch.Tensor) -> bytes:
    """What tells one layout from another; all the same where PyTorch does not tell."""
    describe = getattr(torch.ops.mkldnn, "_get_mkldnn_serialized_md", None)
    return b"" if describe is None else bytes(describe(packed).numpy().tobytes())
