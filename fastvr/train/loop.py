"""A plain training loop for image classifiers, with a budget of seconds in place of epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvr.train.optimize import make_optimizer, set_lr, warm_up_cosine

_WARM_UP = 0.05  # share of the budget in which the learning rate rises
_LEAST = 1e-4  # of the peak: the first step comes when next to no time has passed


@dataclass(frozen=True)
class Fit:
    """How a training run went; ``loss`` is the mean over its last epoch."""

    steps: int
    epochs: float
    seconds: float
    loss: float


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seconds: float,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    label_smoothing: float = 0.1,
    seed: int = 0,
    step: Callable[[float], None] = lambda share: None,
) -> Fit:
    """Train ``model`` in place with AdamW until ``seconds`` are over.

    The learning rate rises and falls (:func:`warm_up_cosine`) over the share of the time that has passed, so
    that a run is complete on a fast machine and on a slow one; what differs is the number of epochs. The
    order of the samples depends on ``seed`` alone.

    Args:
        model: moved and cast by the caller; left in eval.
        x: [N, C, H, W] on the model's device.
        y: [N] int64 classes.
        step: called after every step with the share of the budget that has passed.

    Raises:
        ValueError: no samples, or no time.
        FloatingPointError: the loss became NaN or infinite.
    """
    if not len(x) or seconds <= 0:
        raise ValueError(f"fit: needs samples and seconds > 0; got {len(x)} samples, {seconds} s")
    optimizer = make_optimizer("adamw", model, lr=lr, weight_decay=weight_decay)
    optimizer.zero_grad()  # the first call imports torch._dynamo, seconds that are not the model's
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(x))
    model.train()
    losses: list[Tensor] = []
    a_pass = len(x) // batch_size
    steps, order = 0, torch.empty(0, dtype=torch.int64)
    start = time.perf_counter()
    while (share := (time.perf_counter() - start) / seconds) < 1:
        # a rest below one batch is dropped: BatchNorm over a sample or two is noise
        if len(order) < batch_size:
            order = torch.randperm(len(x), generator=generator)
        batch, order = order[:batch_size].to(x.device), order[batch_size:]
        set_lr(optimizer, lr * max(warm_up_cosine(share, _WARM_UP), _LEAST))
        loss = F.cross_entropy(model(x[batch]), y[batch], label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses = [*losses[-(a_pass - 1) :], loss.detach()] if a_pass > 1 else [loss.detach()]
        steps += 1
        step(share)
    model.eval()
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise FloatingPointError(f"fit: the loss is {mean} after {steps} steps")
    return Fit(steps, steps * batch_size / len(x), time.perf_counter() - start, mean)


def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 256) -> float:
    """Share of ``x`` that the model, in eval, puts into its class ``y``."""
    return evaluate(model, zip(x.split(batch_size), y.split(batch_size), strict=True)).hits / len(x)


class Evaluation(NamedTuple):
    """Of labelled images; those with the label -1 count for nothing."""

    hits: int
    loss: float
    """The sum of the cross-entropies."""


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """What the model, left in eval, makes of (images, int64 labels) on its device."""
    model.eval()
    hits, losses = [], []
    with torch.no_grad():
        for x, y in batches:
            logits = model(x)
            hits.append((logits.argmax(-1) == y).sum())
            losses.append(F.cross_entropy(logits.float(), y, ignore_index=-1, reduction="sum"))
    return Evaluation(int(torch.stack(hits).sum()), float(torch.stack(losses).sum()))
