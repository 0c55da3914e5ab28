"""residual_block_backward: residual_block's gradient, by the vendor's convolutions and kernels between."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastvr import backend, tuning
from fastvr.ops import _check
from fastvr.ops._convolution import convolution_gradients
from fastvr.ops._op import Cost, Kind, Op, _like, nbytes, reference_gradients
from fastvr.ops._residual import (
    NUMBERS,
    TENSORS,
    Arguments,
    Statistics,
    again,
    as_block,
    convolve,
    normalised,
    products,
    shortcut_arguments,
    split,
)
from fastvr.ops.batch_norm_act import (
    BATCH_NORM_ACT_BACKWARD,
    map_like,
    map_rows,
    reduction_parts,
    row_config,
    table_key,
)
from fastvr.reference.residual_block import Layer
from fastvr.reference.residual_block import residual_block as reference


class BackwardArguments(NamedTuple):
    grad: torch.Tensor
    y: torch.Tensor | None
    statistics: torch.Tensor
    map1: torch.Tensor
    map2: torch.Tensor
    map3: torch.Tensor
    map4: torch.Tensor
    signs: torch.Tensor
    forward: Arguments
    needs: frozenset[str]


def _arguments(*args: Any) -> BackwardArguments:
    forward = Arguments(*args[8:-1])
    needs = frozenset(name for name, need in zip(Arguments._fields, args[-1], strict=True) if need)
    arguments: list[Any] = [*args[:8], forward, needs]
    return BackwardArguments(*arguments)


def _parameters(needs: frozenset[str], place: int) -> bool:
    return bool(needs & {f"bn_weight{place}", f"bn_bias{place}"})


def _reach(needs: frozenset[str], depth: int) -> tuple[list[bool], list[bool]]:
    """Of which convolutions of the branch the input's gradient is needed, and of which the result's."""
    inputs, results, needed = [], [], "x" in needs
    for place in range(1, depth + 1):
        inputs.append(needed)
        needed = needed or f"weight{place}" in needs
        results.append(needed)
        needed = needed or _parameters(needs, place)
    return inputs, results


def _kernel(a: BackwardArguments) -> list[torch.Tensor]:
    x, needs, (branch, shortcut) = a.forward.x, a.needs, as_block(a.forward)
    depth = len(branch)
    statistics = split(a.statistics.contiguous(), as_block(a.forward).layers)
    maps = [a.map1, a.map2, a.map3][:depth]
    inputs, results = _reach(needs, depth)
    found: dict[str, torch.Tensor] = {}

    # what goes into the convolution at hand, where it is known already
    value = None
    if again(branch[-1]):
        value = normalised(maps[-2], statistics[depth - 2], branch[-2])
        maps[-1] = convolve(value, branch[-1])
    other = None
    if shortcut is not None:
        other = convolve(x, shortcut) if again(shortcut) else a.map4
    dz, onto = _through_the_end(a, branch[-1], shortcut, maps[-1], other, statistics, results[-1], found)
    del other
    if shortcut is not None and onto is not None:
        onto, dweight = convolution_gradients(
            onto, x, shortcut.weight, [shortcut.stride] * 2, [shortcut.padding] * 2,
            needs_x="x" in needs, needs_weight="weight4" in needs,
        )  # fmt: skip
        _keep(found, "weight4", dweight)

    for i in range(depth - 1, 0, -1):
        if not results[i]:
            break
        assert dz is not None
        layer, before, weight = branch[i], branch[i - 1], f"weight{i + 1}"
        if weight in needs and value is None:
            value = normalised(maps[i - 1], statistics[i - 1], before)
        shape = Kind(maps[i - 1].shape, dz.dtype)
        dy, dweight = convolution_gradients(
            dz, shape if value is None else value, layer.weight,
            [layer.stride] * 2, [layer.padding] * 2, needs_x=inputs[i], needs_weight=weight in needs,
        )  # fmt: skip
        _keep(found, weight, dweight)
        value = dz = None
        if dy is not None:
            dz, found[f"bn_weight{i}"], found[f"bn_bias{i}"], _ = BATCH_NORM_ACT_BACKWARD(
                dy, maps[i - 1], None, *statistics[i - 1], before.bn_weight, before.bn_bias, before.eps,
                results[i - 1], _parameters(needs, i), False, False,
            )  # fmt: skip
    if results[0]:
        assert dz is not None
        _into_the_block(x, branch[0], dz, onto, needs, found)
    names = [name for name in Arguments._fields if name in needs]
    # strides as the fake says, and no result that is another's memory
    return [_like(found[name], getattr(a.forward, name)) for name in names]


def _keep(found: dict[str, torch.Tensor], name: str, gradient: torch.Tensor | None) -> None:
    if gradient is not None:
        found[name] = gradient


def _through_the_end(
    a: BackwardArguments,
    last: Layer,
    shortcut: Layer | None,
    z: torch.Tensor,
    other: torch.Tensor | None,  # what the shortcut's convolution made
    statistics: list[Statistics],
    needs_dz: bool,
    found: dict[str, torch.Tensor],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of ``z`` and of ``other`` (of x itself, the shortcut's part, without one), None where not
    needed; those of both BatchNorms' parameters go to ``found``."""
    from fastvr.kernels.residual_block import launch_residual_block_bwd

    needs = a.needs
    depth = len(statistics) - (shortcut is not None)
    config = row_config("residual_block_backward", z)
    needs_other = "x" in needs or "weight4" in needs
    dz = map_like(z, z.dtype) if needs_dz else None
    dother = map_like(z, z.dtype) if needs_other else None

    def empty_like(vector: torch.Tensor, place: int) -> torch.Tensor | None:
        if not _parameters(needs, place):
            return None
        return backend.empty(vector.shape, dtype=vector.dtype, device=vector.device)

    dweight, dbias = (empty_like(vector, depth) for vector in (last.bn_weight, last.bn_bias))
    dweight4 = dbias4 = None
    if shortcut is not None:
        dweight4, dbias4 = (empty_like(vector, 4) for vector in (shortcut.bn_weight, shortcut.bn_bias))
    norms = 1 if shortcut is None else 2
    part = reduction_parts(map_rows(z), 2 * norms, config)
    mean, var = statistics[depth - 1]
    launch_residual_block_bwd(
        grad=map_rows(a.grad),
        signs=a.signs.contiguous() if a.signs.numel() else None,
        y=None if a.y is None else map_rows(a.y),
        z=map_rows(z),
        mean=mean,
        var=var,
        weight=last.bn_weight.contiguous(),
        eps=last.eps,
        dweight=dweight,
        dbias=dbias,
        shortcut=None if other is None else map_rows(other),
        **shortcut_arguments(other, statistics[-1], shortcut),
        shortcut_dweight=dweight4,
        shortcut_dbias=dbias4,
        parts=part.view(norms, len(part), 2, -1),
        sums=backend.empty((norms, 2, z.shape[1]), dtype=torch.float32, device=z.device),
        dz=None if dz is None else map_rows(dz),
        dshortcut=None if dother is None else map_rows(dother),
        config=config,
    )
    for name, gradient in zip(
        (f"bn_weight{depth}", f"bn_bias{depth}", "bn_weight4", "bn_bias4"),
        (dweight, dbias, dweight4, dbias4),
        strict=True,
    ):
        _keep(found, name, gradient)
    return dz, dother


