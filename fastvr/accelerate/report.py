"""What accelerate() did, and why it left the rest."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        name: as ``model.named_modules()`` has it; "" is the model itself.
        kind: its class, with the library it comes from.
        what: the ops that run it, or the reason why PyTorch does.
    """

    name: str
    kind: str
    what: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`fastvr.accelerate` returns; ``print(report)`` shows a table.

    Attributes:
        swapped: the modules that fastvr's ops run now, also where they had been accelerated before.
        left: the modules with parameters that PyTorch runs, each with its reason.
        notes: what is worth knowing.
    """

    swapped: tuple[Entry, ...]
    left: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many modules of each class were swapped."""
        return dict(collections.Counter(entry.kind for entry in self.swapped))

    def __str__(self) -> str:
        if not self.swapped:
            lines = ["nothing to accelerate here"]
        else:
            lines = [f"on fastvr: {len(self.swapped)}", *_rows(self.swapped)]
        if self.left:
            lines += ["", f"left to PyTorch: {len(self.left)}", *_rows(self.left)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _rows(entries: Iterable[Entry]) -> list[str]:
    """A line for all modules of one class and one text, with the first of their names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, entry.what), []).append(entry.name or "(the model)")
    cells = [
        (f"{len(names)} x", kind, names[0] + (", ..." if len(names) > 1 else ""), what)
        for (kind, what), names in groups.items()
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return [
        f"  {row[0]:>{widths[0]}} {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}" for row in cells
    ]
