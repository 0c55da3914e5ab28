"""A run that is killed, at any moment, goes on to what it would have been."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# everything that has a state: dropout, crops, mixup, moving average
GIVEN = {"mixup": 0.2, "ema": 0.9}
DROPOUT = 0.1


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nobody killed: 2 epochs of 4 steps."""
    import training_jobs

    out = tmp_path_factory.mktemp("whole")
    job = training_jobs.start(
        out, given={"data": str(folder), **GIVEN}, dropout=DROPOUT, save_every=3, workers=0
    )
    job.join(120)
    assert job.exitcode == 0
    return out


@pytest.mark.parametrize(
    "kill",
    [("step", 1), ("step", 6), ("write", 1), ("write", 3), ("replace", 2), ("replaced", 3), ("row", 3)],
    ids=lambda kill: f"{kill[0]}{kill[1]}",
)
def test_a_killed_run_goes_on_bit_for_bit(
    kill: tuple[str, int], folder: Path, whole: Path, tmp_path: Path, finish: Callable[..., int]
) -> None:
    given = {"data": str(folder), **GIVEN}
    how = {"dropout": DROPOUT, "save_every": 3, "workers": 0}
    assert finish(tmp_path, given=given, kill=kill, **how) == -signal.SIGKILL
    assert finish(tmp_path, given=given, resume=True, **how) == 0
    assert (tmp_path / "losses.csv").read_bytes() == (whole / "losses.csv").read_bytes()
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path, whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert not list(tmp_path.glob(".*.tmp"))
