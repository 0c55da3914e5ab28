"""Kernel launches and HBM bytes of one bfloat16 forward pass of ViT-B/16 and ResNet-50, without a GPU.

    python bench/traffic.py [--batch 64] [--arch sm_90] [--train] [--by-op] [--json FILE | --json -]

Bytes are those of the tensors handed to each launch, read and written; every fill, copy and cast counts.
"eager" is timm's and torchvision's model where they are installed, "fastvr" a plain call, "prepared" one of
``fastvr.prepare``'s. With --train it is one training step, forward and backward without loss and optimiser,
and its FLOPs, also those of what backward computes again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import cases  # noqa: E402
import models  # noqa: E402
import record  # noqa: E402

import fastvr  # noqa: E402
from fastvr import backend  # noqa: E402
from fastvr.compare.traffic import Traffic, count, eager_traffic  # noqa: E402

COLUMNS = ("eager", "fastvr", "prepared")
Counts = dict[str, dict[str, dict[str, int]]]


def counts(
    batch: int, arch: str = "sm_90", train: bool = False
) -> tuple[Counts, dict[str, dict[str, Traffic]]]:
    """The JSON's content, and the same with every op's share."""
    meta, dtype = torch.device("meta"), torch.bfloat16
    taken: dict[str, dict[str, Traffic]] = {}
    for name in cases.MODELS:
        pair = models.build(name, dtype, meta)
        x = pair.example(batch, dtype, meta)
        taken[name] = {"eager": eager_traffic(pair.eager, x, train=train)}
        ours = {"fastvr": pair.ours}
        if not train:
            # as where the kernels were measured to be the fastest
            with backend.use_backend("triton"), backend.assume_architecture(arch):
                ours["prepared"] = fastvr.prepare(pair.ours, x)
        for column, model in ours.items():
            traffic = count(model, x, arch=arch, train=train)
            if traffic is None:
                raise SystemExit("Triton is not installed: the launches are in the kernels' own code")
            taken[name][column] = traffic
    short = {
        name: {
            column: {"launches": t.launches, "bytes": t.bytes} | ({"flops": t.flops} if train else {})
            for column, t in columns.items()
        }
        for name, columns in taken.items()
    }
    return short, taken


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--arch", default="sm_90", help="whose configurations to take (default sm_90)")
    parser.add_argument(
        "--json", metavar="FILE", help="write JSON there; - is standard output, without table"
    )
    parser.add_argument("--train", action="store_true", help="a training step, with its FLOPs")
    parser.add_argument("--by-op", action="store_true", help="also what each op takes")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch must be at least 1; got {args.batch}")
    short, taken = counts(args.batch, args.arch, args.train)
    if args.json == "-":
        print(json.dumps(short, indent=1))
        return 0
    what = "training step" if args.train else "forward pass"
    print(f"one bfloat16 {what} at batch {args.batch}, 224 px ({args.arch})")
    heads = ["launches", "GB", "MB/image", *(["GFLOP/image"] if args.train else [])]
    print(f"{'':22}" + "".join(f"{head:>12}" for head in heads))
    for name, columns in taken.items():
        for column, traffic in columns.items():
            line = f"{name:12}{column:10}{traffic.launches:>12}{traffic.bytes / 1e9:>12.2f}"
            line += f"{traffic.bytes / 1e6 / args.batch:>12.1f}"
            print(line + (f"{traffic.flops / 1e9 / args.batch:>12.2f}" if args.train else ""))
            if args.by_op:
                for op, (launches, size) in sorted(traffic.by_op.items(), key=lambda item: -item[1][1]):
                    print(f"    {op:45}{launches:>8}{size / 1e9:>9.2f}")
    if args.json:
        record.save_json(Path(args.json), short)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