def _into_the_block(
    x: torch.Tensor,
    first: Layer,
    dz: torch.Tensor,
    onto: torch.Tensor | None,  # the shortcut's part of x's gradient
    needs: frozenset[str],
    found: dict[str, torch.Tensor],
) -> None:
    """The gradients of the first convolution and of x, to ``found``."""
    # a product that adds to what is there already
    added = first.weight.shape[2:] == (1, 1) and (first.stride, first.padding) == (1, 0)
    dx, dweight = convolution_gradients(
        dz, x if "weight1" in needs else Kind(x.shape, x.dtype), first.weight, [first.stride] * 2,
        [first.padding] * 2, needs_x="x" in needs and not added, needs_weight="weight1" in needs,
    )  # fmt: skip
    _keep(found, "weight1", dweight)
    if "x" not in needs:
        return
    assert onto is not None
    onto = onto.contiguous(memory_format=torch.channels_last)
    if dx is None:
        map_rows(onto).addmm_(map_rows(dz), first.weight.reshape(first.weight.shape[:2]))
    else:
        onto.add_(dx)
    found["x"] = onto


def _reference(*args: Any) -> list[torch.Tensor]:
    a = _arguments(*args)
    names = [name for name in Arguments._fields if name in a.needs]

    def result(*forward: Any) -> torch.Tensor:
        return reference(forward[0], *as_block(Arguments(*forward)))[0]

    places = [Arguments._fields.index(name) for name in names]
    grads = reference_gradients(result, a.forward, a.grad, places)
    return [_like(grad, getattr(a.forward, name)) for grad, name in zip(grads, names, strict=True)]


def _fake(a: BackwardArguments) -> list[torch.Tensor]:
    names = [name for name in Arguments._fields if name in a.needs]
    return [torch.empty_like(getattr(a.forward, name)) for name in names]


def _unsupported(a: BackwardArguments) -> str | None:
    return _check.kernel_dtypes(*a[:7], *a.forward)


def _measured(a: BackwardArguments) -> str:
    # by what the result's map was measured with; else as its forward pass, which kernels computed
    key = table_key("residual_block_backward", a.grad.dtype, a.grad.shape)
    return tuning.choice(key, a.grad.device, "triton")


def _cost(a: BackwardArguments) -> Cost:
    block = as_block(a.forward)
    inputs, _ = _reach(a.needs, len(block.branch))
    weights = [f"weight{place + 1}" in a.needs for place in range(len(block.branch))]
    if block.shortcut is not None:
        inputs, weights = [*inputs, "x" in a.needs], [*weights, "weight4" in a.needs]
    made_again = [again(layer) for layer in block.layers]
    made_again[: len(block.branch) - 1] = [False] * (len(block.branch) - 1)
    flops = sum(
        product * sum(times)
        for product, *times in zip(products(a.forward), inputs, weights, made_again, strict=True)
    )
    return Cost(flops, nbytes([*a[:8], *a.forward]) + nbytes(_fake(a)))


RESIDUAL_BLOCK_BACKWARD = Op(
    "residual_block_backward",
    "Tensor grad, Tensor? y, Tensor statistics, Tensor map1, Tensor map2, Tensor map3, Tensor map4, "
    f"Tensor signs, {TENSORS}, {NUMBERS}, bool[] needs",
    arguments=_arguments,
    kernel=_kernel,
    reference=_reference,
    fake=_fake,
    unsupported=_unsupported,
    measured=_measured,
    cost=_cost,
    returns="Tensor[]",
    differentiable=False,
)
