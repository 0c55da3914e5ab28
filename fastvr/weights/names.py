"""Tables of names: how another library calls what fastvr's ViT calls ``blocks.0.attn.qkv.weight``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

Slot = str | tuple[str, int]
"""fastvr's name of a module or parameter; with a number one part of a packed one: query, key or value, or
SwiGLU's gate or value."""

_OURS = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Names:
    """One library's names for the parts of a ViT, to and from fastvr's.

    A name stands in a table as a whole (``cls_token``) or without its last word (``norm1`` for both
    ``norm1.weight`` and ``norm1.bias``).
    """

    block: str
    """How the names inside a block begin, with {} for its number."""
    inside: Mapping[str, Slot]
    """Theirs to ours, inside a block. Where two of theirs mean the same, the first one is written."""
    outside: Mapping[str, Slot]
    """Theirs to ours, everywhere else."""

    def rename(self, key: str) -> Slot | None:
        """fastvr's name for ``key``, or None where the tables do not have it."""
        if match := self._block.fullmatch(key):
            found = _look_up(self.inside, match[2])
            if found is None:
                return None
            inside, part = found
            name = f"blocks.{match[1]}.{inside}"
            return name if part is None else (name, part)
        found = _look_up(self.outside, key)
        return None if found is None else found[0] if found[1] is None else (found[0], found[1])

    def export(self, name: str) -> tuple[str, ...] | None:
        """Their keys for fastvr's ``name``: one, or those of a packed one's parts; None for none."""
        if match := _OURS.fullmatch(name):
            keys = _reverse(self.inside, match[2])
            return keys and tuple(self.block.format(match[1]) + key for key in keys)
        return _reverse(self.outside, name)

    @cached_property
    def _block(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.block).replace(r"\{\}", r"(\d+)") + "(.+)")


def _look_up(table: Mapping[str, Slot], key: str) -> tuple[str, int | None] | None:
    module, _, kind = key.rpartition(".")
    for entry, suffix in ((key, ""), (module, f".{kind}")):
        if entry in table:
            slot = table[entry]
            return (slot + suffix, None) if isinstance(slot, str) else (slot[0] + suffix, slot[1])
    return None


def _reverse(table: Mapping[str, Slot], name: str) -> tuple[str, ...] | None:
    module, _, kind = name.rpartition(".")
    for wanted, suffix in ((name, ""), (module, f".{kind}")):
        parts: dict[int, str] = {}
        for theirs, slot in table.items():
            if slot == wanted:
                return (theirs + suffix,)
            if isinstance(slot, tuple) and slot[0] == wanted:
                parts.setdefault(slot[1], theirs + suffix)
        if parts:
            return tuple(parts[part] for part in sorted(parts))
    return None
