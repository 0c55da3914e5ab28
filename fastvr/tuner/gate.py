"""What a candidate must pass before it may win: the parity rule, on the batch's first and last samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastvr import backend
from fastvr.ops._op import OPS
from fastvr.testing import GELU_TAIL, assert_parity, guarded
from fastvr.tuner.calls import Call
from fastvr.tuner.decisions import as_numbers

# Samples at either end: the first and last tiles, and in float64 little beside the measurement itself. Where
# a sample is one row, several tiles' worth of them.
_CHECKED, _CHECKED_ROWS = 4, 64
# here a result depends on all samples
_WHOLE_BATCHES = (
    *("batch_norm_act", "batch_norm_act_backward"),
    *("batch_norm_act_max_pool", "batch_norm_act_max_pool_backward"),
    *("residual_block", "residual_block_backward", "conv_bn_relu_backward"),
    *("linear_weight_backward", "layer_norm_backward"),
)
_PER_SAMPLE = (
    *("x", "x2", "q", "kv", "qkv", "residual", "stats", "sample_scale"),
    *("grad", "y", "lse", "hidden", "taps"),
)


def absolute_floor(op: str, act: object) -> float:
    """What the parity rule grants an op's output: GELU's tail has an absolute bound."""
    return GELU_TAIL if op.endswith("linear") and act == "gelu" else 0.0


def _double(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


class Gate:
    """Holds the results of one op on ``args``, its schema's on the device, to the parity rule."""

    def __init__(self, call: Call, args: tuple[Any, ...]) -> None:
        self._name, self._op, self._args = str(call), OPS[call.op], args
        self._names = [argument.name for argument in self._op.overload._schema.arguments]
        named = dict(zip(self._names, args, strict=True))
        self._floor = absolute_floor(call.op, named.get("act"))
        with torch.no_grad(), backend.use_backend("reference"):
            self._eager = self._numbers(args, self._op.reference(*args))
            self._ends = self._find_ends(named)
            try:
                self._truth = self._true(named)
            except (RuntimeError, ValueError):
                if self._ends is None:
                    raise
                # another argument has a dimension of samples too
                self._ends = None
                self._truth = self._true(named)

    def check(self) -> None:
        """Run the op as the backend in force has it, and judge what comes out.

        Raises:
            AssertionError: a result breaks the parity rule or was left unwritten, or a kernel wrote past one.
        """
        with torch.no_grad(), guarded():
            actual = self._numbers(self._args, self._op(*self._args))
        # results began as NaN, so this sees what was left unwritten between the ends
        for got, eager in zip(tree_leaves(actual), tree_leaves(self._eager), strict=True):
            if got.shape == eager.shape and bool((got.isnan() & ~eager.isnan()).any()):
                raise AssertionError(f"{self._name}: NaN where PyTorch has none")
        eager = self._few(self._eager)
        assert_parity(
            self._few(actual),
            eager,
            self._truth,
            kind="gradient" if self._op.name.endswith("_backward") else "forward",
            name=self._name,
            sample_dim=None if self._op.name in _WHOLE_BATCHES else 0,
            absolute_floor=self._floor,
        )

    def _find_ends(self, named: dict[str, Any]) -> Tensor | None:
        """Which samples to hold to the truth; None for all of them: where they are few, or where a result has
        no dimension of samples."""
        x = self._args[0]
        # dropout draws by a cell's place in the batch
        seeded = any(isinstance(value, Tensor) and value.dtype == torch.int64 for value in self._args)
        if self._op.name in _WHOLE_BATCHES or seeded:
            return None
        batch, count = len(x), _CHECKED if x.dim() > 2 else _CHECKED_ROWS
        sampled = [named[name] for name in _PER_SAMPLE if isinstance(named.get(name), Tensor)]
        leaves = [*sampled, *tree_leaves(self._eager)]
        if batch <= 2 * count or any(leaf.dim() == 0 or len(leaf) % batch for leaf in leaves):
            return None
        return torch.tensor([*range(count), *range(batch - count, batch)], device=x.device)

    def _few(self, tree: Any) -> Any:
        return tree if self._ends is None else tree_map_only(Tensor, self._at_ends, tree)

    def _at_ends(self, t: Tensor) -> Tensor:
        # row statistics have one dimension for samples and tokens
        few: Tensor = t.unflatten(0, (len(self._args[0]), -1))[self._ends].flatten(0, 1)
        return few

    def _numbers(self, args: tuple[Any, ...], results: Any) -> Any:
        return as_numbers(self._op.name, dict(zip(self._names, args, strict=True)), results)

    def _true(self, named: dict[str, Any]) -> Any:
        few = [self._few(value) if name in _PER_SAMPLE else value for name, value in named.items()]
        wide = _double(tuple(few))
        return self._numbers(wide, self._op.reference(*wide))
