"""Measured choices: for an op, a dtype and a shape bucket, what was fastest on this GPU.

Asked in this order, the first that knows the shape answers:

1. this card's own entries: what this process has measured, the user's table (``fastvr tune`` writes
   ``$FASTVR_CACHE_DIR/tuning/<GPU>.json``, by default under ``~/.cache/fastvr``), the table that ships
   (``kernels/configs/<GPU>.json``), later ones giving way to earlier ones;
2. the entries of another card of the same architecture, the one with the most similar number of
   multiprocessors: the same instructions, registers and shared memory, hence the same candidates.

In either the exact key comes before the nearest shape. Without an answer an op runs its own default.
``FASTVR_TUNING_TABLE`` names one file to use instead of all others. ``table.py`` has the format. Nothing is
ever measured here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from fastvr import backend
from fastvr.tuning import table
from fastvr.tuning.table import Config, Entry, Table, TableError

__all__ = [
    "Card",
    "Config",
    "Consulted",
    "Entry",
    "Knob",
    "Table",
    "TableError",
    "bucket",
    "choice",
    "config",
    "consulted",
    "force_config",
    "key",
    "lookup",
    "own_path",
    "table_path",
]

# Between two buckets of a batch-dependent size. Tables of batches 1, 8 and 64 then answer for 1 to 256, and
# the number of tiles a multiprocessor gets, which decides between tile sizes, is not off by more than this.
NEAREST_FACTOR = 4

logger = logging.getLogger("fastvr")
_forced: dict[str, Config] = {}


@dataclasses.dataclass(frozen=True)
class Knob:
    """One configuration that a call asks for: under which name and key, what it may be and is by default."""

    name: str
    key: str
    candidates: list[Config]
    default: Config


@dataclasses.dataclass
class Consulted:
    """What calls asked the table for, in their order: configurations, and keys of implementations."""

    knobs: list[Knob] = dataclasses.field(default_factory=list)
    choices: list[str] = dataclasses.field(default_factory=list)


_records: list[Consulted] = []


@contextlib.contextmanager
def consulted() -> Iterator[Consulted]:
    """Note what ops ask for inside the block: what a tuner has to measure."""
    record = Consulted()
    _records.append(record)
    try:
        yield record
    finally:
        _records[:] = [r for r in _records if r is not record]


# --------------------------------------------------------------------------------------------- keys


def key(op: str, dtype: torch.dtype, **sizes: int) -> str:
    """The table's key. Sizes that vary with the batch go in through :func:`bucket`; one called ``m`` or ``b``
    in the first place is what the nearest shape may differ in."""
    shape = ".".join(f"{name}{size}" for name, size in sizes.items())
    return f"{op}|{str(dtype).removeprefix('torch.')}|{shape}"


def bucket(size: int) -> int:
    """The power of two at or above ``size``: batch-dependent sizes share an entry within a factor of two."""
    return 1 << max(size - 1, 0).bit_length()


_BATCH_SIZE = re.compile(r"(.+\|[mb])(\d+)(.*)")


def _batch_size(table_key: str) -> tuple[str, int] | None:
    """A key without its batch-dependent size, and that size."""
    match = _BATCH_SIZE.fullmatch(table_key)
    return None if match is None else (f"{match[1]}*{match[3]}", int(match[2]))


# ------------------------------------------------------------------------------------------- tables


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU as far as tables tell GPUs apart; ``name`` as ``torch.cuda.get_device_name`` gives it."""

    name: str
    architecture: str
    multiprocessors: int


@functools.cache
def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    # not by backend.architecture, where another one may be assumed
    return Card(
        torch.cuda.get_device_name(index), backend._cuda_architecture(index), properties.multi_processor_count
    )


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def card(device: torch.device) -> Card:
    """The GPU of a CUDA device."""
    return _card(_index(device))


