"""Randomness that a resumed run finds again: the generators' states, and draws that depend on a key alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """A seed for ``key``, integers of at least 0; neighbouring keys have unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


@contextlib.contextmanager
def drawing_from(*key: int) -> Iterator[None]:
    """Inside, what draws from PyTorch's generator for the CPU gets what belongs to ``key``; its state is as
    before afterwards. So an image is augmented alike by every worker, process and resumed run."""
    state = torch.get_rng_state()
    # torch.manual_seed would also seed the GPUs
    torch.default_generator.manual_seed(seed_of(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def seed_everything(*key: int) -> None:
    """PyTorch's generators on all devices, NumPy's global one and Python's."""
    seed = seed_of(*key)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def states(device: torch.device) -> dict[str, Any]:
    """The generators' states, of types that ``torch.load(weights_only=True)`` takes."""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=True)
    assert isinstance(legacy, tuple)
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [str(legacy[0]), legacy[1].tolist(), *(float(v) for v in legacy[2:])],
    }
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore(found: dict[str, Any], device: torch.device) -> None:
    """Set what :func:`states` gave; a GPU's only where there is one on both sides."""
    torch.set_rng_state(found["torch"])
    version, words, gauss = found["python"]
    random.setstate((version, tuple(words), gauss))
    kind, key, position, has_gauss, cached = found["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), int(position), int(has_gauss), cached))
    if device.type == "cuda" and "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"], device)
