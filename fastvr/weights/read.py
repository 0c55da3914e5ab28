"""Files to state dicts. A file is data: nothing in it is executed, and what it claims is checked."""

from __future__ import annotations

import collections
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastvr.weights.errors import CheckpointError

_MAX_HEADER = 100_000_000  # bytes; the limit that safetensors itself sets
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def read_file(path: str | os.PathLike[str]) -> Any:
    """What a ``.safetensors`` or a PyTorch file (``weights_only=True``) holds, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory, not a checkpoint")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            _check_header(path)
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, OSError, MemoryError):
        raise
    except Exception as error:
        # both readers raise errors of many kinds, some bare, where a file is not theirs
        how = "safetensors" if path.suffix == ".safetensors" else "torch.load(weights_only=True)"
        summary = f"{type(error).__name__}: {error}".strip()[:400]
        message = f"{path}: {how} cannot read it; is it truncated or foreign? {summary}"
        raise CheckpointError(message) from error


def _check_header(path: Path) -> None:
    """What the reader would let pass: a key that occurs twice, of which it would take the last."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise CheckpointError(f"{path}: {size} bytes are too few for safetensors; is it truncated?")
        (length,) = struct.unpack("<Q", start)
        if length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path}: claims a header of {length} bytes in a file of {size}; is it truncated or foreign?"
            )
        header = file.read(length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = collections.Counter(key for key, _ in pairs)
        if twice := [key for key, count in counts.items() if count > 1]:
            raise CheckpointError(f"{path}: has keys twice: {shorten(twice)}")
        return dict(pairs)

    try:
        json.loads(header, object_pairs_hook=unique)
    except RecursionError as error:
        raise CheckpointError(f"{path}: its header is nested too deeply") from error


def unwrap(loaded: Any, source: str) -> dict[str, torch.Tensor]:
    """The state dict inside ``loaded``: out of wrappers ({"model": ...}; moving averages first, as timm has
    it), without the prefixes of ``DataParallel`` and ``torch.compile``.

    Raises:
        CheckpointError: there is none, or it holds something else than named tensors.
    """
    for _ in range(len(_WRAPPERS)):
        if not isinstance(loaded, Mapping):
            break
        inner = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded:
        kind = "is empty" if isinstance(loaded, Mapping) else f"holds a {type(loaded).__name__}"
        raise CheckpointError(f"{source}: {kind}, not a state dict")
    if wrong := [f"{key!r} ({type(t).__name__})" for key, t in loaded.items() if not _named_tensor(key, t)]:
        raise CheckpointError(f"{source}: holds more than named tensors: {shorten(wrong)}")
    state = dict(loaded)
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key[len(prefix) :]: tensor for key, tensor in state.items()}
    return state


def _named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor)


def shorten(items: list[str], most: int = 10) -> str:
    """The first items, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
