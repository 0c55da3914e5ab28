"""The file of measured choices: its format, what is wrong with a damaged one, and how it is written.

    {"format": 1, "gpu": "NVIDIA H200", "architecture": "sm_90", "multiprocessors": 132,
     "versions": {"fastvr": "0.1.0", ...},
     "entries": {"linear|bfloat16|m16384.n2304.k768.residual0":
                   {"impl": "triton", "config": {"BLOCK_M": 128, ...}, "ms": 0.07, "runner_up_ms": 0.08,
                    "reference_ms": 0.09, "complete": true, "versions": "fastvr 0.1.0, torch ..., ..."}},
     "checksum": "sha256 of all of the above"}

A table is whole or absent: it is written beside its place, synchronised and renamed. Writers take turns by a
lock that dies with its process, read what is there and add to it, so that two at once both keep theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

Config = dict[str, int]

FORMAT = 1
_LOCK_SECONDS = 10.0  # a writer holds the lock for milliseconds

logger = logging.getLogger("fastvr")


class TableError(RuntimeError):
    """A table cannot be read or written; the message names the file and says why."""


class _NotOurs(TableError):
    """A sound table that must not be overwritten: another card's, or a newer fastvr's."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was fastest for one key.

    ``config`` is the best configuration of the kernel also where ``impl`` is "reference". ``runner_up_ms`` is
    the time of the best that did not win, ``reference_ms`` PyTorch's own (or, for a fused op, that of the
    ops it stands for). ``complete`` is False where not every candidate was measured.
    """

    impl: str
    config: Config | None
    ms: float
    runner_up_ms: float | None
    reference_ms: float | None
    complete: bool = True
    versions: str = ""

    @staticmethod
    def of(value: Any) -> Entry:
        """Raises ValueError that names the field which is wrong."""
        if not isinstance(value, Mapping):
            raise ValueError("it is no object")
        if value.get("impl") not in ("triton", "reference"):
            raise ValueError(f"impl is {value.get('impl')!r}")
        config = value.get("config")
        if config is not None and not (
            isinstance(config, Mapping)
            and all(isinstance(name, str) and isinstance(size, int) for name, size in config.items())
        ):
            raise ValueError(f"config is {config!r}")
        for name in ("ms", "runner_up_ms", "reference_ms"):
            ms = value.get(name)
            if ms is None and name != "ms":
                continue
            # not math.isfinite, which an integer of 400 digits overflows
            if isinstance(ms, bool) or not isinstance(ms, (int, float)) or not 0 < ms <= sys.float_info.max:
                raise ValueError(f"{name} is {ms!r}")
        if not isinstance(value.get("complete", True), bool):
            raise ValueError(f"complete is {value['complete']!r}")
        if not isinstance(value.get("versions", ""), str):
            raise ValueError(f"versions is {value['versions']!r}")
        # a newer fastvr of the same format may have added fields
        return Entry(**{f.name: value[f.name] for f in dataclasses.fields(Entry) if f.name in value})


@dataclasses.dataclass(frozen=True)
class Table:
    """One card's measured choices; ``header`` is whatever else the file says (versions, commit, ...)."""

    gpu: str
    architecture: str
    entries: Mapping[str, Entry]
    header: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        content: dict[str, Any] = {"format": FORMAT, "gpu": self.gpu, "architecture": self.architecture}
        content |= {name: value for name, value in self.header.items() if name not in content}
        content["entries"] = {key: vars(self.entries[key]) for key in sorted(self.entries)}
        return json.dumps(content | {"checksum": _checksum(content)}, indent=1) + "\n"


