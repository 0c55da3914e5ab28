"""The losses of a run, as a table and as a curve."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastvr.tuning.table import replace_file, replacing


class Row(NamedTuple):
    """One step; ``val_`` where an epoch ends. Steps and epochs count from 1."""

    step: int
    epoch: int
    lr: float
    loss: float
    val_loss: float | None = None
    val_accuracy: float | None = None

    def text(self) -> list[str]:
        """In full, so that equal files are equal runs."""
        return ["" if value is None else repr(value) for value in self]


def _row(cells: Sequence[str]) -> Row:
    step, epoch, *others = cells
    lr, loss, val_loss, val_accuracy = (float(cell) if cell else None for cell in others)
    if lr is None or loss is None:
        raise ValueError("empty")
    return Row(int(step), int(epoch), lr, loss, val_loss, val_accuracy)


class Losses:
    """``losses.csv``, a row a step.

    Args:
        path: the file; made anew, or cut back to the first ``step`` steps that it has.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self.rows = _read(path, step)
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(row.text() for row in self.rows)
        replace_file(path, buffer.getvalue())

    def add(self, rows: Sequence[Row]) -> None:
        self.rows.extend(rows)
        with self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(row.text() for row in rows)

    def sync(self) -> None:
        """Have on the disk what was added: a checkpoint that follows counts on it."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())


def _read(path: Path, step: int) -> list[Row]:
    if step == 0 or not path.exists():
        return []
    with path.open(newline="") as file:
        cells = list(csv.reader(file))[1:]
    # a killed process may have left rows behind the checkpoint, the last one torn
    return [_row(row) for row in cells if len(row) == len(Row._fields) and int(row[0]) <= step]


def draw(rows: Sequence[Row], path: Path, title: str) -> str | None:
    """The loss of every step, its mean over the last 2 % of the run, and the accuracy of every epoch as PNG.

    Returns:
        None, or why there is no curve.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no curve without matplotlib: pip install 'fastvr[train]'"
    if not rows:
        return "no steps, no curve"
    import numpy as np
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    steps, losses = np.array([row.step for row in rows]), np.array([row.loss for row in rows])
    width = max(len(rows) // 50, 1)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", label="training loss")
    ends = [row for row in rows if row.val_accuracy is not None]
    at = [row.step for row in ends]
    if ends:
        axes.plot(
            at, [row.val_loss or 0 for row in ends], color="tab:blue", linestyle="--", label="validation loss"
        )
    # limits count what is drawn before them
    axes.set(xlabel="step", ylabel="loss", title=title, xlim=(0, None), ylim=(0, None))
    handles = axes.get_legend_handles_labels()[0]
    if ends:
        right = axes.twinx()
        handles += right.plot(
            at,
            [100 * (row.val_accuracy or 0) for row in ends],
            color="tab:orange",
            marker=".",
            label="validation accuracy",
        )
        right.set(ylabel="accuracy, %", ylim=(0, 100))
    axes.legend(handles=handles, loc="center right")
    with replacing(path) as file, warnings.catch_warnings():
        # a folder's name may have letters that matplotlib's font lacks: boxes
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(file, format="png", dpi=120)
    return None
