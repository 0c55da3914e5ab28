"""What a run writes down to be gone on with, whole or not at all, and the weights that it leaves.

One process, or several under DDP: ``checkpoint.pt``, read with ``weights_only=True``. Under FSDP:
``checkpoint-<step>/``, the parts of each process by torch.distributed.checkpoint (which unpickles what it
wrote: resume a sharded run from folders of your own only) and ``run.pt`` with the rest.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim.swa_utils import AveragedModel

from fastvr.compare import UsageError
from fastvr.train.distributed import World
from fastvr.tuning.table import replacing, sync_folder
from fastvr.weights.read import read_file

FORMAT = 1
WEIGHTS, CONFIG, CARD, LOSSES, CURVE = LEAVES = (
    "model.safetensors",
    "config.json",
    "model.json",
    "losses.csv",
    "curve.png",
)
_FILE = "checkpoint.pt"
_FOLDER = re.compile(r"checkpoint-(\d+)")
_REST = "run.pt"


@dataclass(frozen=True)
class Parts:
    """What of a run holds tensors."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: AveragedModel | None

    def broken(self) -> bool:
        """Whether a weight or a running statistic of this process is NaN or infinite."""
        tensors = [t for t in (*self.model.parameters(), *self.model.buffers()) if t.is_floating_point()]
        finite = [torch.isfinite(_local(t.detach())).all() for t in tensors]
        return not bool(torch.stack(finite).all())


def _local(tensor: Tensor) -> Tensor:
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def holds_run(out: Path) -> bool:
    """Whether ``out`` has anything that a run would write over."""
    return any((out / name).exists() for name in (_FILE, *LEAVES)) or _newest(out) is not None


def _newest(out: Path) -> Path | None:
    found = [(int(match[1]), path) for path in out.glob("checkpoint-*") if (match := _named(path))]
    return max(found)[1] if found else None


def _named(path: Path) -> re.Match[str] | None:
    return _FOLDER.fullmatch(path.name)


def read(out: Path) -> dict[str, Any] | None:
    """The last checkpoint in ``out``, without what is sharded; None where there is none.

    Raises:
        UsageError: it cannot be read, or is of another version.
    """
    folder = _newest(out)
    path = out / _FILE if folder is None else folder / _REST
    if not path.exists():
        return None
    try:
        found = read_file(path)
    except ValueError as error:
        raise UsageError(f"--resume: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f"--resume: {path} is not a checkpoint of this version of fastvr train")
    return found


def save(out: Path, step: int, parts: Parts, rest: Mapping[str, Any], world: World, *, sharded: bool) -> None:
    """Replace the last checkpoint; called by all processes. ``rest`` is the first one's."""
    content = {"format": FORMAT, "step": step, **rest}
    if sharded:
        _save_sharded(out, step, parts, content, world)
    elif world.first:
        with replacing(out / _FILE) as file:
            _write(content | _whole(parts), file)


def _write(content: Mapping[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # of a full disk PyTorch says at which byte it stood
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def restore(out: Path, found: Mapping[str, Any], parts: Parts) -> None:
    """Bring ``parts`` to where ``found``, which :func:`read` gave, was written."""
    if "model" not in found:
        _restore_sharded(out, parts, stepped=found["stepped"])
        return
    parts.model.load_state_dict(found["model"])
    parts.optimizer.load_state_dict(found["optimizer"])
    if parts.ema is not None:
        parts.ema.load_state_dict(found["ema"])


def _whole(parts: Parts) -> dict[str, Any]:
    return {
        "model": parts.model.state_dict(),
        "optimizer": parts.optimizer.state_dict(),
        "ema": None if parts.ema is None else parts.ema.state_dict(),
    }


def _shards(parts: Parts, stepped: bool) -> dict[str, Any]:
    state: dict[str, Any] = {}
    if stepped:
        state["model"], state["optimizer"] = get_state_dict(parts.model, parts.optimizer)
    else:
        # get_state_dict would fill the optimizer's state by a step, which Adam counts
        state["model"] = get_model_state_dict(parts.model)
    if parts.ema is not None:
        state |= {"ema": get_model_state_dict(parts.ema.module), "averaged": parts.ema.n_averaged}
    return state


def _save_sharded(out: Path, step: int, parts: Parts, content: dict[str, Any], world: World) -> None:
    ready, target = out / f".checkpoint-{step}.tmp", out / f"checkpoint-{step}"
    stepped = bool(parts.optimizer.state)
    if world.first:
        shutil.rmtree(ready, ignore_errors=True)
    world.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of PyTorch's own use of what it deprecates
        state_dict_saver.save(_shards(parts, stepped), checkpoint_id=ready)
    if world.first:
        with replacing(ready / _REST) as file:
            _write(content | {"stepped": stepped}, file)
        if target.exists():  # the same step, written again after a resume
            shutil.rmtree(target)
        os.rename(ready, target)
        sync_folder(out)
        for path in out.glob("checkpoint-*"):
            if _named(path) and path != target:
                shutil.rmtree(path, ignore_errors=True)
    world.barrier()


def _restore_sharded(out: Path, parts: Parts, stepped: bool) -> None:
    state = _shards(parts, stepped)
    # tensors are filled in place
    state_dict_loader.load(state, checkpoint_id=_newest(out))
    if stepped:
        set_state_dict(
            parts.model,
            parts.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    if parts.ema is not None:
        parts.ema.n_averaged.copy_(state["averaged"])


def clear_unfinished(out: Path) -> None:
    """Remove what a killed process was writing."""
    for path in out.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for name in (_FILE, *LEAVES):
        for path in out.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


def weights(model: nn.Module, *, sharded: bool) -> dict[str, Tensor]:
    """All of the model's weights on the CPU, as safetensors takes them; called by all processes, complete in
    the first."""
    if sharded:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Mapping[str, Any] = get_model_state_dict(model, options=options)
    else:
        state = model.state_dict()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
