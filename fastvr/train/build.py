"""The model of a run, with its optimizer and its moving average, spread over the processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastvr
from fastvr.compare import UsageError
from fastvr.models._model import Model
from fastvr.models.resnet import ResNet
from fastvr.train import distributed, models, randomness
from fastvr.train.checkpoint import Parts
from fastvr.train.data import Data
from fastvr.train.distributed import World
from fastvr.train.optimize import make_optimizer
from fastvr.train.settings import Arguments
from fastvr.weights.layouts import recognise
from fastvr.weights.read import read_checkpoint

_INIT, _RUN = 100, 101  # what a draw is for: part of its key


@dataclass(frozen=True)
class Built:
    """``forward`` is what a step calls; ``parts.model`` is the model inside, if that is DDP's."""

    forward: nn.Module
    parts: Parts
    scaler: torch.amp.GradScaler
    layout: torch.memory_format
    parameters: int
    moments: Callable[[Tensor, torch.dtype], tuple[Tensor | None, Tensor | None]]  # the model's image_moments
    note: str | None


def build(
    a: Arguments, data: Data, world: World, *, resuming: bool, grad_checkpointing: bool = False
) -> Built:
    """Everything as it is before the first step; the generators' states too.

    Raises:
        UsageError: the model does not fit the images, the initial weights not the model.
    """
    randomness.seed_everything(a.seed, _INIT)
    model = _create(a, data, len(data.classes))
    if a.checkpoint and not resuming:
        model = _with_weights(model, a, data)
    model.set_grad_checkpointing(grad_checkpointing)
    model.normalize_images(data.preprocessing["mean"], data.preprocessing["std"])
    parameters = sum(p.numel() for p in model.parameters())
    layout = torch.channels_last if isinstance(model, ResNet) else torch.contiguous_format
    raw, note = distributed.synchronise_batch_norm(model.to(world.device), world)
    ema = None
    if a.ema:
        # averages of sharded weights and of plain running statistics do not mix: those are copied
        ema = AveragedModel(raw, multi_avg_fn=get_ema_multi_avg_fn(a.ema), use_buffers=not a.fsdp)
    forward = raw
    if a.fsdp:
        distributed.shard(raw, world)
        if ema is not None:
            distributed.shard(ema.module, world)
    else:
        forward = distributed.replicate(raw, world)
    optimizer = make_optimizer(a.optimizer, raw, lr=a.lr, weight_decay=a.weight_decay)
    scaler = torch.amp.GradScaler(world.device.type, enabled=a.amp == "fp16")
    # dropout differs between processes
    randomness.seed_everything(a.seed, _RUN, world.rank)
    return Built(forward, Parts(raw, optimizer, ema), scaler, layout, parameters, model.image_moments, note)


def _create(a: Arguments, data: Data, num_classes: int) -> Model:
    try:
        return models.create(a.model, num_classes, data.in_chans, a.image_size)
    except ValueError as error:
        raise UsageError(f"--model {a.model}, --image-size {a.image_size}: {error}") from None


def _with_weights(model: Model, a: Arguments, data: Data) -> Model:
    try:
        if a.new_head:
            given = read_checkpoint(a.checkpoint)
            found = recognise(given.state, given.config, given.source)
            model = _create(a, data, 0 if found is None else found.classes)
        fastvr.load_checkpoint(model, a.checkpoint)
        if a.new_head:
            model.reset_classifier(len(data.classes))  # type: ignore[operator]
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        hint = f" (the images have {len(data.classes)}); --new-head takes all but the classifier"
        raise UsageError(f"--checkpoint: {text}{hint if ' classes' in text else ''}") from None
    return model
