"""Two processes, one step each: models inside DDP and FSDP2, over gloo on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from randomise import randomise
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_jobs import free_port

import fastvr
from fastvr import backend
from fastvr.models.resnet import ResNet
from fastvr.nn.residual import Bottleneck

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


def _timm() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**SIZES, num_classes=10, init_values=0.1)
    fastvr.accelerate(model)
    return model


def _torchvision() -> nn.Module:
    from torchvision.models.resnet import BasicBlock
    from torchvision.models.resnet import ResNet as Theirs

    model = Theirs(BasicBlock, [1, 1, 1, 1], num_classes=10)
    fastvr.accelerate(model)
    return model


_MAKE: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: fastvr.ViT(**SIZES, num_classes=10),
    "resnet": lambda: ResNet(Bottleneck, (1, 1, 1, 1), num_classes=10, width=8),
    "timm": _timm,
    "torchvision": _torchvision,
}
KINDS = list(_MAKE)
Found = tuple[dict[str, torch.Tensor], set[str]]
WRAPPERS = ["ddp", "fsdp"]


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    # a BatchNorm's statistics are those of a process's own images: in training two are not one
    return randomise(_MAKE[kind]()).train("resnet" not in kind and kind != "torchvision")


def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the mean over the images."""
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _wrapped(kind: str, wrapper: str) -> nn.Module:
    model = make(kind)
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    # FSDP2 cuts weights in PyTorch's own layout only
    model.to(memory_format=torch.contiguous_format)
    # as people do: each block, then what is left
    stages = getattr(model, "blocks", None)
    blocks = list(stages) if stages is not None else [b for i in "1234" for b in getattr(model, f"layer{i}")]
    for block in (*blocks, model):
        fully_shard(block)
    return model


def _whole(grad: torch.Tensor) -> torch.Tensor:
    return grad.full_tensor() if isinstance(grad, dist.tensor.DTensor) else grad


def _work(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found: dict[tuple[str, str], Found] = {}
    try:
        for kind in KINDS:
            for wrapper in WRAPPERS:
                with fastvr.use_backend("reference"), backend.observe() as ran:
                    each = gradients(_wrapped(kind, wrapper), images()[2 * rank : 2 * rank + 2])
                whole = {name.removeprefix("module."): _whole(grad) for name, grad in each.items()}
                found[kind, wrapper] = whole, {op for op, _ in ran}
    except Exception:
        (folder / f"{rank}.log").write_text(traceback.format_exc())
        raise
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(folder: Path) -> dict[tuple[str, str], Found]:
    """By (kind, wrapper) gradients, and the ops that ran, of a step of two processes with two images each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["wrapped_jobs", "timm", "torchvision"])
    port = free_port()
    jobs = [context.Process(target=_work, args=(rank, port, folder)) for rank in (0, 1)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
        job.kill()
    logs = "\n".join(log.read_text() for log in folder.glob("*.log"))
    assert [job.exitcode for job in jobs] == [0, 0], logs
    return torch.load(folder / "gradients.pt")
