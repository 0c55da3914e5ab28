"""The measurements that ``prepare`` makes for itself, of what nobody has measured on this card."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from fastvr import backend
from fastvr.models._model import Model
from fastvr.models.features import Backbone
from fastvr.prepare.folded import FoldedViT, foldable
from fastvr.prepare.graphs import images_like

logger = logging.getLogger("fastvr")


def measure_unknown(model: Model | Backbone, example: torch.Tensor, batch_sizes: Sequence[int]) -> None:
    """Measure the likeliest candidates of each call of ``model``, folded or not, that has no entry yet, for
    images like ``example`` in each of the batch sizes. Only on a GPU; about 20 s at most, and remembered."""
    device = example.device
    if not _has_gpu(device) or not batch_sizes or backend.current_backend() == "reference":
        return
    if backend.unavailable(device) is not None or torch.cuda.is_current_stream_capturing():
        return
    # who prepares nothing that is unmeasured need not import it
    from fastvr import tuner
    from fastvr.tuner.calls import meta_copy

    variants: list[Any] = [meta_copy(model)]
    if foldable(model):
        variants.append(FoldedViT(meta_copy(model)))  # type: ignore[arg-type]

    def run(x: torch.Tensor) -> None:
        for variant in variants:
            variant(x)

    def say(share: float, call: str) -> None:
        if share == 0:
            logger.warning(
                "prepare: some of the model's shapes were never measured on this GPU: trying the likeliest "
                "candidates for at most %.0f s, once (`fastvr tune` tries all; tune=False skips this)",
                tuner.QUICK_SECONDS,
            )
        logger.info("prepare: measuring %s", call)

    report = tuner.quick(run, [images_like(example, size) for size in batch_sizes], progress=say)
    if report.stopped == "interrupted":
        raise KeyboardInterrupt
    if report.failed:
        raise RuntimeError(f"prepare: {report.stopped}")


def _has_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
