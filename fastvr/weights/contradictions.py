"""Where a configuration and the weights beside it are of two models: of mixed-up files, or of a file whose
last blocks are missing, which nothing else tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvr.models.registry import MODELS

# what a configuration calls a size, and what the weights' one is called here
_TRANSFORMERS = {
    "num_hidden_layers": "depth",
    "hidden_size": "embed_dim",
    "intermediate_size": "hidden",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "num_register_tokens": "reg_tokens",
    "depths": "layers",
    "embedding_size": "width",
}
_TIMM = {name: name for name in ("depth", "embed_dim", "patch_size", "in_chans", "reg_tokens", "layers")}


def contradictions(layout: str, config: Mapping[str, Any] | None, weights: Mapping[str, Any]) -> list[str]:
    """What each of both says, where that is not the same.

    Args:
        layout: whose layout the weights have.
        config: config.json; sizes that it does not say, or says as something else than numbers, agree.
        weights: the arguments of the model that the weights tell, and "hidden", the width inside its MLPs.
    """
    if config is None:
        return []
    if layout == "transformers":
        tower = config.get("vision_config", config)
        said, names = (tower if isinstance(tower, Mapping) else {}), _TRANSFORMERS
    elif layout == "timm":
        entry, written = MODELS.get(str(config.get("architecture"))), config.get("model_args")
        said = {**(entry.arguments if entry else {}), **(written if isinstance(written, Mapping) else {})}
        names = _TIMM
    else:
        return []
    found = []
    for theirs, ours in names.items():
        one, other = _numbers(said.get(theirs)), _numbers(weights.get(ours))
        sides = max(len(one), len(other))  # 16 is a patch of (16, 16)
        if one and other and _all(one, sides) != _all(other, sides):
            found.append(f"{theirs} is {said[theirs]!r}, the weights are those of {weights[ours]!r}")
    return found


def _all(numbers: tuple[int, ...], count: int) -> tuple[int, ...]:
    return numbers * count if len(numbers) == 1 else numbers


def _numbers(value: Any) -> tuple[int, ...]:
    """The numbers in ``value``, a number or several of them; none where it is something else."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values if all(type(v) is int for v in values) else ()
