"""One call that holds an op to everything the parity rule and the guards ask of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastvr.testing.guards import guarded, guarded_like
from fastvr.testing.parity import Kind, ParityReport, assert_parity

_Module = TypeVar("_Module", bound=nn.Module)


def truth_model(model: _Module) -> _Module:
    """A deep copy of ``model`` in float64, for the caller to run on the reference backend."""
    return copy.deepcopy(model).double()


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _bytes(tensor: Tensor) -> Tensor:
    # contiguous() would leave a single element its stride, and a stride forbids the view
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _named_tensors(tree: Any) -> dict[str, Tensor]:
    leaves = pytree.tree_flatten_with_path(tree)[0]
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _differentiable(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _gradients(outputs: Any, inputs: Mapping[str, Tensor], upstream: Sequence[Tensor]) -> dict[str, Any]:
    grads = torch.autograd.grad(
        _differentiable(outputs),
        list(inputs.values()),
        [grad.to(out.dtype) for grad, out in zip(upstream, _differentiable(outputs), strict=True)],
        allow_unused=True,
    )
    return dict(zip(inputs, grads, strict=True))


def check_op(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    backward: bool = True,
    seed: int = 0,
    sample_dim: int | None = 0,
    sample_inputs: Sequence[str] = ("x",),
    name: str = "",
    absolute_floor: float | Tensor = 0.0,
    kind: Kind = "forward",
) -> ParityReport:
    """Hold an op, forward and backward, to the parity rule against its PyTorch twin.

    The op's inputs keep their strides and lie between guard regions, what it allocates through
    ``fastvr.backend.empty`` is poisoned with NaN and guarded too, and its inputs must come out unchanged.

    Args:
        fn: called as ``fn(**inputs)``; the caller forces the backend.
        reference: the same in PyTorch; run on the inputs (eager) and on float64 copies (truth).
        inputs: tensors, lists and tuples of tensors, and anything else, by argument name.
        backward: also compare the gradients of every floating input that requires one, for random upstream
            gradients.
        seed: of the upstream gradients.
        sample_dim: the outputs' dimension of samples.
        sample_inputs: names of the inputs whose gradients have that dimension too; the others are
            parameters, compared as a whole.
        absolute_floor: of the outputs, see :func:`assert_parity`; gradients have none.
        kind: of the outputs: "gradient" for an op that computes gradients.

    Returns:
        The worst of all comparisons.

    Raises:
        AssertionError: parity broken, a guard overwritten, an input changed.
    """
    name = name or getattr(fn, "__name__", "op")
    plain = pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), dict(inputs))
    exact = pytree.tree_map(_double, dict(inputs))
    eager, truth = reference(**plain), reference(**exact)
    generator = torch.Generator().manual_seed(seed)
    upstream = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).to(out.device)
        for out in _differentiable(eager)
    ]
    wanted = {path: t for path, t in _named_tensors(plain).items() if t.requires_grad}
    if backward and not wanted:
        raise ValueError(f"{name}: backward=True, but no input requires a gradient")
    actual_grads: dict[str, Any] = {}
    with guarded():
        placed = pytree.tree_map_only(Tensor, guarded_like, dict(inputs))
        before = {path: _bytes(t) for path, t in _named_tensors(placed).items()}
        actual = fn(**placed)
        if backward:
            # Detached or missing gradients would leave nothing to compare.
            if len(_differentiable(actual)) != len(upstream):
                raise AssertionError(
                    f"{name}: {len(_differentiable(actual))} outputs carry a gradient, eager {len(upstream)}"
                )
            actual_grads = _gradients(
                actual, {path: _named_tensors(placed)[path] for path in wanted}, upstream
            )
        for path, tensor in _named_tensors(placed).items():
            if not torch.equal(_bytes(tensor), before[path]):
                raise AssertionError(f"{name}: the input {path} was changed")
    report = assert_parity(
        actual, eager, truth, kind=kind, name=name, sample_dim=sample_dim, absolute_floor=absolute_floor
    )
    if not backward:
        return report
    eager_grads = _gradients(eager, wanted, upstream)
    true_grads = _gradients(truth, {path: _named_tensors(exact)[path] for path in wanted}, upstream)
    for path in wanted:
        argument = next(key for key in inputs if path.startswith(f"[{key!r}]"))
        part = assert_parity(
            actual_grads[path],
            eager_grads[path],
            true_grads[path],
            kind="gradient",
            name=f"{name}: gradient of {path}",
            sample_dim=sample_dim if argument in sample_inputs else None,
        )
        report = report.merged(part)
    return report
