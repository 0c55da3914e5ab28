"""Both kinds of model, small, from scratch on handwritten digits: what each needs to learn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastvr
from fastvr.nn.residual import BasicBlock
from fastvr.train import accuracy, fit
from fastvr.train import digits as data

FEW = 0.1
_SHARE_OF_FEW = 0.3  # of the time: with a tenth of the samples a run is through them ten times as often


def _vit() -> nn.Module:
    return fastvr.ViT(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=96,
        depth=4,
        num_heads=3,
        mlp_ratio=4.0,
    )


def _resnet() -> nn.Module:
    return fastvr.ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, in_chans=1, width=20)


# 451 and 482 thousand parameters. The ResNet's stem divides each side by four: it sees the digits enlarged.
KINDS: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    "vit": ("small ViT", _vit, 1),
    "resnet": ("small ResNet", _resnet, 4),
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
    with _one_thread(device):
        _compare(seconds, device, seed, found, step)


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU: the models are too small for threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
