"""What ``prepare`` does on a CPU: weights laid out for oneDNN's fused calls where those are faster here.

PyTorch's convolution is oneDNN's as well, so the fused one is the same with fewer passes over memory. Its
matrix product is another library's, and which is faster depends on the CPU more than on anything else: on an
AMD CPU with AVX-512 oneDNN's was seen to be more than twice as fast, on one with AVX2 alone a sixth slower.
Whether Winograd's form of a 3x3 convolution wins depends on how its products and its additions compare.
So each shape of those is measured, once, in a forward pass while the model is prepared.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from fastvr import backend
from fastvr.nn.conv_bn_relu import plain_conv
from fastvr.nn.plain import plain
from fastvr.nn.residual import BasicBlock, Bottleneck
from fastvr.ops import _mkldnn, _winograd, conv_bn_relu, linear
from fastvr.ops._op import Op
from fastvr.prepare.graphs import layout_of
from fastvr.reference.linear import GELU
from fastvr.testing import GELU_TAIL, measure_parity

logger = logging.getLogger("fastvr")

# of one call: rounds at least and at most, and the time after which no new one begins
_LEAST_ROUNDS, _ROUNDS, _SECONDS = 3, 9, 0.05

# the share of PyTorch's time that a call may take at most: it must earn the memory of the second layout
_SHARE = 0.97


def pack_weights(model: nn.Module, example: torch.Tensor) -> None:
    """Lay out the weights of ``model`` on a CPU where the vendor's fused call is the faster one.

    Runs the model once on random images like ``example``. A call that breaks the parity rule there does not
    win; of matrix products each shape, dtype and epilogue is measured against PyTorch's own operators.
    Nothing happens where the mode is not "auto", without oneDNN, or in a dtype that it would emulate.

    A weight that was laid out is kept beside the dense one, which every other way to run the model reads.
    """
    weights = {id(p): p for p in model.parameters()}
    dtypes = {p.dtype for p in weights.values()}
    if backend.current_backend() != "auto" or not example.numel() or not all(map(_mkldnn.supports, dtypes)):
        return
    generator = torch.Generator().manual_seed(0)
    if example.is_floating_point():
        images = torch.randn(example.shape, generator=generator).to(example.dtype)
    else:
        images = torch.randint(0, 256, example.shape, generator=generator, dtype=example.dtype)
    with _mkldnn.packing(_Packer(weights)), torch.no_grad():
        model(images.contiguous(memory_format=layout_of(example)))
    _write_onto_residuals(model)


def _write_onto_residuals(model: nn.Module) -> None:
    """Let the last convolution of a residual block write over its residual, which nobody reads again."""
    for block in model.modules():
        if plain(block, Bottleneck):
            last = block.conv3
        elif plain(block, BasicBlock):
            last = block.conv2
        else:
            continue
        shortcut = block.downsample
        if plain_conv(last) and (shortcut is None or plain(shortcut, nn.Sequential)):
            packed = _mkldnn.kept(last.weight)
            if isinstance(packed, _mkldnn.Packed):
                _mkldnn.keep(last.weight, dataclasses.replace(packed, onto_residual=True))


class _Packer:
    """Packs the weights that it owns, as ops meet them."""

    def __init__(self, weights: dict[int, nn.Parameter]) -> None:
        self._weights = weights
        # by call, which of its candidates is to be taken; None is PyTorch itself
        self._chosen: dict[Hashable, int | None] = {}

    def __call__(self, op: str, args: tuple[Any, ...]) -> None:
        if op == "linear":
            self._linear(linear.Arguments(*args))
        elif op == "conv_bn_relu":
            self._convolution(conv_bn_relu.Arguments(*args))

    def _wanted(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        owned = id(weight) in self._weights and _mkldnn.kept(weight) is None
        return owned and x.numel() > 0 and weight.numel() > 0

    def _linear(self, a: linear.Arguments) -> None:
        if not self._wanted(a.x, a.weight):
            return
        packed = _mkldnn.pack_linear(a.weight, a.x.numel() // a.x.shape[-1])
        candidates = [packed]
        if a.act in GELU:
            candidates.append(dataclasses.replace(packed, gelu=False))
        floor: float | torch.Tensor = GELU_TAIL if a.act == "gelu" else 0.0
        if a.gamma is not None:
            floor = floor * a.gamma.abs().double()

        def choose() -> int | None:
            right = [
                i for i, c in enumerate(candidates) if _holds_parity(linear.LINEAR, a, _multiply, c, floor)
            ]
            calls = [functools.partial(linear.LINEAR.reference, *a)]
            calls += [functools.partial(_multiply, a, candidates[i]) for i in right]
            return [None, *right][_fastest(calls)]

        self._keep("linear", a, candidates, choose)

    def _convolution(self, a: conv_bn_relu.Arguments) -> None:
        if not self._wanted(a.x, a.weight) or a.running_mean is not None:
            return
        geometry = a.stride, a.padding, a.groups
        candidates: list[_mkldnn.AnyPacked] = [
            _mkldnn.pack_convolution(a.weight, a.bn_weight, a.bn_bias, *geometry, a.x.shape)
        ]
        if _winograd.takes(a.weight, a.stride, a.groups):
            candidates.append(_winograd.pack(a.weight, a.bn_weight, a.bn_bias))

        def choose() -> int | None:
            right = [
                i
                for i, c in enumerate(candidates)
                if _holds_parity(conv_bn_relu.CONV_BN_RELU, a, conv_bn_relu.run_packed, c, 0.0)
            ]
            if len(right) < 2:
                return right[0] if right else None
            return right[
                _fastest([functools.partial(conv_bn_relu.run_packed, a, candidates[i]) for i in right])
            ]

        self._keep("conv_bn_relu", a, candidates, choose)

    def _keep(
        self, op: str, a: Any, candidates: Sequence[_mkldnn.AnyPacked], choose: Callable[[], int | None]
    ) -> None:
        key = (op, *(_kind(value) for value in a))
        if key not in self._chosen:
            self._chosen[key] = choose()
        chosen = self._chosen[key]
        packed = None if chosen is None else candidates[chosen]
        logger.debug("prepare: %s runs in %s", key, "PyTorch" if packed is None else packed.name)
        if packed is not None:
            _mkldnn.keep(a.weight, packed)


def _multiply(a: linear.Arguments, packed: _mkldnn.Packed) -> torch.Tensor:
    return _mkldnn.linear(a.x, packed, a.bias, a.gamma, a.residual, a.act)


def _kind(value: object) -> Hashable:
    """What of an argument decides how fast a call is."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _holds_parity(
    op: Op[torch.Tensor],
    a: Any,
    run: Callable[[Any, Any], torch.Tensor],
    packed: Any,
    floor: float | torch.Tensor,
) -> bool:
    """Whether the first sample comes out within the parity rule; float64 would take long for all of them."""
    first = a._replace(x=a.x[:1], residual=None if a.residual is None else a.residual[:1])
    exact = [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in first]
    report = measure_parity(
        run(first, packed), op.reference(*first), op.reference(*exact), absolute_floor=floor
    )
    if not report.passed:
        logger.info("prepare: %s's %s is not used: %s", packed.name, op.name, report.verdict)
    return report.passed


def _fastest(calls: Sequence[Callable[[], object]]) -> int:
    """The index of the call whose shortest run is the shortest; 0 unless one takes ``_SHARE`` of its time."""
    for call in calls:
        call()
    best, end = [math.inf] * len(calls), time.perf_counter() + _SECONDS
    for done in range(_ROUNDS):
        if done >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    best[0] *= _SHARE
    return best.index(min(best))
