"""The table of measured choices: for an op, a dtype and a shape bucket, what was fastest on this GPU.

``kernels/configs/<GPU>.json`` ships with the package; ``bench/on_gpu.py tune`` writes such a file. One entry:

    "linear|bfloat16|m16384.n2304.k768": {"impl": "triton", "config": {"BLOCK_M": 128, ...}, "ms": 0.07, ...}

Without an entry an op runs its own default. Nothing is ever measured here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

Config = dict[str, int]

logger = logging.getLogger("fastvr")
_forced: dict[str, Config] = {}


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
    entry = lookup(table_key, device)
    return default if entry is None else str(entry["impl"])


def config(op: str, table_key: str, device: torch.device) -> Config | None:
    """The configuration to launch ``op`` with: a forced one, the measured one, or None for the default."""
    if op in _forced:
        return _forced[op]
    entry = lookup(table_key, device)
    return None if entry is None else entry.get("config")


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
