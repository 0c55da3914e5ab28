"""What every way of training here shares: which weights decay, and how the learning rate runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

OPTIMIZERS = ("adamw", "sgd")


def make_optimizer(name: str, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), or SGD with Nesterov momentum 0.9, over :func:`decay_groups`."""
    groups = decay_groups(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as an optimizer takes them: matrices and kernels decay, biases and norms (one
    dimension) and what the model itself names in ``no_weight_decay`` do not."""
    named = getattr(model, "no_weight_decay", None)
    spared = named() if callable(named) else set()
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name in spared else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def warm_up_cosine(share: float, warm_up: float) -> float:
    """The learning rate over its peak after ``share`` of a run, of which ``warm_up`` is the linear rise; then
    it falls to zero along a cosine (Loshchilov and Hutter, 2017)."""
    if share < warm_up:
        return share / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (share - warm_up) / (1 - warm_up))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
