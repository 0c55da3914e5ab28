"""What hooks on every module of a model see."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastvr.testing import assert_parity

Seen = dict[str, torch.Tensor]


def observe(
    model: nn.Module, run: Callable[[nn.Module], torch.Tensor], *, backward: bool = True
) -> tuple[Seen, Seen]:
    """Values and gradients by "module: input 0", "module: output 0", ... of one ``run``, backward pass
    included; the number counts the module's calls. No hook stays."""
    values: Seen = {}
    gradients: Seen = {}
    counts: collections.Counter[str] = collections.Counter()
    handles: list[Any] = []

    def note(where: Seen, key: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, torch.Tensor):
            where[f"{key} {counts[key]}"] = value.detach().clone()
            counts[key] += 1

    for name, module in model.named_modules():
        before = lambda _, args, name=name: note(values, f"{name}: input", args)  # noqa: E731
        after = lambda _, __, out, name=name: note(values, f"{name}: output", out)  # noqa: E731
        behind = lambda _, __, grads, name=name: note(gradients, f"{name}: gradient", grads)  # noqa: E731
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        if backward:
            handles.append(module.register_full_backward_hook(behind))
    run(model).square().mean().backward()
    for handle in handles:
        handle.remove()
    return values, gradients


def assert_same(seen: tuple[Seen, Seen], expected: tuple[Seen, Seen], exact: tuple[Seen, Seen]) -> None:
    """Every hook as often, with values and gradients by the parity rule."""
    assert_parity(seen[0], expected[0], exact[0])
    assert_parity(seen[1], expected[1], exact[1], kind="gradient")
