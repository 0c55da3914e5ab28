"""Files to state dicts. A file is data: nothing in it is executed, and what it claims is checked."""

from __future__ import annotations

import collections
import json
import os
import pickle
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvr.weights.errors import CheckpointError

METADATA_KEY = "fastvr"
"""Under which ``save_model`` writes the configuration into a safetensors file."""
PREPROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""Where transformers writes how images are prepared: the former, from 5 on, for a model of text as well."""
_MAX_HEADER = 100_000_000  # bytes; the limit that safetensors itself sets
# self-distillation (DINO) evaluates its teacher; where there is a model beside it, that is what was trained
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "teacher",
    "student",
)
# of wrappers, and of the models that people put one of these into
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_BACKBONE = "backbone."
# beside it, what DINO and DINOv2 trained it with and throw away
_PROJECTIONS = ("head.mlp.", "head.last_layer.", "dino_head.", "ibot_head.")
_NUMBER = re.compile(r"(?<=[._])\d+(?=\.)")
_MAX_JSON = 10_000_000  # bytes of a config.json or an index; real ones have some hundred thousand
# what a folder is searched for, in this order
_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class Checkpoint(NamedTuple):
    """Weights, and what lies beside them."""

    source: str
    state: dict[str, torch.Tensor]
    config: dict[str, Any] | None = None
    """config.json, as timm and transformers write it; in a single file what fastvr wrote into it."""
    preprocessor: dict[str, Any] | None = None
    """transformers' preprocessor_config.json, or what processor_config.json says of images."""


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file, or a folder as Hugging Face's hub has them.

    Args:
        path: a ``.safetensors`` or PyTorch file, the index of sharded ones, or a folder that holds one of
            these as ``model.safetensors`` or ``pytorch_model.bin``. The configuration is read where the
            weights have such a name, else the one inside a safetensors file that fastvr wrote.

    Raises:
        FileNotFoundError: there is no such file or folder.
        CheckpointError: it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in _IN_FOLDERS if (path / name).exists()), None)
        if found is None:
            raise CheckpointError(
                f"{path}: is a directory without a checkpoint; looked for {', '.join(_IN_FOLDERS)}"
            )
        path = found
    loaded = _read_shards(path) if path.name.endswith(".index.json") else read_file(path)
    state = unwrap(loaded, str(path))
    config = preprocessor = None
    if path.name in _IN_FOLDERS:
        config = read_json(path.with_name("config.json"))
        preprocessor = _preprocessor(path.parent)
    if config is None and path.suffix == ".safetensors":
        config = _own_config(path)
    return Checkpoint(str(path), state, config, preprocessor)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file.

    Raises:
        CheckpointError: it holds something else.
    """
    if not path.exists():
        return None
    if (size := path.stat().st_size) > _MAX_JSON:
        raise CheckpointError(f"{path}: {size} bytes are too many for a configuration")
    try:
        return _object(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _preprocessor(folder: Path) -> dict[str, Any] | None:
    of_both, of_images = (read_json(folder / name) for name in PREPROCESSORS)
    nested = None if of_both is None else of_both.get("image_processor")
    return nested if isinstance(nested, dict) else of_images


def _object(text: str | bytes, source: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: is no JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{source}: holds a {type(found).__name__}, not an object")
    return found


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    listed = read_json(index)
    if listed is None:
        raise FileNotFoundError(f"{index}: no such checkpoint")
    files = listed.get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
        raise CheckpointError(f"{index}: weight_map must name a file for each weight")
    names = sorted(set(files.values()))
    # an index is data as well: it names files beside it, and no others
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index}: names files in other folders: {shorten(outside)}")
    if absent := [name for name in names if not os.path.isfile(index.parent / name)]:
        raise CheckpointError(f"{index}: lacks files: {shorten(absent)}")
    state: dict[str, torch.Tensor] = {}
    for name in names:
        # with the prefixes that the index has too
        shard = _named_tensors(read_file(index.parent / name), str(index.parent / name))
        if strange := sorted(key for key in shard if files.get(key) != name):
            raise CheckpointError(f"{index}: {name} holds what it should not: {shorten(strange)}")
        state |= shard
    if absent := [key for key in files if key not in state]:
        raise CheckpointError(f"{index}: the files lack {shorten(absent)}")
    return state


def _own_config(path: Path) -> dict[str, Any] | None:
    metadata = _check_header(path).get("__metadata__")
    written = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    return None if written is None else _object(str(written), f"{path}: {METADATA_KEY} in its metadata")


def read_file(path: str | os.PathLike[str]) -> Any:
    """What a ``.safetensors`` or a PyTorch file (``weights_only=True``) holds, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory, not a checkpoint")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            _check_header(path)
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        _check_sizes(path, loaded)
        return loaded
    except (CheckpointError, OSError, MemoryError):
        raise
    except Exception as error:
        if code := _code_in(path, error):
            raise CheckpointError(
                f"{path}: refused, since reading it would run code: it holds {shorten(code)} where a "
                "checkpoint holds tensors. If you trust it, read it yourself with "
                "torch.load(path, weights_only=False), and pass its state dict"
            ) from error
        # both readers raise errors of many kinds, some bare, where a file is not theirs
        how = "safetensors" if path.suffix == ".safetensors" else "torch.load(weights_only=True)"
        # what PyTorch says after its first sentence is how to run the file's code all the same
        summary = f"{type(error).__name__}: {error}".partition(". ")[0].strip()[:400]
        message = f"{path}: {how} cannot read it; is it truncated or foreign? {summary}"
        raise CheckpointError(message) from error


