"""What ``prepare`` does on a CPU: weights laid out for oneDNN's fused calls where those are faster here.

PyTorch's convolution is oneDNN's as well, so the fused one is the same with fewer passes over memory. Its
matrix product is another library's, and which is faster depends on the CPU more than on anything else: on an
AMD CPU with AVX-512 oneDNN's was seen to be more than twice as fast, on one with AVX2 alone a sixth slower.
Whether Winograd's form of a 3x3 convolution wins depends on how its products and its additions compare.
So each shape of those is measured, once, in a forward pass while the model is prepared.
"""

from __future__ import annotations

import contextlib
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
from fastvr.models.resnet import ResNet
from fastvr.nn.conv_bn_relu import plain_conv
from fastvr.nn.plain import plain
from fastvr.nn.residual import BasicBlock, Bottleneck
from fastvr.ops import attention, conv_bn_relu, linear
from fastvr.ops._op import Op
from fastvr.ops.cpu import mkldnn, onednn_attention, winograd
from fastvr.ops.cpu.prepared_pass import Parts, running
from fastvr.prepare.graphs import layout_of
from fastvr.reference.image import normalize
from fastvr.reference.linear import GELU
from fastvr.testing import GELU_TAIL, measure_parity

logger = logging.getLogger("fastvr")

# of one call: rounds at least and at most, and the time after which no new one begins
_LEAST_ROUNDS, _ROUNDS, _SECONDS = 3, 9, 0.05

# of a float32 sum, where oneDNN's alone is not exact enough: half of its error remains
_MOST_TERMS = 768

# of a ResNet run in parts: how many images at once, on how many of them and how often that is measured
_STAGES_IN_PARTS, _IMAGES_AT_ONCE, _MEASURED_IMAGES, _PARTS_ROUNDS = 2, (2, 4), 8, 6

# the share of the first one's time that another call may take at most: it must earn the memory of the second
# layout; Winograd's form moves so many numbers that the calls around it find less of theirs in the cache
_SHARE, _WINOGRAD_SHARE = 0.97, 0.85


def pack_weights(model: nn.Module, example: torch.Tensor) -> frozenset[Hashable]:
    """Lay out the weights of ``model`` on a CPU where the vendor's fused call is the faster one.

    Runs the model once on random images like ``example``. A call that breaks the parity rule there does not
    win; of matrix products each shape, dtype and epilogue is measured against PyTorch's own operators.
    Nothing happens where the mode is not "auto", without oneDNN, or in a dtype that it would emulate.

    A weight that was laid out is kept beside the dense one, which every other way to run the model reads.

    Returns:
        Which calls without weights are to take the vendor's form, for
        :func:`fastvr.ops.cpu.prepared_pass.running`.
    """
    weights = {id(p): p for p in model.parameters()}
    dtypes = {p.dtype for p in weights.values()}
    if backend.current_backend() != "auto" or not example.numel() or not all(map(mkldnn.supports, dtypes)):
        return frozenset()
    images = _images_like(example)
    packer = _Packer(weights)
    run = running(images, packer.chosen) if is_known(model) else contextlib.nullcontext()
    with mkldnn.packing(packer), run, torch.no_grad():
        model(images)
    _write_onto_residuals(model)
    return frozenset(packer.chosen)


def fastest_parts(model: nn.Module, example: torch.Tensor, chosen: frozenset[Hashable]) -> Parts | None:
    """In which parts a ResNet whose weights are laid out runs images like ``example`` the fastest; None is
    whole. A few images tell; what follows is true of more."""
    if not isinstance(model, ResNet) or backend.current_backend() != "auto":
        return None
    images = _images_like(example[:_MEASURED_IMAGES])
    pixels = images.shape[2] * images.shape[3]
    parts: list[Parts | None] = [None]
    parts += [Parts(_STAGES_IN_PARTS, n * pixels) for n in _IMAGES_AT_ONCE if 2 * n <= len(images)]
    if len(parts) == 1 or not pixels:
        return None

    def run(parts: Parts | None) -> None:
        with running(images, chosen, parts), torch.no_grad():
            model(images)

    calls = [functools.partial(run, candidate) for candidate in parts]
    # nothing else is spent on it
    return parts[_fastest(calls, share=1.0, rounds=_PARTS_ROUNDS)]


