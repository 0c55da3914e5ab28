"""``fastvr tune``: a model by its name, tuned for the GPU, or gone through without one on a stand-in."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import fastvr
from fastvr import tuner, tuning
from fastvr.models._model import Model
from fastvr.models.registry import build_model, find
from fastvr.models.resnet import ResNet

BATCHES, DRY_BATCHES = (1, 8, 64), (1, 2)
_SHOWN = 12  # dropped candidates; --json has all


def run(
    name: str,
    *,
    batches: Sequence[int] | None,
    dtype: torch.dtype,
    budget: float,
    quick: bool = False,
    again: bool = False,
    train: bool = False,
    dry_run: bool = False,
    progress: tuner.Progress | None = None,
) -> tuner.Report:
    """Tune the calls of a plain and of a prepared model of this name, or with ``train`` those of a training
    step, forward and backward.

    A dry run takes a small model of its family through the interpreter, on the CPU: it finds mistakes in
    Python, and its times mean nothing. Its table lies apart, where no look-up goes.

    Raises:
        BackendError, TableError, RuntimeError: see :func:`fastvr.tuner.tune`.
    """
    device = torch.device("cpu" if dry_run else "cuda")
    model = _on_meta(name, stand_in=dry_run).eval().to(dtype)
    size = getattr(model, "img_size", (32, 32) if dry_run else (224, 224))
    layout = torch.channels_last if isinstance(model, ResNet) else torch.contiguous_format

    def both(x: Tensor) -> Any:
        return model(x), fastvr.prepare(model, x)(x)

    calls = functools.partial(step, model.train()) if train else both

    examples = [
        torch.empty((batch, 3, *size), dtype=dtype, device=device, memory_format=layout)
        for batch in batches or (DRY_BATCHES if dry_run else BATCHES)
    ]
    path = tuning.own_folder() / "dry-run" / "cpu.json" if dry_run else None
    if quick:
        return tuner.quick(calls, examples, budget_seconds=budget, progress=progress, path=path)
    return tuner.tune(
        calls, examples, budget_seconds=budget, progress=progress, path=path, again=again or dry_run
    )


def step(model: Model, x: Tensor) -> None:
    """A forward and a backward pass of ``model``, on meta tensors."""
    with torch.enable_grad():
        model(x).sum().backward()
    model.zero_grad()


def _on_meta(name: str, *, stand_in: bool) -> Model:
    if not stand_in:
        # initialising on meta imports PyTorch's compiler: seconds, but a large model's real one takes more
        with torch.device("meta"):
            return build_model(name)
    small: Model
    if issubclass(find(name).model, ResNet):
        small = build_model(name, layers=(1, 1, 1, 1), num_classes=10, width=16)
    else:
        sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3}
        small = build_model(name, num_classes=10, **sizes)
    return small.to("meta")


def show(report: tuner.Report, console: Console, *, dry_run: bool = False) -> None:
    """What won and by how much, what was dropped and why, and where it is written."""
    measured = len(report.won)
    console.print(
        f"{report.gpu}: {report.planned} shapes, {report.known} known before, {measured} measured "
        f"in {report.seconds:.0f} s"
    )
    if dry_run:
        console.print("A dry run: these are times of the interpreter, and say nothing about a GPU.")
    if report.won:
        console.print()
        console.print(_winners(report))
    for op, reason in report.unsupported.items():
        console.print(Text(f"{op} stays in PyTorch: {reason}"))
    if report.dropped:
        console.print(f"\n{len(report.dropped)} candidates were dropped:")
        for one in report.dropped[:_SHOWN]:
            config = ", ".join(f"{name} {_short(config)}" for name, config in one.config.items())
            reason = one.reason.splitlines()[0][:200]
            console.print(Text(f"- {one.call}{f' with {config}' if config else ''}: {reason}"))
        if len(report.dropped) > _SHOWN:
            console.print(f"- and {len(report.dropped) - _SHOWN} more (--json FILE has them)")
    console.print()
    left = report.planned - report.known - measured
    if report.stopped == "budget":
        console.print(f"The budget ended first: {left} shapes are left. The same command goes on from here.")
    elif report.stopped == "interrupted":
        console.print(f"Interrupted: {left} shapes are left. The same command goes on from here.")
    elif report.stopped:
        console.print(Text(f"Stopped: {report.stopped}. {left} shapes are left."))
    console.print(
        Text(f"NOT SAVED: {report.unsaved}" if report.unsaved else f"Written to {report.path}"),
        soft_wrap=True,
    )


def _short(config: tuning.Config) -> str:
    return " ".join(f"{name}={size}" for name, size in config.items())


def _winners(report: tuner.Report) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("call")
    table.add_column("runs")
    for heading in ("ms", "PyTorch ms", "gain", "over the default"):
        table.add_column(heading, justify="right")
    for won in report.won:
        entry, gain, over = won.entry, "", ""
        if entry.impl == "triton":
            gain = f"{entry.reference_ms / entry.ms:.2f}x" if entry.reference_ms else ""
            over = f"{won.default_ms / entry.ms:.2f}x" if won.default_ms else "the default failed"
        pytorch = f"{entry.reference_ms:.4f}" if entry.reference_ms else "failed"
        runs = "Triton" if entry.impl == "triton" else "PyTorch"
        runs += "" if entry.complete else " (not all tried)"
        table.add_row(Text(won.call), runs, f"{entry.ms:.4f}", pytorch, gain, over)
    return table