def _checksum(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def read(path: Path, gpu: str | None = None) -> Table:
    """The table at ``path``; entries whose fields are wrong are named in a warning and left out.

    Raises:
        FileNotFoundError: there is none.
        TableError: it is damaged, of a newer format, or not of ``gpu``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise TableError(f"the tuning table {path} is unreadable: {error}") from error
    named = isinstance(content, dict) and isinstance(content.get("format"), int)
    if named and content["format"] > FORMAT:
        raise _NotOurs(f"the tuning table {path} is of format {content['format']}, newer than {FORMAT}")
    if not named or content["format"] != FORMAT:
        raise TableError(f"the tuning table {path} names no format that is known")
    checksum = content.pop("checksum", None)
    try:
        expected = _checksum(content)
    except RecursionError as error:  # brackets that could only just be read
        raise TableError(f"the tuning table {path} is unreadable: {error}") from error
    if checksum != expected:
        raise TableError(f"the tuning table {path} is damaged: its checksum does not match")
    card, arch, entries = (
        content.pop("gpu", None),
        content.pop("architecture", None),
        content.pop("entries", 0),
    )
    if not (isinstance(card, str) and isinstance(arch, str) and isinstance(entries, dict)):
        raise TableError(f"the tuning table {path} lacks its gpu, architecture or entries")
    if gpu is not None and card != gpu:
        raise _NotOurs(f"the tuning table {path} is for {card}, and this is {gpu}")
    sound, wrong = {}, []
    for key, value in entries.items():
        try:
            sound[key] = Entry.of(value)
        except ValueError as error:
            wrong.append(f"{key} ({error})")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        _warn(f"the tuning table {path} has wrong entries, which are ignored: {', '.join(wrong[:3])}{more}")
    del content["format"]
    return Table(card, arch, sound, content)


def load(path: Path, gpu: str | None = None) -> Table | None:
    """:func:`read`, with a table that cannot be used named in one warning and ignored."""
    try:
        return read(path, gpu)
    except FileNotFoundError:
        return None
    except TableError as error:
        _warn(f"{error}; it is ignored")
        return None


@functools.lru_cache(maxsize=256)
def _warn(message: str) -> None:
    """Once for each message."""
    logger.warning("%s", message)


def merge(path: Path, table: Table, *, wait: float = _LOCK_SECONDS) -> Table:
    """Add ``table``'s entries to the file, which other processes may be adding to, and return the whole.

    New entries replace old ones, except that an incomplete one leaves a complete one of the same versions. A
    damaged file is replaced; one of another card or of a newer format is left alone.

    Raises:
        TableError: the file cannot be written, or another process holds its lock for longer than ``wait``
            seconds. What was there before still is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, wait):
            for left in path.parent.glob(f".{path.name}.*.tmp"):
                left.unlink()  # of a writer that was killed: nobody else is at work here
            entries = _earlier(path, table.gpu)
            for key, entry in table.entries.items():
                old = entries.get(key)
                if not (old and old.complete and not entry.complete and old.versions == entry.versions):
                    entries[key] = entry
            whole = dataclasses.replace(table, entries=entries)
            replace_file(path, whole.text())
    except OSError as error:
        raise TableError(
            f"the tuning table {path} cannot be written ({error.strerror or error}): "
            "FASTVR_CACHE_DIR names another directory"
        ) from error
    return whole


def _earlier(path: Path, gpu: str) -> dict[str, Entry]:
    try:
        return dict(read(path, gpu).entries)
    except FileNotFoundError:
        return {}
    except _NotOurs as error:
        raise TableError(f"{error}: it is left as it is") from error
    except TableError as error:
        _warn(f"{error}; it is replaced")
        return {}


@contextlib.contextmanager
def _locked(path: Path, wait: float) -> Iterator[None]:
    """Exclusive among processes. The kernel releases the lock with its process, so none is ever stale; the
    lock file stays, since removing it would let two processes lock two files of the same name."""
    try:
        import fcntl
    except ImportError:  # Windows: a rename is atomic there too, and nobody has a GPU that Triton knows
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    end = time.monotonic() + wait
    with lock.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TableError(
                        f"the tuning table {path} cannot be written: another process has held {lock} "
                        f"for {wait:.0f} s"
                    ) from None
                time.sleep(0.02)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                break  # a network file system without locks: whole files still, though one may lose entries
            else:
                break
        yield


def replace_file(path: Path, text: str) -> None:
    """Write the whole file or leave the old one, also where the machine loses power in between."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of the one at ``path`` when all of it is on the disk; after an error, or
    where the machine loses power, the old one stands. A killed process leaves ``.<name>.*.tmp`` behind."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have the names in the folder on the disk."""
    with contextlib.suppress(OSError):  # not every system opens directories
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
