"""A snapshot of a model for inference: weights prepared once, launches captured in a CUDA graph."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

import torch
from torch import nn

from fastvr import backend
from fastvr.models._model import Model
from fastvr.models.resnet import ResNet
from fastvr.nn.conv_bn_relu import ScaleShift
from fastvr.nn.plain import has_hooks
from fastvr.ops import _check

_WARM_UP = 3  # runs before the capture, as PyTorch's notes on CUDA graphs have it


def prepare(model: Model, example: torch.Tensor) -> PreparedModel:
    """Prepare ``model`` for inference on images like ``example``.

    Args:
        model: a ViT or ResNet in eval mode. It stays as it is, and its weights are copied.
        example: images as the model takes them; their values do not matter. On a GPU a CUDA graph is captured
            for their shape; other shapes work too, without a graph.

    Returns:
        A callable that gives what ``model(x)`` gives, within the parity rule.

    Raises:
        ValueError: ``model`` is no ViT or ResNet, is in training mode or has hooks; ``example`` does not fit.
    """
    return PreparedModel(model, example)


class PreparedModel:
    """What :func:`prepare` returns: a model's function, with the weights that it had.

    No gradient flows. What a call returns belongs to the caller: no later call changes it. Any thread and any
    stream may call; calls that replay the graph run one after the other, since they share its buffers.

    It goes stale when its source changes by ``train()``, ``load_state_dict``, ``load_checkpoint``, ``to()``
    and the like, or ``reset_classifier``: then a call raises RuntimeError, until :meth:`refresh` takes the
    new weights. Who writes into parameters, or changes one submodule, by hand calls :meth:`refresh`
    afterwards. The source is not kept alive; without it the snapshot stays as it is.

    The graph holds the implementations that ran when it was captured: under another ``use_backend`` or
    another autocast the call takes the plain way.
    """

    def __init__(self, model: Model, example: torch.Tensor) -> None:
        if not isinstance(model, Model):
            raise ValueError(f"prepare: model must be a ViT or ResNet; got {type(model).__name__}")
        if not isinstance(example, torch.Tensor):
            raise ValueError(f"prepare: example must be a torch.Tensor; got {type(example).__name__}")
        self._source = weakref.ref(model)
        self._example = torch.empty_like(example, device="meta")
        self._lock = threading.Lock()
        self._prepare(model, example.device, example.dtype)

    def _prepare(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        generation = model.generation
        # tensors made in inference mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            snapshot = _snapshot(model)
            example = torch.zeros_like(self._example, device=device, dtype=dtype)
            # a wrong example ends here, before anything is kept
            snapshot(example)
            graph = _Graph(snapshot, example) if device.type == "cuda" and example.numel() else None
        self._snapshot, self._graph, self._generation = snapshot, graph, generation

    @property
    def captured(self) -> bool:
        """Whether there is a CUDA graph for the example's shape."""
        return self._graph is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What the model gave for ``x`` when it was prepared.

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
        graph = self._graph
        with torch.no_grad():
            if graph is not None and graph.takes(x):
                with self._lock:
                    return graph.replay(x)
            y: torch.Tensor = self._snapshot(x)
            return y

    def refresh(self) -> None:
        """Take the source's weights, device and dtype as they are now, and capture anew.

        Raises:
            RuntimeError: the source is gone.
            ValueError: the source is in training mode or has hooks. The snapshot stays as it was.
        """
        source = self._source()
        if source is None:
            raise RuntimeError("PreparedModel: the model that it was prepared from is gone")
        like = next(source.parameters())
        with self._lock:
            self._prepare(source, like.device, like.dtype)

    def __repr__(self) -> str:
        shape, how = list(self._example.shape), "CUDA graph" if self.captured else "no graph"
        return f"PreparedModel({type(self._snapshot).__name__}, {shape}, {how})"


def _snapshot(model: Model) -> Model:
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "model"
        if module.training:
            raise ValueError(f"prepare: {where} must be in eval mode; got training mode: call model.eval()")
        if has_hooks(module):
            raise ValueError(f"prepare: {where} must have no hooks, since a CUDA graph would not call them")
    snapshot = copy.deepcopy(model).requires_grad_(False)
    layout = torch.channels_last if isinstance(model, ResNet) else torch.contiguous_format
    snapshot.to(memory_format=layout)
    for parent in list(snapshot.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d and child.running_mean is not None:
                setattr(parent, name, ScaleShift(child).eval())
    return snapshot


class _Graph:
    """The launches of one forward pass on one shape, to be replayed."""

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        self._context = _context(example.device)
        self._x = example
        with torch.cuda.device(example.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    model(self._x)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # other threads (those that load data) may go on calling CUDA meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._y: torch.Tensor = model(self._x)
            self._done = torch.cuda.Event()
            self._done.record()

    def takes(self, x: torch.Tensor) -> bool:
        like = self._x
        return (
            isinstance(x, torch.Tensor)
            and x.shape == like.shape
            and x.dtype == like.dtype
            and x.device == like.device
            and not torch.cuda.is_current_stream_capturing()
            and _context(x.device) == self._context
        )

    def replay(self, x: torch.Tensor) -> torch.Tensor:
        with torch.cuda.device(x.device):
            # the last call may have been on another stream
            self._done.wait()
            self._x.copy_(x)
            self._graph.replay()
            y = self._y.clone()
            self._done.record()
        return y


def _context(device: torch.device) -> tuple[object, ...]:
    """What decides, beside the weights, which launches a forward pass makes."""
    backends: Any = torch.backends  # its stubs lack the newer switches
    tf32 = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
    return backend.current_backend(), _check.autocast_dtype(device), tf32
