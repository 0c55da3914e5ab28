"""What a training run is asked for, checked before any work is done."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastvr.compare import UsageError
from fastvr.train import models
from fastvr.train.optimize import OPTIMIZERS

DIGITS = "digits"
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Arguments:
    """What decides the result: a run can only be resumed with the same."""

    model: str
    data: str
    image_size: int
    epochs: int
    batch_size: int  # of all processes together
    optimizer: str
    lr: float
    weight_decay: float
    warmup: float  # epochs
    clip_grad: float  # 0: none
    mixup: float  # alpha of the Beta distribution; 0: none
    label_smoothing: float
    ema: float  # decay of the moving average; 0: none
    amp: str
    val_share: float
    checkpoint: str  # initial weights; "": fresh ones
    new_head: bool
    seed: int
    fsdp: bool
    deterministic: bool


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    ``given`` are those of :class:`Arguments` that were named; the others take their defaults or, on resuming,
    what the run was started with.
    """

    out: Path
    given: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    device: str = "auto"
    workers: int | None = None  # None: none for the digits, else up to 8 a process
    save_every: int = 0  # steps between checkpoints, besides those that end an epoch; 0: none
    timeout: float = 300.0  # seconds that a process waits for another
    grad_checkpointing: bool = False  # less memory, more arithmetic, the same losses


def complete(given: Mapping[str, Any], device: torch.device) -> Arguments:
    """``given`` with a default for everything else.

    Raises:
        UsageError: a value that cannot be; the message names the option.
    """
    model = str(given.get("model", models.MINI[0]))
    data = str(given.get("data", DIGITS))
    if model not in models.names():
        raise UsageError(f"--model must be one of {', '.join(models.names())}; got {model!r}")
    epochs = given.get("epochs", 30)
    batch_size = given.get("batch_size", 64)
    optimizer = given.get("optimizer", OPTIMIZERS[0])
    if model in models.MINI and optimizer == "adamw":
        lr = 2e-3
    else:
        # Touvron et al., 2021 (DeiT) and Goyal et al., 2017: proportional to the batch
        lr = 5e-4 * batch_size / 512 if optimizer == "adamw" else 0.1 * batch_size / 256
    arguments = Arguments(
        **{
            "model": model,
            "data": data,
            "image_size": models.default_image_size(model, digits=data == DIGITS),
            "epochs": epochs,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "lr": lr,
            "weight_decay": 0.05 if optimizer == "adamw" else 1e-4,
            "warmup": 0.05 * epochs,
            "clip_grad": 1.0,
            "mixup": 0.0,
            "label_smoothing": 0.1,
            "ema": 0.0,
            "amp": "bf16" if device.type == "cuda" else "off",
            "val_share": 0.25 if data == DIGITS else 0.1,
            "checkpoint": "",
            "new_head": False,
            "seed": 0,
            "fsdp": False,
            "deterministic": False,
            **given,
        }
    )
    _check(arguments)
    return arguments


def resumed(given: Mapping[str, Any], stored: Mapping[str, Any]) -> Arguments:
    """What the run was started with.

    Raises:
        UsageError: ``given`` says something else; the message names every such option.
    """
    names = {field.name for field in dataclasses.fields(Arguments)}
    if set(stored) != names:
        raise UsageError("--resume: the checkpoint is of another version of fastvr")
    different = [
        f"{option(name)} was {stored[name]!r}, is {value!r}"
        for name, value in given.items()
        # the folder may have moved; that it holds the same images is checked by their names
        if stored[name] != value and not (name == "data" and DIGITS not in (stored[name], value))
    ]
    if different:
        raise UsageError(f"--resume goes on with the same arguments only: {'; '.join(different)}")
    return Arguments(**{**stored, "data": given.get("data", stored["data"])})


def option(name: str) -> str:
    """The command line's name of an argument."""
    return f"--{name.replace('_', '-')}"


def _check(a: Arguments) -> None:
    share = (lambda v: 0 <= v < 1, "from 0 to below 1")
    positive = (lambda v: v > 0, "more than 0")
    at_least_0 = (lambda v: v >= 0, "0 or more")
    rules: dict[str, tuple[Callable[[float], bool], str]] = {
        "epochs": positive,
        "batch_size": positive,
        "image_size": positive,
        "lr": positive,
        "weight_decay": at_least_0,
        "clip_grad": at_least_0,
        "mixup": at_least_0,
        "warmup": (lambda v: 0 <= v < a.epochs, f"from 0 to below the {a.epochs} epochs"),
        "label_smoothing": share,
        "ema": share,
        "val_share": (lambda v: 0 < v < 1, "between 0 and 1"),
        # what PyTorch's generators take
        "seed": (lambda v: 0 <= v < 2**64, "from 0 to below 2**64"),
    }
    for name, (holds, what) in rules.items():
        value = getattr(a, name)
        if not math.isfinite(value) or not holds(value):
            raise UsageError(f"{option(name)} must be {what}; got {value}")
    for name, choices in (("optimizer", OPTIMIZERS), ("amp", tuple(AMP))):
        if getattr(a, name) not in choices:
            raise UsageError(f"{option(name)} must be {' or '.join(choices)}; got {getattr(a, name)!r}")
    if a.new_head and not a.checkpoint:
        raise UsageError("--new-head is for the weights of a --checkpoint")
