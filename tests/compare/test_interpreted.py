"""The kernels of both small models, in a process with Triton's interpreter."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import torch

from fastvr import backend
from fastvr.compare import interpreted


def test_the_kernels_run_and_are_right() -> None:
    ticks: list[float] = []
    found = interpreted.run(torch.rand(2, 3, interpreted.SIZE, interpreted.SIZE), tick=ticks.append)
    assert set(found["models"]) == {"vit", "resnet"}, found
    for kind, op in (("vit", "linear"), ("resnet", "conv_bn_relu")):
        assert set(found["models"][kind]) == {"float32", "bfloat16"}
        for verdict in found["models"][kind].values():
            assert verdict["passed"], verdict
            assert set(verdict["ops"]) == {"triton"}
            assert verdict["ops"]["triton"][op] >= 2
    assert ticks == sorted(ticks)
    assert ticks


def test_without_triton_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_missing", lambda: "Triton is not installed")
    monkeypatch.setattr(interpreted, "triton_missing", lambda: "Triton is not installed")
    assert interpreted.run(torch.zeros(1)) == {"missing": "Triton is not installed"}


def test_a_process_that_fails_is_an_error_not_a_crash() -> None:
    found = interpreted.run(torch.zeros(2, 7))  # no images
    assert set(found) == {"error"}
    assert "Error" in found["error"]


def test_an_interruption_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[Any]] = []
    popen = subprocess.Popen

    def spy(*args: Any, **kwargs: Any) -> subprocess.Popen[Any]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", spy)
    with pytest.raises(KeyboardInterrupt):
        interpreted.run(torch.zeros(1, 3, 64, 64), tick=interrupt)
    assert started[0].poll() is not None
