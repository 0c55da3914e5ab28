"""The same learning: small models of both kinds on handwritten digits, fastvr beside timm and torchvision.

    python bench/learning.py [--backend auto|triton|reference] [--epochs 30] [--seeds 3] [--json FILE]

Each pair starts from the same weights and sees the same batches, in float32. What is compared is the accuracy
on the 450 held-out digits; rounding differs, so that two runs part after some hundred steps, as two seeds do.
Exit status 1 where the mean over the seeds differs by more than a point.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record  # noqa: E402

import fastvr  # noqa: E402
from fastvr.train import accuracy, digits  # noqa: E402
from fastvr.train.models import one_thread  # noqa: E402
from fastvr.train.optimize import make_optimizer, set_lr, warm_up_cosine  # noqa: E402

_BATCH = 64
_MOST = 0.01  # difference of mean accuracies


def vit_pair(**sizes: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's, with the same weights; sizes as ``vit_mini`` has them for the digits."""
    from timm.models.vision_transformer import VisionTransformer

    mini = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    mini |= {"embed_dim": 96, "depth": 4, "num_heads": 3}
    return _twins(fastvr.ViT(**mini | sizes), VisionTransformer(**mini | sizes))


def resnet_pair(width: int = 20) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's, with the same weights; sizes as ``resnet_mini``."""
    from torchvision.models.resnet import BasicBlock, ResNet

    class Narrow(ResNet):
        """torchvision's, which always begins with 64 channels and takes three."""

        def __init__(self) -> None:
            super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=10)
            self.inplanes = width
            self.conv1 = nn.Conv2d(1, width, kernel_size=7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            for stage in range(4):
                layer = self._make_layer(BasicBlock, width << stage, 1, stride=1 if stage == 0 else 2)
                setattr(self, f"layer{stage + 1}", layer)
            self.fc = nn.Linear(width << 3, 10)

    kind = fastvr.nn.residual.BasicBlock
    ours = fastvr.ResNet(kind, (1, 1, 1, 1), num_classes=10, in_chans=1, width=width)
    return _twins(ours, Narrow().to(memory_format=torch.channels_last))


def _twins(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def learn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    seed: int,
    batch_size: int = _BATCH,
    optimizer: str = "adamw",
    lr: float = 2e-3,
    step: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """The losses [steps] of as many steps in float32, as ``fastvr train`` takes them."""
    rule = make_optimizer(optimizer, model, lr=lr, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    losses = []
    model.train()
    for number in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(x), generator=generator)
        rows, order = order[:batch_size].to(x.device), order[batch_size:]
        set_lr(rule, lr * warm_up_cosine((number + 0.5) / steps, 0.05))
        loss = F.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.1)
        rule.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        losses.append(loss.detach())
        step(number)
    return torch.stack(losses)


def compare(kind: str, seed: int, epochs: int, backend: str, device: torch.device) -> dict[str, Any]:
    data = digits.load(seed=seed).to(device)
    enlarged = 1 if kind == "vit" else 4
    train_x, test_x = (F.interpolate(x, scale_factor=enlarged) for x in (data.train_x, data.test_x))
    torch.manual_seed(seed)
    ours, theirs = vit_pair() if kind == "vit" else resnet_pair()
    found: dict[str, Any] = {"seed": seed}
    for name, model, mode in (("fastvr", ours, backend), ("eager", theirs, "reference")):
        model = model.to(device)
        with fastvr.use_backend(mode):
            steps = epochs * (len(train_x) // _BATCH)
            losses = learn(model, train_x, data.train_y, steps=steps, seed=seed)
            right = accuracy(model, test_x, data.test_y)
        found[name] = {"accuracy": round(right, 4), "loss": round(float(losses[-20:].mean()), 4)}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--backend", choices=("auto", "triton", "reference"), default="auto")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    args = parser.parse_args(argv)
    if min(args.epochs, args.seeds) < 1:
        parser.error("--epochs and --seeds must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    result: dict[str, Any] = {
        **record.environment(device),
        "backend": args.backend,
        "epochs": args.epochs,
        "models": {},
    }
    passed = True
    print(f"accuracy on the digits after {args.epochs} epochs, {args.backend} on {device}")
    with one_thread(device):
        for kind in ("vit", "resnet"):
            runs = [compare(kind, seed, args.epochs, args.backend, device) for seed in range(args.seeds)]
            means = {
                name: statistics.mean(run[name]["accuracy"] for run in runs) for name in ("fastvr", "eager")
            }
            close = abs(means["fastvr"] - means["eager"]) <= _MOST
            passed &= close
            result["models"][kind] = {"runs": runs, "mean": means, "passed": close}
            for run in runs:
                print(
                    f"{kind:8} seed {run['seed']}  fastvr {run['fastvr']['accuracy']:.2%} (loss "
                    f"{run['fastvr']['loss']:.4f})  eager {run['eager']['accuracy']:.2%} "
                    f"(loss {run['eager']['loss']:.4f})"
                )
            print(f"{kind:8} mean    fastvr {means['fastvr']:.2%}  eager {means['eager']:.2%}", flush=True)
    if args.json:
        record.save_json(Path(args.json), result)
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
