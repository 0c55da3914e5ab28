"""Preprocessing as timm and transformers write it beside the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastvr.models.preprocessing import INTERPOLATIONS, Preprocessing
from fastvr.weights.errors import CheckpointError

logger = logging.getLogger("fastvr")

_CONVNEXT_SQUASHES = 384  # pixels, from which on its processor crops no more
# Pillow's numbers, which transformers writes
_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def read(
    config: Mapping[str, Any] | None, preprocessor: Mapping[str, Any] | None, source: str
) -> Preprocessing | None:
    """What lies beside the weights, or None.

    Args:
        config: timm's config.json.
        preprocessor: transformers' preprocessor_config.json.
        source: what messages call the checkpoint.

    Raises:
        CheckpointError: numbers that make no sense.
    """
    try:
        found = None
        if config is not None and isinstance(timm := config.get("pretrained_cfg"), Mapping):
            found = _timm(timm)
        elif preprocessor is not None and {"image_mean", "do_normalize"} & preprocessor.keys():
            found = _transformers(preprocessor)
        if found is not None:
            _check(found)
        return found
    except _Oblong as error:
        logger.warning("%s: prepares images of %s pixels; here only square ones are prepared", source, error)
        return None
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{source}: the preprocessing beside it cannot be read: {type(error).__name__}: {error}"
        ) from error


def for_transformers(how: Preprocessing) -> dict[str, Any]:
    """transformers' preprocessor_config.json."""
    resample = next(number for number, name in _PILLOW.items() if name == how.interpolation)
    square = {"height": how.size, "width": how.size}
    cropped = how.resize != how.size
    # BiT's resizes the short side and crops; ViT's squashes an image to a square, of which DeiT's cuts a part
    kind = ("DeiT" if cropped else "ViT") if how.squash else "Bit"
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": how.resize, "width": how.resize} if how.squash else {"shortest_edge": how.resize},
        "resample": resample,
        **({} if kind == "ViT" else {"do_center_crop": True, "crop_size": square}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
        **({"crop_pct": how.size / how.resize} if cropped and not how.squash else {}),
    }


def _timm(written: Mapping[str, Any]) -> Preprocessing | None:
    if not {"input_size", "mean", "std"} <= written.keys():
        return None
    _, height, width = written["input_size"]
    size = _one(height, width)
    # a hair more, since 224 / (224 / 248) may come out below 248
    resize = math.floor(size / float(written.get("crop_pct") or 1.0) + 1e-6)
    return Preprocessing(
        size,
        resize,
        _numbers(written["mean"]),
        _numbers(written["std"]),
        str(written.get("interpolation", "bilinear")),
        written.get("crop_mode") == "squash",
    )


def _transformers(written: Mapping[str, Any]) -> Preprocessing:
    size: Any = written.get("size", 224)
    crop: Any = written.get("crop_size") if written.get("do_center_crop") else None
    by_share = crop is None and bool(written.get("crop_pct"))
    squash = False
    if by_share or (isinstance(size, Mapping) and "shortest_edge" in size):
        resize = int(size["shortest_edge"] if isinstance(size, Mapping) else size)
        cut = resize if crop is None else _side(crop)
        if by_share:
            # ConvNeXT's processor, which ResNets have: the size is the crop's, and large ones are squashed
            squash = resize >= _CONVNEXT_SQUASHES
            resize = resize if squash else int(resize / float(written["crop_pct"]))
    else:
        resize = _side(size)
        squash = True
        cut = resize if crop is None else _side(crop)
    mean, std = _moments(written)
    return Preprocessing(cut, resize, mean, std, _PILLOW[int(written.get("resample", 2))], squash)


def _moments(written: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation for values from 0 to 1."""
    if written.get("do_normalize", True):
        mean, std = _numbers(written["image_mean"]), _numbers(written["image_std"])
    else:
        channels = len(_numbers(written.get("image_mean") or (0.5,) * 3))
        mean, std = (0.0,) * channels, (1.0,) * channels
    # whites are 1 before they are normalised, unless another factor scales bytes, or none
    white = 255 * float(written.get("rescale_factor", 1 / 255)) if written.get("do_rescale", True) else 255.0
    if math.isclose(white, 1.0):
        return mean, std
    return tuple(m / white for m in mean), tuple(s / white for s in std)


class _Oblong(Exception):
    """Images that are not square."""


def _side(size: Any) -> int:
    return _one(size["height"], size["width"]) if isinstance(size, Mapping) else int(size)


def _one(height: Any, width: Any) -> int:
    if int(height) != int(width):
        raise _Oblong(f"{int(height)}x{int(width)}")
    return int(height)


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _check(how: Preprocessing) -> None:
    if not 0 < how.size <= how.resize or how.resize > 100_000:
        raise ValueError(f"a crop of {how.size} pixels from {how.resize}")
    if not how.mean or len(how.mean) != len(how.std) or not all(map(math.isfinite, how.mean + how.std)):
        raise ValueError(f"mean {how.mean} and std {how.std}")
    if min(how.std) <= 0:
        raise ValueError(f"std must be positive; got {how.std}")
    if how.interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got {how.interpolation!r}"
        )
