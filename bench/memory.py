"""Bytes that one training step of ViT-B/16 and ResNet-50 keeps for its backward pass, without a GPU.

    python bench/memory.py [--batch 64] [--arch sm_90] [--json FILE | --json -]

Counted with saved-tensor hooks on tensors without data, in bfloat16 and in float32 under autocast to it:
every storage that autograd keeps, once, parameters and buffers apart. "eager" is timm's and torchvision's
model where they are installed, attention keeping what FlashAttention keeps; "fastvr" runs every op on its
Triton kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import cases  # noqa: E402
import models  # noqa: E402
import record  # noqa: E402

from fastvr import backend  # noqa: E402
from fastvr.compare.traffic import FlashAttention  # noqa: E402


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What ``model(x)``, all of it without data, keeps for backward, in whatever backend is in force."""
    apart = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    # storages are kept, so that no address is used twice
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in apart:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), FlashAttention():
        y = model(x)
    if not y.requires_grad:
        raise RuntimeError("nothing would be differentiated")
    return sum(storage.nbytes() for storage in kept.values())


def counts(batch: int, arch: str = "sm_90") -> dict[str, dict[str, int]]:
    """The JSON's content: a model in bfloat16 under its name, in float32 under autocast with " autocast"."""
    meta, found = torch.device("meta"), {}
    for name in cases.MODELS:
        pair = models.build(name, torch.bfloat16, meta)
        found[name] = _counted(pair.eager, pair.ours, pair.example(batch, torch.bfloat16, meta), arch)
        pair = models.build(name, torch.float32, meta)
        # meta tensors have no autocast, those of a pretended CPU do
        cpu = torch.device("cpu")
        with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype=torch.bfloat16):
            eager, ours = pair.eager.to_empty(device=cpu), pair.ours.to_empty(device=cpu)
            x = torch.empty_like(pair.example(batch, torch.float32, meta), device=cpu)
            found[f"{name} autocast"] = _counted(eager, ours, x, arch)
    return found


def _counted(eager: nn.Module, ours: nn.Module, x: Tensor, arch: str) -> dict[str, int]:
    from fastvr.kernels.common import record_launches

    with backend.use_backend("reference"):
        theirs = saved_bytes(eager.train(), x)
    with (
        backend.use_backend("triton"),
        backend.assume_architecture(arch),
        record_launches(lambda *launch: None),
    ):
        return {"eager": theirs, "fastvr": saved_bytes(ours.train(), x)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--arch", default="sm_90", help="whose kernels run (default sm_90)")
    parser.add_argument(
        "--json", metavar="FILE", help="write JSON there; - is standard output, without table"
    )
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch must be at least 1; got {args.batch}")
    found = counts(args.batch, args.arch)
    if args.json == "-":
        print(json.dumps(found, indent=1))
        return 0
    print(f"kept for backward at batch {args.batch}, 224 px, bfloat16 ({args.arch})")
    print(f"{'':20}{'eager GB':>10}{'fastvr GB':>11}{'ratio':>8}")
    for name, row in found.items():
        ratio = row["fastvr"] / row["eager"]
        print(f"{name:20}{row['eager'] / 1e9:>10.2f}{row['fastvr'] / 1e9:>11.2f}{ratio:>8.3f}")
    if args.json:
        record.save_json(Path(args.json), found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
