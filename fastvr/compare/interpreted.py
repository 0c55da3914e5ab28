"""The Triton kernels of a small ViT and a small ResNet, run on photographs by Triton's interpreter.

    TRITON_INTERPRET=1 python -m fastvr.compare.interpreted CROPS.npy

A process of its own, because Triton reads that variable when a kernel is decorated. ``CROPS.npy`` holds
[N, 3, 64, 64] float32 crops. The last line on stdout is JSON, with verdicts of ``fastvr.compare.parity``:
``{"triton": version, "seconds": s, "models": {"vit": {"float32": verdict, ...}, "resnet": {...}}}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvr
from fastvr.backend import triton_missing
from fastvr.compare import models, parity
from fastvr.nn.residual import BasicBlock

SIZE = 64
DTYPES = (torch.float32, torch.bfloat16)
_TIMEOUT = 300


def small_vit() -> nn.Module:
    return fastvr.ViT(img_size=32, patch_size=8, num_classes=10, embed_dim=96, depth=2, num_heads=3)


def small_resnet() -> nn.Module:
    return fastvr.ResNet(BasicBlock, (2, 2, 2, 2), num_classes=10, width=32)


def run(crops: Tensor, *, tick: Callable[[float], None] = lambda seconds: None) -> dict[str, Any]:
    """Run this module in a process with the interpreter on, and return what it found.

    Never raises for what goes wrong there: ``{"missing": why}`` where Triton is not installed,
    ``{"error": text}`` where the process failed. ``tick`` is called about twice a second.
    """
    if (missing := triton_missing()) is not None:
        return {"missing": missing}
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTVR_BACKEND": "auto", "FASTVR_STRICT": "0"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastvr-") as folder:
        path = Path(folder, "crops.npy")
        np.save(path, crops.numpy())
        # files, because a full pipe that nobody reads would stop the process
        with Path(folder, "out").open("w+") as out, Path(folder, "err").open("w+") as err:
            command = [sys.executable, "-m", "fastvr.compare.interpreted", str(path)]
            process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
            try:
                while process.poll() is None:
                    if time.monotonic() - started > _TIMEOUT:
                        return {"error": f"no result within {_TIMEOUT} s"}
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.5)
                    tick(time.monotonic() - started)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            out.seek(0)
            err.seek(0)
            lines, errors = out.read().splitlines(), err.read().splitlines()
    if process.returncode != 0 or not lines:
        return {"error": errors[-1] if errors else f"exit status {process.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def judge(crops: Tensor) -> dict[str, Any]:
    """Every small model in every dtype, in this process."""
    import triton

    from fastvr.testing import interpreter

    interpreter.install()
    started = time.monotonic()
    found: dict[str, Any] = {}
    for kind, build, size in (("vit", small_vit, 32), ("resnet", small_resnet, SIZE)):
        torch.manual_seed(0)
        model = build()
        x = F.interpolate(crops, size=(size, size), mode="bilinear", antialias=True)
        models.calibrate(model, x)
        for dtype in DTYPES:
            cast = model.eval().to(dtype)
            name = str(dtype).removeprefix("torch.")
            result = parity.verdict(cast, models.InPyTorch(cast), x.to(dtype), mode="triton")
            found.setdefault(kind, {})[name] = result
    return {"triton": triton.__version__, "seconds": round(time.monotonic() - started, 1), "models": found}


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" or len(sys.argv) != 2:
        raise SystemExit("usage: TRITON_INTERPRET=1 python -m fastvr.compare.interpreted CROPS.npy")
    torch.set_num_threads(1)  # the interpreter is one thread of Python
    print(json.dumps(judge(torch.from_numpy(np.load(sys.argv[1])))))


if __name__ == "__main__":
    main()
