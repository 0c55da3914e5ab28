"""Several processes are one run: gloo between two on the CPU."""

from __future__ import annotations

import csv
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training_jobs
from safetensors.torch import load_file

import fastvr


def losses(out: Path) -> torch.Tensor:
    """Of every step, and after them what validation gave."""
    with (out / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ends = [row for row in rows if row["val_loss"]]
    columns = [
        [row["loss"] for row in rows],
        *([row[name] for row in ends] for name in ("val_loss", "val_accuracy")),
    ]
    return torch.tensor([float(cell) for column in columns for cell in column])


@pytest.fixture
def both(start: Callable[..., Any]) -> Callable[..., tuple[list[int | None], float]]:
    """Two processes of one run; their exit statuses, and the seconds between the two ends."""

    def run(out: Path, kill: tuple[str, int] | None = None, **how: Any) -> tuple[list[int | None], float]:
        port = training_jobs.free_port()
        jobs = [start(out, rank=(rank, 2, port), kill=kill if rank else None, **how) for rank in (0, 1)]
        jobs[1].join(120)
        ended = time.monotonic()
        jobs[0].join(60)
        return [job.exitcode for job in jobs], time.monotonic() - ended

    return run


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    job = training_jobs.start(out, given={"data": str(folder), "ema": 0.9}, workers=0)
    job.join(120)
    assert job.exitcode == 0
    return out


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_learn_what_one_does_also_after_one_was_lost(
    fsdp: bool, folder: Path, alone: Path, tmp_path: Path, both: Callable[..., Any]
) -> None:
    how = {"given": {"data": str(folder), "ema": 0.9, "fsdp": fsdp}, "workers": 0}
    out = tmp_path / "run"
    (first, second), seconds = both(out, ("step", 7), **how)
    assert second == -signal.SIGKILL
    assert first == 3  # LostProcess, not a hang
    assert seconds < 20
    assert "another process of this run ended" in training_jobs.log(out)
    assert both(out, resume=True, **how)[0] == [0, 0]
    torch.testing.assert_close(losses(out), losses(alone))
    assert fastvr.train.load(out).num_classes == 2
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, alone))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


def test_batch_norm_over_two_processes_of_a_cpu_says_what_it_does(
    folder: Path, tmp_path: Path, both: Callable[..., Any]
) -> None:
    how = {"given": {"data": str(folder), "model": "resnet_mini", "epochs": 1}, "workers": 0}
    assert both(tmp_path / "run", **how)[0] == [0, 0]
    assert "SyncBatchNorm needs GPUs" in training_jobs.log(tmp_path / "run")
    assert fastvr.train.load(tmp_path / "run").num_classes == 2
