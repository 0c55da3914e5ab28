"""What ``prepare`` returns: a model's function with the weights that it had."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch

from fastvr import backend
from fastvr.models._model import Model
from fastvr.models.features import Backbone
from fastvr.models.vit import ViT
from fastvr.ops.cpu.magnitude import without_marks
from fastvr.ops.cpu.prepared_pass import running
from fastvr.prepare.cpu import fastest_parts, is_known, pack_weights
from fastvr.prepare.folded import folded_if_faster
from fastvr.prepare.graphs import Graphs, layout_of
from fastvr.prepare.measured import measure_unknown
from fastvr.prepare.snapshot import snapshot_of

Tune = Literal["quick", False]


def prepare(
    model: Model | Backbone,
    example: torch.Tensor,
    *,
    batch_sizes: Sequence[int] | None = None,
    tune: Tune = "quick",
) -> PreparedModel:
    """Prepare ``model`` for inference on images like ``example``.

    Args:
        model: a ViT or ResNet, or a :class:`Backbone` of one, in eval mode. It stays as it is, and its
            weights are copied.
        example: images as the model takes them, floating or uint8; their values do not matter, their layout
            is the one that is fastest afterwards.
        batch_sizes: on a GPU, the batch sizes for which a CUDA graph is captured; None is the example's.
            Other batch sizes and image sizes work too, without a graph.
        tune: on a GPU, "quick" measures what each shape runs fastest with where no table says so: about 20 s
            at most, once, since what it finds is kept in the user's table. No other thread may call fastvr's
            ops meanwhile. False measures nothing.

    Returns:
        A callable that gives what ``model(x)`` gives, within the parity rule.

    Raises:
        ValueError: ``model`` is none of these, is in training mode or has hooks; ``example`` does not fit;
            ``batch_sizes`` are not positive integers; ``tune`` is neither "quick" nor False.
    """
    return PreparedModel(model, example, batch_sizes=batch_sizes, tune=tune)


class PreparedModel:
    """What :func:`prepare` returns: a model's function, with the weights that it had.

    No gradient flows. What a call returns belongs to the caller: no later call changes it. Any thread and any
    stream may call; calls that replay a graph run one after the other, since the graphs share their buffers.

    It goes stale when its source changes by ``train()``, ``load_state_dict``, ``load_checkpoint``, ``to()``
    and the like, ``reset_classifier`` or ``normalize_images``: then a call raises RuntimeError, until
    :meth:`refresh` takes the new weights. Who writes into parameters, or changes one submodule, by hand calls
    :meth:`refresh` afterwards. The source is not kept alive; without it the snapshot stays as it is.

    Copies share what was prepared, which nothing writes to, and refresh by themselves; one that is copied
    together with its source belongs to the source's copy. It cannot be pickled: prepare where it is to run.

    The graphs hold the implementations that ran when they were captured: under another ``use_backend`` or
    another autocast the call takes the plain way.
    """

    def __init__(
        self,
        model: Model | Backbone,
        example: torch.Tensor,
        *,
        batch_sizes: Sequence[int] | None = None,
        tune: Tune = "quick",
    ) -> None:
        if not isinstance(model, (Model, Backbone)):
            raise ValueError(
                f"prepare: model must be a ViT or ResNet of fastvr's; got {type(model).__name__}"
            )
        if not isinstance(example, torch.Tensor):
            raise ValueError(f"prepare: example must be a torch.Tensor; got {type(example).__name__}")
        if tune not in ("quick", False):
            raise ValueError(f'prepare: tune must be "quick" or False; got {tune!r}')
        self._source = weakref.ref(model)
        self._name = type(model).__name__
        self._batch_sizes = _sizes(batch_sizes, example)
        self._tune = tune
        self._lock = threading.Lock()
        self._prepare(model, torch.empty_like(example, device="meta"), example.device, example.dtype)

    def _prepare(
        self, model: Model | Backbone, like: torch.Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        generation = model.generation
        # tensors made in inference mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            example = torch.zeros_like(like, device=device, dtype=dtype)
            plain = snapshot_of(model)
            if self._tune:
                measure_unknown(plain, example, self._batch_sizes)
            snapshot = folded_if_faster(plain, example)
            # a wrong example ends here, before anything is kept
            snapshot(example)
            on_cpu = device.type == "cpu"
            unobserved = on_cpu and is_known(snapshot)
            chosen = pack_weights(snapshot, example) if on_cpu else frozenset()
            parts = fastest_parts(snapshot, example, chosen) if unobserved else None
            wanted = device.type == "cuda" and self._batch_sizes
            graphs = Graphs(snapshot, example, self._batch_sizes) if wanted else None
        self._snapshot, self._graphs, self._generation = snapshot, graphs, generation
        self._chosen, self._parts, self._unobserved = chosen, parts, unobserved
        self._example = like

    @property
    def captured(self) -> bool:
        """Whether there are CUDA graphs."""
        return self._graphs is not None

    def __call__(self, x: torch.Tensor) -> Any:
        """What the model gave for ``x`` when it was prepared; of a backbone a list of maps.

        Raises:
            RuntimeError: the source changed since.
            ValueError: ``x`` is not what the model takes.
        """
        source = self._source()
        if source is not None and source.generation != self._generation:
            raise RuntimeError(
                f"PreparedModel: its {type(source).__name__} changed after prepare() "
                "(train, load_state_dict, to, ...): call refresh()"
            )
        graphs = self._graphs
        with torch.no_grad():
            if graphs is not None and graphs.takes(x):
                return graphs.replay(x)
            if (
                self._unobserved
                and type(x) is torch.Tensor
                and x.device.type == "cpu"
                and backend.current_backend() == "auto"
                and not torch.is_autocast_enabled("cpu")
                and not torch.compiler.is_compiling()
            ):
                with running(x, self._chosen, self._parts):
                    return without_marks(self._snapshot(x))
            return self._snapshot(x)

    def refresh(self) -> None:
        """Take the source's weights, device, dtype and image size as they are now, and capture anew.

        Raises:
            RuntimeError: the source is gone.
            ValueError: the source is in training mode or has hooks. The snapshot stays as it was.
        """
        source = self._source()
        if source is None:
            raise RuntimeError("PreparedModel: the model that it was prepared from is gone")
        like = next(source.parameters())
        with self._lock:
            example = self._example
            dtype = like.dtype if example.is_floating_point() else example.dtype
            if (size := _fixed_size(source)) is not None and example.shape[2:] != size:
                shape = *example.shape[:2], *size
                layout = layout_of(example)
                example = torch.empty(shape, dtype=example.dtype, device="meta", memory_format=layout)
            self._prepare(source, example, like.device, dtype)

    def __copy__(self) -> PreparedModel:
        other = object.__new__(type(self))
        other.__dict__ = {**self.__dict__, "_lock": threading.Lock()}
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedModel:
        other = self.__copy__()
        source = self._source()
        if source is not None and id(source) in memo:
            other._source = weakref.ref(memo[id(source)])
        return other

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError(
            "PreparedModel: cannot be pickled: pickle the model, and call prepare() where it is to run"
        )

    def __repr__(self) -> str:
        sizes = "" if self._graphs is None else ", ".join(map(str, self._graphs.batch_sizes))
        how = f"CUDA graphs for batches of {sizes}" if sizes else "no graph"
        return f"PreparedModel({self._name}, {list(self._example.shape)}, {how})"


def _fixed_size(source: Model | Backbone) -> tuple[int, int] | None:
    """Height and width of the images, where it takes no others."""
    model = source.model if isinstance(source, Backbone) else source
    return model.img_size if isinstance(model, ViT) and not model.dynamic_img_size else None


def _sizes(batch_sizes: Sequence[int] | None, example: torch.Tensor) -> tuple[int, ...]:
    if batch_sizes is None:
        return (example.shape[0],) if example.dim() and example.numel() else ()
    sizes = tuple(batch_sizes) if isinstance(batch_sizes, Sequence) else (batch_sizes,)
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"prepare: batch_sizes must be positive integers; got {batch_sizes!r}")
    return sizes