def _check_sizes(path: Path, loaded: Any) -> None:
    """A tensor whose strides are 0 may claim more memory than there is, in a file of a kilobyte."""
    size = path.stat().st_size
    large = [
        f"{key} {list(tensor.shape)}"
        for key, tensor in _tensors(loaded)
        if tensor.layout == torch.strided and tensor.numel() * tensor.element_size() > size
    ]
    if large:
        raise CheckpointError(f"{path}: {size} bytes cannot hold {shorten(large)}")


def _tensors(loaded: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(loaded, torch.Tensor):
        yield name, loaded
    elif isinstance(loaded, Mapping):
        for key, value in loaded.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _code_in(path: Path, error: Exception) -> list[str]:
    """The classes and functions that unpickling ``path`` would call, read without doing so; none where
    something else is wrong with it."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        # not a file of torch.save, or a broken one
        return []


def _check_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, after what the reader would let pass: a key that occurs twice, of
    which it would take the last."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise CheckpointError(f"{path}: {size} bytes are too few for safetensors; is it truncated?")
        (length,) = struct.unpack("<Q", start)
        if length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path}: claims a header of {length} bytes in a file of {size}; is it truncated or foreign?"
            )
        header = file.read(length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = collections.Counter(key for key, _ in pairs)
        if twice := [key for key, count in counts.items() if count > 1]:
            raise CheckpointError(f"{path}: has keys twice: {shorten(twice)}")
        return dict(pairs)

    try:
        found: dict[str, Any] = json.loads(header, object_pairs_hook=unique)
    except RecursionError as error:
        raise CheckpointError(f"{path}: its header is nested too deeply") from error
    return found


def unwrap(loaded: Any, source: str) -> dict[str, torch.Tensor]:
    """The state dict inside ``loaded``: out of wrappers ({"model": ...}; moving averages first, as timm has
    it), without the prefixes that all its names have (of ``DataParallel``, ``torch.compile``, Lightning), and
    of DINO's networks the backbone.

    Raises:
        CheckpointError: there is none, or it holds something else than named tensors.
    """
    state = _named_tensors(loaded, source)
    if len(state) > 1:
        # beside the weights that torch.optim.swa_utils.AveragedModel holds
        state.pop("n_averaged", None)
    while True:
        while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
            state = {key[len(prefix) :]: tensor for key, tensor in state.items()}
        backbone = {key: tensor for key, tensor in state.items() if not key.startswith(_PROJECTIONS)}
        if len(backbone) in (0, len(state)) or not all(key.startswith(_BACKBONE) for key in backbone):
            return state
        state = backbone


def _named_tensors(loaded: Any, source: str) -> dict[str, torch.Tensor]:
    for _ in range(len(_WRAPPERS)):
        if not isinstance(loaded, Mapping):
            break
        inner = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded:
        kind = "is empty" if isinstance(loaded, Mapping) else f"holds a {type(loaded).__name__}"
        raise CheckpointError(f"{source}: {kind}, not a state dict")
    if wrong := [f"{key!r} ({type(t).__name__})" for key, t in loaded.items() if not _named_tensor(key, t)]:
        raise CheckpointError(f"{source}: holds more than named tensors: {shorten(wrong)}")
    return dict(loaded)


def _named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether it holds its values one by one: it is not sparse, quantised, two in a byte, or on meta."""
    packed = tensor.is_quantized or tensor.dtype == torch.float4_e2m1fn_x2
    return tensor.layout == torch.strided and not packed and not tensor.is_meta


def shorten(items: list[str], most: int = 10) -> str:
    """The first items, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def grouped(names: Iterable[str]) -> list[str]:
    """The names, those that differ in their block's number alone as one: ``blocks.{0-11}.norm1.bias``."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        match = _NUMBER.search(name)
        pattern = name if match is None else f"{name[: match.start()]}\0{name[match.end() :]}"
        numbers.setdefault(pattern, []).extend([] if match is None else [int(match[0])])
    return [pattern.replace("\0", _ranges(sorted(found))) for pattern, found in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    """ "3", "{0-11}", "{0,2-4}"; ``numbers`` ascend."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return texts[0] if len(numbers) == 1 else f"{{{','.join(texts)}}}"
