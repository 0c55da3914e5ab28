"""Both kinds of model, small, from scratch on handwritten digits: what each needs to learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastvr.train import accuracy, fit
from fastvr.train import digits as data
from fastvr.train.models import create, one_thread

FEW = 0.1
_SHARE_OF_FEW = 0.3  # of the time: with a tenth of the samples a run is through them ten times as often


# The ResNet's stem divides each side by four: it sees the digits enlarged.
KINDS: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    "vit": ("small ViT", lambda: create("vit_mini", 10, 1, 8), 1),
    "resnet": ("small ResNet", lambda: create("resnet_mini", 10, 1, 32), 4),
}


def compare(
    *,
    seconds: float,
    device: torch.device,
    seed: int,
    found: dict[str, Any],
    step: Callable[[float, str], None] = lambda share, text: None,
) -> None:
    """Train each kind on all labels and on a tenth of them, ``seconds`` in total.

    Fills ``found`` as results come in, so that an interrupted run keeps them: by kind ``parameters``, and by
    share of the labels ``all`` and ``few`` with ``accuracy`` on the held-out digits, ``samples``, ``steps``,
    ``epochs``, ``seconds``, ``loss``.
    """
    with one_thread(device):
        _compare(seconds, device, seed, found, step)


def _compare(
    seconds: float,
    device: torch.device,
    seed: int,
    found: dict[str, Any],
    step: Callable[[float, str], None],
) -> None:
    everything = data.load(seed=seed).to(device)
    parts = {"few": everything.fewer_labels(FEW), "all": everything}
    shares = {"few": _SHARE_OF_FEW / len(KINDS), "all": (1 - _SHARE_OF_FEW) / len(KINDS)}
    passed = 0.0
    found.update(train=len(everything.train_x), test=len(everything.test_x), share_of_few=FEW, models={})
    for part, digits in parts.items():
        for kind, (title, build, scale) in KINDS.items():
            torch.manual_seed(seed)
            model = build().to(device)
            train_x, test_x = (F.interpolate(x, scale_factor=scale) for x in (digits.train_x, digits.test_x))

            def tick(share: float, title: str = title, part: str = part, start: float = passed) -> None:
                step(start + share * shares[part], f"{title}, {part} labels")

            result = fit(model, train_x, digits.train_y, seconds=seconds * shares[part], seed=seed, step=tick)
            passed += shares[part]
            entry = found["models"].setdefault(kind, {"title": title})
            entry["parameters"] = sum(p.numel() for p in model.parameters())
            entry[part] = {
                "accuracy": accuracy(model, test_x, digits.test_y),
                "samples": len(train_x),
                **asdict(result),
            }
