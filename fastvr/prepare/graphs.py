"""CUDA graphs of one model for several batch sizes, on one set of buffers."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastvr import backend
from fastvr.ops import _check

_WARM_UP = 3  # runs before a capture, as PyTorch's notes on CUDA graphs have it


class Graphs:
    """The launches of a forward pass for each batch size, to be replayed.

    The graphs share their memory pool and the buffer for images: only one of them runs at a time, and what it
    gives is copied out before the next.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor, batch_sizes: Iterable[int]) -> None:
        sizes = sorted(set(batch_sizes), reverse=True)
        self._context = context(example.device)
        self._lock = threading.Lock()
        self._x = images_like(example, sizes[0])
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}
        with torch.cuda.device(example.device):
            pool: Any = None
            # the largest first: the others then find room in what it allocated
            for size in sizes:
                x = self._x[:size]
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UP):
                        model(x)
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                # other threads (those that load data) may go on calling CUDA meanwhile
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    y = model(x)
                self._graphs[size] = graph, y
                pool = graph.pool()
            self._done = torch.cuda.Event()
            self._done.record()

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return tuple(sorted(self._graphs))

    def takes(self, x: torch.Tensor) -> bool:
        """Whether there is a graph for ``x``, and what it holds is what would run now."""
        like = self._x
        return (
            isinstance(x, torch.Tensor)
            and x.dim() == like.dim()
            and x.shape[0] in self._graphs
            and x.shape[1:] == like.shape[1:]
            and x.dtype == like.dtype
            and x.device == like.device
            and not torch.cuda.is_current_stream_capturing()
            and context(x.device) == self._context
        )

    def replay(self, x: torch.Tensor) -> Any:
        with self._lock, torch.cuda.device(x.device):
            # the last call may have been on another stream
            self._done.wait()
            graph, y = self._graphs[x.shape[0]]
            self._x[: x.shape[0]].copy_(x)
            graph.replay()
            result = [one.clone() for one in y] if isinstance(y, list) else y.clone()
            self._done.record()
        return result


def layout_of(images: torch.Tensor) -> torch.memory_format:
    """channels_last where ``images`` are that alone."""
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def images_like(example: torch.Tensor, batch: int) -> torch.Tensor:
    """Zeros like ``example``, in its layout, ``batch`` of them."""
    images = torch.empty(
        (batch, *example.shape[1:]),
        dtype=example.dtype,
        device=example.device,
        memory_format=layout_of(example),
    )
    return images.zero_()


def context(device: torch.device) -> tuple[object, ...]:
    """What decides, beside the weights, which launches a forward pass makes."""
    backends: Any = torch.backends  # its stubs lack the newer switches
    tf32 = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
    return backend.current_backend(), _check.autocast_dtype(device), tf32
