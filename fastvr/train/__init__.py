"""Training a model: the loop, its data, and whole runs (``fastvr.train.run``) with what they leave."""

from fastvr.train.loop import Fit, accuracy, fit
from fastvr.train.result import load

__all__ = ["Fit", "accuracy", "fit", "load"]
