"""Seconds from ``import fastvr`` to the first result, in a fresh process with an empty kernel cache.

    python bench/cold_start.py [--model vit_b_16] [--batch 8] [--backend triton] [--arch sm_90]

Without a GPU the launches of that first result are compiled for ``--arch`` instead of run: what the compiler
takes is most of a cold start; loading binaries and running them is not in the figure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOAL = 30.0  # seconds


def measure(model: str, batch: int, mode: str, arch: str) -> dict[str, object]:
    """In this process, which must have imported nothing heavy yet."""
    started = time.perf_counter()
    import torch

    import fastvr

    imported = time.perf_counter()
    name = {"vit_b_16": "vit_base", "resnet50": "resnet50"}[model]
    found: dict[str, object] = {"model": model, "batch": batch, "import_s": round(imported - started, 2)}
    if torch.cuda.is_available():
        net = fastvr.create_model(name).cuda().bfloat16().eval()
        x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad(), fastvr.use_backend(mode):
            net(x)
        torch.cuda.synchronize()
        found["on"] = torch.cuda.get_device_name()
    else:
        sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
        import launches

        with torch.device("meta"):
            net = fastvr.create_model(name).bfloat16().eval()
        x = torch.empty(batch, 3, 224, 224, device="meta", dtype=torch.bfloat16)
        recorded = launches.record(lambda: net(x), arch)
        found["binaries"] = len({launches.compile_launch(launch, arch).hash for launch in recorded})
        found["on"] = f"compiled for {arch}, not run"
    found["total_s"] = round(time.perf_counter() - started, 2)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=("vit_b_16", "resnet50"), default="vit_b_16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--backend", choices=("auto", "triton"), default="triton")
    parser.add_argument("--arch", default="sm_90", help="what to compile for without a GPU (default sm_90)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(measure(args.model, args.batch, args.backend, args.arch)))
        return 0
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, str(Path(__file__).resolve()), "--here", "--model", args.model]
        command += ["--batch", str(args.batch), "--backend", args.backend, "--arch", args.arch]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    return int(found["total_s"] > GOAL)


if __name__ == "__main__":
    raise SystemExit(main())
