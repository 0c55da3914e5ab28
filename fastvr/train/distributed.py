"""Several processes, one run: as ``torchrun`` starts them; DDP, or FSDP2 where the weights are too many."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvr.compare import UsageError
from fastvr.compare.settings import device_for
from fastvr.models.resnet import ResNet
from fastvr.nn.block import Block
from fastvr.nn.residual import BasicBlock, Bottleneck

_UNITS = (Block, BasicBlock, Bottleneck)  # what FSDP gathers at a time


class LostProcess(RuntimeError):
    """Another process of the run ended, or does not answer."""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, in all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def world(device: str, timeout: float) -> Iterator[World]:
    """The processes that ``torchrun`` started (gloo between CPUs, NCCL between GPUs), or this one alone.

    ``timeout``: seconds that one waits for another. A process that is gone is noticed at once.

    Raises:
        UsageError: there is no such device, or not one for each process.
        LostProcess: inside, another process ended or did not answer.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield World(0, 1, device_for(device))
        return
    chosen = device_for(device)
    if chosen.type == "cuda":
        chosen = device_for(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(chosen)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=timeout),
        )
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
    except RuntimeError as error:
        if _lost(error):
            raise LostProcess(
                f"another process of this run ended, or did not answer for {timeout:g} s: "
                f"{str(error).strip().splitlines()[0][:200]}"
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _lost(error: RuntimeError) -> bool:
    """Whether ``error`` is a communication's. Gloo raises plain RuntimeErrors, told by their text only."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        mark in text for mark in ("gloo/", "Gloo ", "NCCL", "Connection closed by peer", "Connection reset")
    )


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def synchronise_batch_norm(model: nn.Module, among: World) -> tuple[nn.Module, str | None]:
    """BatchNorm over the batches of all processes where PyTorch can, on GPUs; and a note where it cannot."""
    if among.size == 1 or not has_batch_norm(model):
        return model, None
    if among.device.type != "cuda":
        return model, (
            "BatchNorm normalises by each process's own part of the batch: PyTorch's SyncBatchNorm needs GPUs"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model), None


def replicate(model: nn.Module, among: World) -> nn.Module:
    """``model`` under DDP, or itself in a single process."""
    if among.size == 1:
        return model
    devices = [among.device] if among.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def shard(model: nn.Module, among: World) -> None:
    """FSDP2 in place: every block's weights, and the rest, spread over the processes.

    Raises:
        UsageError: there is only one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if among.size == 1:
        raise UsageError("--fsdp spreads weights over processes, and there is one: start it with torchrun")
    if isinstance(model, ResNet):
        # FSDP cuts weights along their first dimension, in the order of PyTorch's own layout only
        model.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(among.device.type, (among.size,))
    for module in list(model.modules()):
        if isinstance(module, _UNITS):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