def _images_like(example: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if example.is_floating_point():
        images = torch.randn(example.shape, generator=generator).to(example.dtype)
    else:
        images = torch.randint(0, 256, example.shape, generator=generator, dtype=example.dtype)
    return images.contiguous(memory_format=layout_of(example))


def is_known(model: nn.Module) -> bool:
    """Whether every module is PyTorch's or ours: others may write into the numbers that pass through them."""
    return all(type(module).__module__.split(".")[0] in ("fastvr", "torch") for module in model.modules())


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
            packed = mkldnn.kept(last.weight)
            if isinstance(packed, mkldnn.Packed):
                mkldnn.keep(last.weight, dataclasses.replace(packed, onto_residual=True))


class _Packer:
    """Packs the weights that it owns, as ops meet them."""

    def __init__(self, weights: dict[int, nn.Parameter]) -> None:
        self._weights = weights
        # by call, which of its candidates is to be taken; None is PyTorch itself
        self._places: dict[Hashable, int | None] = {}
        # of those without weights, which are the vendor's, and which were asked about
        self.chosen: set[Hashable] = set()
        self._asked: set[Hashable] = set()

    def __call__(self, op: str, args: tuple[Any, ...]) -> None:
        if op == "linear":
            self._linear(linear.Arguments(*args))
        elif op == "conv_bn_relu":
            self._convolution(conv_bn_relu.Arguments(*args))
        elif op == "attention":
            self._attention(attention.Arguments(*args))

    def _attention(self, a: attention.Arguments) -> None:
        key = onednn_attention.key(a.qkv, a.num_heads, a.scale)
        if not onednn_attention.takes(a.qkv) or key in self._asked:
            return
        self._asked.add(key)
        run = functools.partial(onednn_attention.attention, num_heads=a.num_heads, scale=a.scale)
        eager = functools.partial(attention.ATTENTION.reference, *a[:3])
        exact = attention.ATTENTION.reference(a.qkv[:1].double(), *a[1:3])
        report = measure_parity(run(a.qkv[:1]), eager()[:1], exact)
        if report.passed and _fastest([eager, functools.partial(run, a.qkv)]) == 1:
            self.chosen.add(key)
        logger.debug("prepare: %s runs in %s", key, "mkldnn" if key in self.chosen else "PyTorch")

    def _wanted(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        owned = id(weight) in self._weights and mkldnn.kept(weight) is None
        return owned and x.numel() > 0 and weight.numel() > 0

    def _linear(self, a: linear.Arguments) -> None:
        if not self._wanted(a.x, a.weight):
            return
        rows = a.x.numel() // a.x.shape[-1]
        whole = functools.cache(lambda: mkldnn.pack_linear(a.weight, rows))
        candidates: list[Callable[[], mkldnn.AnyPacked]] = [whole]
        if a.act in GELU:
            candidates.append(lambda: dataclasses.replace(whole(), gelu=False))
        # takes more passes, so only where the whole is not exact enough
        cut = []
        if a.x.dtype == torch.float32 and a.weight.shape[1] > _MOST_TERMS:
            cut.append(lambda: mkldnn.pack_linear(a.weight, rows, most_terms=_MOST_TERMS))
        floor: float | torch.Tensor = GELU_TAIL if a.act == "gelu" else 0.0
        if a.gamma is not None:
            floor = floor * a.gamma.abs().double()
        eager = functools.partial(linear.LINEAR.reference, *a)
        self._keep(linear.LINEAR, a, _multiply, [candidates, cut], eager=eager, floor=floor)

    def _convolution(self, a: conv_bn_relu.Arguments) -> None:
        if not self._wanted(a.x, a.weight) or a.running_mean is not None:
            return
        geometry = a.stride, a.padding, a.groups
        direct = functools.cache(
            lambda: mkldnn.pack_convolution(a.weight, a.bn_weight, a.bn_bias, *geometry, a.x.shape)
        )
        candidates: list[Callable[[], mkldnn.AnyPacked]] = [direct]
        candidates += [
            functools.partial(_in_tiles, a, tile, direct)
            for tile in winograd.TILES
            if winograd.takes(a.weight, tile, *geometry, a.x.shape)
        ]
        self._keep(conv_bn_relu.CONV_BN_RELU, a, _convolve, [candidates], share=_WINOGRAD_SHARE)

    def _keep(
        self,
        op: Op[torch.Tensor],
        a: Any,
        run: Callable[[Any, Any], torch.Tensor],
        groups: Sequence[Sequence[Callable[[], mkldnn.AnyPacked]]],
        *,
        eager: Callable[[], object] | None = None,
        floor: float | torch.Tensor = 0.0,
        share: float = _SHARE,
    ) -> None:
        """Keep the fastest of the candidates that hold the parity rule, from the first of ``groups`` where
        any does, or, where ``eager`` is given, nothing if that is faster."""
        candidates = [pack for group in groups for pack in group]
        key = (op.name, *(_kind(value) for value in a))
        if key not in self._places:
            self._places[key] = _choose(op, a, run, groups, eager, floor, share)
        chosen = self._places[key]
        packed = None if chosen is None else candidates[chosen]()
        logger.debug("prepare: %s runs in %s", key, "PyTorch" if packed is None else packed.name)
        if packed is not None:
            mkldnn.keep(a.weight, packed)


def _choose(
    op: Op[torch.Tensor],
    a: Any,
    run: Callable[[Any, Any], torch.Tensor],
    groups: Sequence[Sequence[Callable[[], mkldnn.AnyPacked]]],
    eager: Callable[[], object] | None,
    floor: float | torch.Tensor,
    share: float,
) -> int | None:
    """The place of the chosen candidate among all of ``groups``; None is PyTorch itself."""
    first = 0
    for group in groups:
        made = {first + i: pack() for i, pack in enumerate(group)}
        right = [i for i, packed in made.items() if _holds_parity(op, a, run, packed, floor)]
        first += len(group)
        if right:
            calls = [functools.partial(run, a, made[i]) for i in right]
            if eager is not None:
                return [None, *right][_fastest([eager, *calls], share=share)]
            return right[_fastest(calls, share=share) if len(right) > 1 else 0]
    return None


def _multiply(a: linear.Arguments, packed: mkldnn.Packed) -> torch.Tensor:
    return mkldnn.linear(a.x, packed, a.bias, a.gamma, a.residual, a.act)


def _convolve(a: conv_bn_relu.Arguments, packed: mkldnn.AnyPacked) -> torch.Tensor:
    x = normalize(a.x, a.mean, a.std, a.weight.dtype)
    return conv_bn_relu.run_packed(x, packed, a.stride, a.padding, a.groups, a.act, a.residual)


def _in_tiles(
    a: conv_bn_relu.Arguments, tile: tuple[int, int], direct: Callable[[], mkldnn.Packed]
) -> winograd.Winograd:
    return winograd.pack(a.weight, a.bn_weight, a.bn_bias, tile, a.padding, a.x.shape, direct())


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


def _fastest(
    calls: Sequence[Callable[[], object]], share: float = _SHARE, rounds: int = _LEAST_ROUNDS
) -> int:
    """The index of the call whose shortest run is the shortest; 0 unless one takes ``share`` of its time."""
    for call in calls:
        call()
    best, end = [math.inf] * len(calls), time.perf_counter() + _SECONDS
    for done in range(_ROUNDS):
        if done >= rounds and time.perf_counter() > end:
            break
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    best[0] *= share
    return best.index(min(best))
