"""Training a model: the loop and its data."""

from fastvr.train.loop import Fit, accuracy, fit

__all__ = ["Fit", "accuracy", "fit"]
