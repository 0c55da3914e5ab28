"""What a result is worthless without: the GPU, the versions, the commit; files that a crash leaves whole;
the machine's own ceilings, and how near a time comes to them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from timing import device_times

from fastvr.tuning.table import replace_file

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def commit() -> str:
    """The commit that is measured, "+changes" where the tree differs; FASTVR_COMMIT where there is no git."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "fastvr", "kernels"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTVR_COMMIT", "unknown")
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


@functools.cache
def source_digest() -> str:
    """The first 12 hex digits of the SHA-256 of kernels/ and fastvr/: what ran, where no commit can tell."""
    digest = hashlib.sha256()
    for folder in ("kernels", "fastvr"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        name: _version(name) for name in ("fastvr", "torch", "triton", "timm", "torchvision")
    }
    found["python"] = platform.python_version()
    found["cuda"] = torch.version.cuda or torch.version.hip
    return found


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def environment(device: torch.device) -> dict[str, Any]:
    """The header of every result file."""
    header: dict[str, Any] = {
        "gpu": gpu_name(device),
        "versions": versions(),
        "commit": commit(),
        "sources": source_digest(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        header["multiprocessors"] = properties.multi_processor_count
        header["memory_gib"] = round(properties.total_memory / 2**30, 1)
    else:
        header["cpu_threads"] = torch.get_num_threads()
    return header


def save_json(path: Path, content: Any) -> None:
    """Write the whole file or leave the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(content, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Ceilings measured here: TFLOP/s of a matrix product and GB/s (read + written) of a copy."""

    tflops: float
    gbs: float

    def floor_ms(self, flops: int, moved: int) -> float:
        """No implementation runs faster than its arithmetic, or than its bytes, at the ceilings."""
        return max(flops / (self.tflops * 1e9), moved / (self.gbs * 1e6))


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The ceilings of ``device``, from random data (zeros run faster than what models hold)."""
    real = device.type == "cuda"
    size = (8192 if dtype != torch.float32 else 4096) if real else 256
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    product = device_times(lambda: a @ b, device, rep_ms=200 if real else 5)
    source = torch.empty(2**30 if real else 2**22, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = device_times(lambda: target.copy_(source), device, rep_ms=100 if real else 5)
    return Peaks(2 * size**3 / product.p50 / 1e9, 2 * source.numel() / copy.p50 / 1e6)


def achieved(flops: int, moved: int, ms: float) -> dict[str, float]:
    return {"tflops": round(flops / ms / 1e9, 3), "gbs": round(moved / ms / 1e6, 3)}
