"""What a run leaves: weights as safetensors, and a card that says what they are of."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

import fastvr
from fastvr.compare.settings import write_json
from fastvr.models._model import Model
from fastvr.models.preprocessing import Preprocessing
from fastvr.train import models
from fastvr.train.checkpoint import CARD, CONFIG, WEIGHTS
from fastvr.train.data import Data
from fastvr.train.settings import Arguments
from fastvr.tuning.table import replacing
from fastvr.weights.save import own_config


def save(
    out: Path, weights: dict[str, torch.Tensor], arguments: Arguments, data: Data, accuracy: float | None
) -> None:
    """``model.safetensors`` and ``config.json`` as :func:`fastvr.load_model` takes them; ``model.json`` with
    the model's name and sizes, its classes, how images are prepared, and what it was trained with."""
    from safetensors.torch import save as serialise

    card: dict[str, Any] = {
        "fastvr": fastvr.__version__,
        "model": {
            "name": arguments.model,
            "num_classes": len(data.classes),
            "in_chans": data.in_chans,
            "image_size": arguments.image_size,
        },
        "classes": list(data.classes),
        "preprocessing": data.preprocessing,
        "weights": f"moving average, decay {arguments.ema}" if arguments.ema else "of the last step",
        "validation_accuracy": accuracy,
        "arguments": dataclasses.asdict(arguments),
    }
    like = models.create(**card["model"])
    if "resize" in (how := data.preprocessing):
        mean, std = tuple(how["mean"]), tuple(how["std"])
        like.preprocessing = Preprocessing(how["image_size"], how["resize"], mean, std, how["interpolation"])
    with replacing(out / WEIGHTS) as file:
        file.write(serialise(weights, metadata={"format": "pt"}))
    write_json(out / CONFIG, own_config(like))
    write_json(out / CARD, card)


def load(folder: str | os.PathLike[str]) -> Model:
    """The model that a run left in ``folder``, in eval on the CPU, taking uint8 images as its card's
    ``preprocessing`` has them.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: its weights cannot be read.
    """
    card = json.loads((Path(folder) / CARD).read_text())
    model = models.create(**card["model"])
    fastvr.load_checkpoint(model, Path(folder) / WEIGHTS)
    model.normalize_images(card["preprocessing"]["mean"], card["preprocessing"]["std"])
    return model.eval()
