"""What the command line asks for, checked before any work is done, and the file that it may ask for."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvr.compare import UsageError
from fastvr.tuning.table import replace_file

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What the command line asks for. None: as suits the machine."""

    images: Path | None = None
    weights: tuple[Path, ...] = ()  # at most one a family, in any order
    batches: tuple[int, ...] | None = None
    dtype: str | None = None
    device: str | None = None
    compile: bool = False
    json: Path | None = None
    train_seconds: float = 60.0
    quick: bool = False
    seed: int = 0


def device_for(name: str | None) -> torch.device:
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(name))
    except RuntimeError:
        raise UsageError(f"--device {name}: must be auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: must be auto, cpu or cuda")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UsageError(f"--device {name}: PyTorch sees no such GPU (fastvr doctor says what it sees)")
    return device


def check_writable(path: Path | None) -> None:
    """Known before minutes of work, not after."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"--json {path}: is a directory")
    if not path.parent.is_dir():
        raise UsageError(f"--json {path}: the directory {path.parent} does not exist")
    try:
        # by trying: os.access says yes to root, also where the file system says no
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"--json {path}: the directory {path.parent} is not writable") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: what stood at ``path`` stays until the new file is complete."""
    replace_file(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