def _file_name(gpu: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_") + ".json"


def table_path(gpu: str) -> Path:
    """Where the shipped table of a GPU lies; ``gpu`` as ``torch.cuda.get_device_name`` gives it."""
    import fastvr.kernels

    return Path(next(iter(fastvr.kernels.__path__))) / "configs" / _file_name(gpu)


def own_folder() -> Path:
    """Where the user's tables are: ``$FASTVR_CACHE_DIR/tuning``, or ``~/.cache/fastvr/tuning``.

    Raises:
        TableError: neither the variable nor a home directory is there.
    """
    if named := os.environ.get("FASTVR_CACHE_DIR"):
        return Path(named) / "tuning"
    try:
        return Path.home() / ".cache" / "fastvr" / "tuning"
    except RuntimeError as error:
        raise TableError(f"{error} FASTVR_CACHE_DIR names a directory for tuning tables") from error


def own_path(gpu: str) -> Path:
    """The table that a tuner on this machine writes.

    Raises:
        TableError: as :func:`own_folder`.
    """
    override = os.environ.get("FASTVR_TUNING_TABLE")
    return Path(override) if override else own_folder() / _file_name(gpu)


@dataclasses.dataclass(frozen=True)
class Source:
    """One table in use: from where (None: measured by this process), and of which card."""

    path: Path | None
    table: Table


_measured_here: dict[str, dict[str, Entry]] = {}


@functools.cache
def sources(card: Card) -> tuple[Source, ...]:
    """The tables that answer on ``card``, the first asked first: its own ones, then a sibling's."""
    found = []
    if here := _measured_here.get(card.name):
        found.append(Source(None, Table(card.name, card.architecture, here)))
    override = os.environ.get("FASTVR_TUNING_TABLE")
    if override:
        folders = []
        paths = [Path(override)]
    else:
        folders = _folders()
        paths = [folder / _file_name(card.name) for folder in folders]
    found += _load(paths, card.name)
    siblings = [
        source
        for source in _load([path for folder in folders for path in sorted(folder.glob("*.json"))])
        if source.table.architecture == card.architecture and source.table.gpu != card.name
    ]
    if siblings:

        def distance(source: Source) -> float:
            count = source.table.header.get("multiprocessors")
            return abs(count - card.multiprocessors) if isinstance(count, int) else float("inf")

        nearest = min(siblings, key=distance).table.gpu
        found += [source for source in siblings if source.table.gpu == nearest]
    return tuple(found)


def _folders() -> list[Path]:
    """Of tables, the user's before the shipped ones."""
    folders = []
    with contextlib.suppress(TableError):
        folders.append(own_folder())
    folders.append(table_path("").parent)
    return folders


def _load(paths: list[Path], gpu: str | None = None) -> list[Source]:
    loaded = ((path, table.load(path, gpu)) for path in paths)
    return [Source(path, content) for path, content in loaded if content is not None]


def measured(card: Card) -> dict[str, Entry]:
    """Every entry that was measured on a card of this name."""
    entries: dict[str, Entry] = {}
    for source in reversed(sources(card)):
        if source.table.gpu == card.name:
            entries |= source.table.entries
    return entries


def remember(card: Card, entries: Mapping[str, Entry]) -> None:
    """From now on this process chooses by ``entries``, wherever they are saved."""
    _measured_here.setdefault(card.name, {}).update(entries)
    reload()


def reload() -> None:
    """Forget what was looked up: tables may have changed."""
    sources.cache_clear()
    _entries.cache_clear()
    _answers.clear()
    _offered.clear()


# ------------------------------------------------------------------------------------------ look-up


class _Entries:
    """The entries of one card, by their key or by the nearest one."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._sizes: dict[str, list[tuple[int, Entry]]] = {}
        for table_key, entry in entries.items():
            if (split := _batch_size(table_key)) is not None:
                self._sizes.setdefault(split[0], []).append((split[1], entry))

    def find(self, table_key: str) -> Entry | None:
        if table_key in self._entries or (split := _batch_size(table_key)) is None:
            return self._entries.get(table_key)
        shape, wanted = split

        def factor(size: int) -> float:
            return max(size, wanted) / max(min(size, wanted), 1)

        near = [pair for pair in self._sizes.get(shape, []) if factor(pair[0]) <= NEAREST_FACTOR]
        # of two the smaller: tiles made for more rows would leave multiprocessors without any
        return min(near, key=lambda pair: (factor(pair[0]), pair[0]))[1] if near else None


@functools.cache
def _entries(card: Card) -> tuple[_Entries, ...]:
    own = measured(card)
    others: dict[str, Entry] = {}
    for source in reversed(sources(card)):
        if source.table.gpu != card.name:
            others |= source.table.entries
    return _Entries(own), _Entries(others)


_answers: dict[tuple[int, str], Entry | None] = {}
_offered: dict[tuple[int, str, str], bool] = {}


def lookup(table_key: str, device: torch.device) -> Entry | None:
    """What was measured for this device's GPU or, in its place, for the nearest shape or a sibling; None
    where nothing was, and anywhere but on a GPU."""
    if device.type != "cuda":
        return None
    asked = _index(device), table_key
    if asked not in _answers:
        found = (entries.find(table_key) for entries in _entries(_card(asked[0])))
        _answers[asked] = next((entry for entry in found if entry is not None), None)
    return _answers[asked]


def choice(table_key: str, device: torch.device, default: str) -> str:
    """``"triton"`` or ``"reference"``: what was measured to be faster, or the op's default."""
    for record in _records:
        record.choices.append(table_key)
    entry = lookup(table_key, device)
    return default if entry is None else entry.impl


def config(
    op: str,
    table_key: str,
    device: torch.device,
    *,
    default: Callable[[], Config],
    candidates: Callable[[], list[Config]],
) -> Config:
    """The configuration to launch ``op`` with: a forced one, the measured one, or the default.

    ``candidates`` gives what a tuner may choose from, on the architecture that kernels run on. A measured
    configuration that is not among them belongs to another version of the kernel, or to a shape that is only
    near: nobody has compiled it, so the default runs.
    """
    for record in _records:
        record.knobs.append(Knob(op, table_key, candidates(), default()))
    if op in _forced:
        return _forced[op]
    entry = lookup(table_key, device)
    if entry is None or entry.config is None:
        return default()
    asked = _index(device), op, table_key
    if asked not in _offered:
        _offered[asked] = entry.config in candidates() or entry.config == default()
        if not _offered[asked]:
            logger.info(
                "fastvr.%s offers no %s any more: the default runs for %s", op, entry.config, table_key
            )
    return entry.config if _offered[asked] else default()


@contextlib.contextmanager
def force_config(op: str, forced: Config) -> Iterator[None]:
    """Launch ``op`` with this configuration, whatever the table says: for tests, the tuner and the audit."""
    previous = _forced.get(op)
    _forced[op] = forced
    try:
        yield
    finally:
        if previous is None:
            del _forced[op]
        else:
            _forced[op] = previous
