"""The table of measured choices: for an op, a dtype and a shape bucket, what was fastest on this GPU.

``kernels/configs/<GPU>.json`` ships with the package; ``bench/on_gpu.py tune`` writes such a file. One entry:

    "linear|bfloat16|m16384.n2304.k768": {"impl": "triton", "config": {"BLOCK_M": 128, ...}, "ms": 0.07, ...}

Without an entry an op runs its own default. Nothing is ever measured here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Config = dict[str, int]

logger = logging.getLogger("fastvr")
_forced: dict[str, Config] = {}


@dataclasses.dataclass(frozen=True)
class Knob:
    """One configuration that a call asks for: under which name and key, and what it may be."""

    name: str
    key: str
    candidates: list[Config]


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


def key(op: str, dtype: torch.dtype, **sizes: int) -> str:
    """The table's key. Sizes that vary with the batch go in through :func:`bucket`."""
    shape = ".".join(f"{name}{size}" for name, size in sizes.items())
    return f"{op}|{str(dtype).removeprefix('torch.')}|{shape}"


def bucket(size: int) -> int:
    """The power of two at or above ``size``: batch-dependent sizes share an entry within a factor of two."""
    return 1 << max(size - 1, 0).bit_length()


def table_path(gpu: str) -> Path:
    """Where the shipped table of a GPU lies; ``gpu`` as ``torch.cuda.get_device_name`` gives it."""
    import fastvr.kernels

    return (
        Path(next(iter(fastvr.kernels.__path__)))
        / "configs"
        / (re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_") + ".json")
    )


@functools.cache
def _table(gpu: str) -> dict[str, Any]:
    override = os.environ.get("FASTVR_TUNING_TABLE")
    path = Path(override) if override else table_path(gpu)
    try:
        content = json.loads(path.read_text())
        if content["gpu"] != gpu:
            raise ValueError(f"it is for {content['gpu']}")
        entries: dict[str, Any] = content["entries"]
        return entries
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the tuning table %s is ignored: %s", path, error)
        return {}


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def lookup(table_key: str, device: torch.device) -> dict[str, Any] | None:
    """The entry measured on this device's GPU, or None."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    entry: dict[str, Any] | None = _table(_device_name(index)).get(table_key)
    return entry


def choice(table_key: str, device: torch.device, default: str) -> str:
    """``"triton"`` or ``"reference"``: what was measured to be faster, or the op's default."""
    for record in _records:
        record.choices.append(table_key)
    entry = lookup(table_key, device)
    return default if entry is None else str(entry["impl"])


def config(
    op: str,
    table_key: str,
    device: torch.device,
    *,
    default: Callable[[], Config],
    candidates: Callable[[], list[Config]],
) -> Config:
    """The configuration to launch ``op`` with: a forced one, the measured one, or the default.

    ``candidates`` gives what a tuner may choose from, on the architecture that kernels run on.
    """
    for record in _records:
        record.knobs.append(Knob(op, table_key, candidates()))
    if op in _forced:
        return _forced[op]
    entry = lookup(table_key, device)
    measured: Config | None = None if entry is None else entry.get("config")
    return default() if measured is None else measured


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
