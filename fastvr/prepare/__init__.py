"""A snapshot of a model for inference: weights prepared once, launches captured in CUDA graphs."""

from __future__ import annotations

from fastvr.prepare.prepared import PreparedModel, prepare

__all__ = ["PreparedModel", "prepare"]
