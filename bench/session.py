"""A run on a GPU machine that may be gone in ten minutes: its budget, its files, its words."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import cases
import record
import torch
from random_cases import random_case

from fastvr import backend
from fastvr.tuner.sweep import describe

__all__ = ["Session", "describe", "samples"]


@dataclasses.dataclass
class Session:
    """Where a run of ``on_gpu.py`` writes, on what, and until when.

    ``small`` takes the small cases and models: without a GPU everything runs, in the interpreter and with a
    stand-in timer, so that no GPU minute is spent on a mistake in Python.
    """

    out: Path
    device: torch.device
    deadline: float  # on time.monotonic()
    small: bool
    seed: int = 0
    samples: int = 3  # random shapes an op and dtype in parity

    @property
    def arch(self) -> str:
        return backend.architecture(self.device)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The most wanted first: a run may end early."""
        return ("bfloat16", "float32") if self.small else ("bfloat16", "float16", "float32")

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.deadline - time.monotonic()

    def save(self, name: str, content: dict[str, Any]) -> None:
        """``content`` as ``out/name``, under the environment's header; the whole file or the old one."""
        record.save_json(self.out / name, record.environment(self.device) | content)

    def load(self, name: str) -> dict[str, Any]:
        """What an earlier step or run left as ``out/name``; empty where there is none, or it is damaged."""
        try:
            content: dict[str, Any] = json.loads((self.out / name).read_text())
        except (OSError, ValueError):
            return {}
        return content

    def say(self, text: str) -> None:
        print(text, flush=True)


def samples(op: str, count: int, *, small: bool, seed: int) -> list[cases.Case]:
    """Seeded random cases of ``op``."""
    rng = random.Random(f"{op} {seed}")
    return [random_case(op, rng, small=small) for _ in range(count)]
