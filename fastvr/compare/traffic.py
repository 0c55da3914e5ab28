"""Kernel launches and memory traffic of a forward pass or a training step, counted on meta tensors.

Bytes are those of the tensors handed to each launch, read and written, each counted as if it came from and
went to memory. Nothing comes from a formula: an op of ours is taken apart into the launches that its kernels
make, and every fill, copy and cast in between counts as a launch of its own. A training step is a forward
pass in train mode and the backward pass of an upstream gradient, without loss and optimiser.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fastvr import backend
from fastvr.tuner.calls import meta_copy

# Allocation and bookkeeping: they launch nothing. Views are recognised by their schema.
_FREE = frozenset(
    {
        torch.ops.aten.as_strided_.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.lift_fresh.default,
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
        torch.ops.aten._unsafe_view.default,
    }
)
# On meta they forget channels_last, which PyTorch's kernels keep; copies would seem to follow. Gradients, and
# BatchNorm in training, remember it there too.
_CONVOLUTION = torch.ops.aten.convolution.default
_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


@dataclass(frozen=True)
class Traffic:
    """What one forward pass, or one training step, hands to the GPU.

    ``by_op`` splits both totals: by the name of a fastvr op for its kernels' launches, ``"aten.add.Tensor"``
    for what PyTorch launches, ``"aten.clone.default in linear"`` for what an op of ours has PyTorch do.
    ``flops`` are those of matrix products, convolutions and attention, two for a multiply-add; what backward
    computes again counts again.
    """

    launches: int
    bytes: int
    by_op: dict[str, tuple[int, int]]
    flops: int


def count(
    model: Callable[[Tensor], Any], example: Tensor, *, arch: str = "sm_90", train: bool = False
) -> Traffic | None:
    """Launches and bytes of ``model(example)`` with every fastvr op on its Triton kernel, as on ``arch``.

    Args:
        model: a module (it is copied to meta tensors and stays as it is) or any callable on meta tensors.
        example: gives the shape, dtype and strides; its values and device do not matter.
        arch: "sm_90", "gfx942", ...: which configurations are taken, hence which launches are made.
        train: count a training step: the module in train mode, and the gradients of those parameters that ask
            for one, for an upstream gradient like the result, which must be one tensor.

    Returns:
        None where Triton is not installed: the launches are in the kernels' own code.

    Raises:
        BackendError: an op has no kernel for its arguments; the message says why.
        ValueError: ``train``, and nothing would be differentiated.
    """
    if backend.triton_missing() is not None:
        return None
    from fastvr.kernels.common import record_launches

    counter = _Counter()
    with backend.use_backend("triton"), backend.assume_architecture(arch), record_launches(counter.launched):
        counter.run(model, example, train)
    return counter.traffic()


def eager_traffic(model: Callable[[Tensor], Any], example: Tensor, *, train: bool = False) -> Traffic:
    """Launches and bytes of ``model(example)`` in PyTorch alone; fastvr's own models run on the reference.

    Every call that is not a view counts as one launch, and scaled dot product attention as one launch of
    FlashAttention, which is what 16-bit tensors get on a GPU. ``train`` as in :func:`count`.
    """
    counter = _Counter()
    with backend.use_backend("reference"):
        counter.run(model, example, train)
    return counter.traffic()


def flops(model: nn.Module, example: Tensor) -> int:
    """Floating-point operations of one ``model(example)``: two for a multiply-add, matrix products and
    convolutions only."""
    counter = FlopCounterMode(display=False)
    module = meta_copy(model)
    with backend.use_backend("reference"), torch.no_grad(), counter:
        module(torch.empty_like(example, device="meta"))
    return int(counter.get_total_flops())


def _channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _nbytes(tensor: Tensor) -> int:
    """Bytes in memory that the tensor's elements take: an expanded dimension is one element there."""
    if not tensor.numel():
        return 0
    once = (n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
    return math.prod(once) * tensor.element_size()


def _written(argument: torch.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _distinct(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, two views of the same bytes counted once."""
    sizes: dict[tuple[int, int, int], int] = {}
    for tensor in tensors:
        size = _nbytes(tensor)
        start = int(tensor.storage_offset()) * tensor.element_size()
        sizes[tensor.untyped_storage()._cdata, start, size] = size
    return sum(sizes.values())


class FlashAttention(TorchFunctionMode):
    """On meta tensors SDPA would fall apart into its math, which no GPU runs."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None and len(args) == 3:
            return torch.ops.aten._scaled_dot_product_flash_attention.default(
                *args,
                kwargs.get("dropout_p", 0.0),
                kwargs.get("is_causal", False),
                False,
                scale=kwargs.get("scale"),
            )[0]
        return func(*args, **kwargs)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._by_op: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        self._inside: list[str] = []
        self._flops = 0
        self._computing = False  # inside an op whose arithmetic is counted as a whole
        self._keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

    def run(self, model: Callable[[Tensor], Any], example: Tensor, train: bool) -> None:
        if isinstance(model, nn.Module):
            wanted = [parameter.requires_grad for parameter in model.parameters()]
            model = meta_copy(model)
            if train:
                model.train()
                for parameter, wants in zip(model.parameters(), wanted, strict=True):
                    parameter.requires_grad_(wants)
        x = torch.empty_like(example, device="meta", requires_grad=False)
        with torch.set_grad_enabled(train), FlashAttention():
            with self:
                y = model(x)
            if train:
                if not (isinstance(y, Tensor) and y.requires_grad):
                    raise ValueError("model: nothing of its result would be differentiated")
                grad = torch.empty_like(y)
                with self:
                    y.backward(grad)

    def traffic(self) -> Traffic:
        by_op = {name: (launches, size) for name, (launches, size) in self._by_op.items()}
        return Traffic(
            launches=sum(launches for launches, _ in by_op.values()),
            bytes=sum(size for _, size in by_op.values()),
            by_op=by_op,
            flops=self._flops,
        )

    def _add(self, name: str, size: int) -> None:
        entry = self._by_op[name]
        entry[0] += 1
        entry[1] += size

    def launched(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]
    ) -> None:
        """A recorder for ``record_launches``: one launch, with the tensors handed to it."""
        # a host tensor descriptor holds its tensor as .base
        values = (getattr(value, "base", value) for value in arguments.values())
        tensors = [value for value in values if isinstance(value, Tensor)]
        self._add(self._inside[-1] if self._inside else kernel.__name__, _distinct(tensors))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastvr":
            return self._open(func, args)
        if func._can_decompose():
            # inside an op of ours, below autograd, composites arrive whole: reshape and contiguous may copy
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if func in (_CONVOLUTION, _BATCH_NORM) and _channels_last(args[0]):
            first = out if isinstance(out, Tensor) else out[0]
            first = torch.empty_like(first, memory_format=torch.channels_last)
            out = first if isinstance(out, Tensor) else (first, *out[1:])
        if not self._computing and func._overloadpacket in flop_registry:
            self._flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not results:
            # what returns nothing may write into its arguments, as lists of tensors are moved
            written = (arg for arg, spec in zip(args, func._schema.arguments, strict=False) if _written(spec))
            results = [leaf for leaf in tree_leaves(list(written)) if isinstance(leaf, Tensor)]
        if func in _FREE or func.is_view or not results:
            return out
        read = _distinct(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        size = read + sum(_nbytes(result) for result in results)
        self._add(f"{func} in {self._inside[-1]}" if self._inside else str(func), size)
        return out

    def _open(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Run an op of ours by its kernel function, with this mode still counting what that does."""
        from fastvr.ops._op import OPS

        name = func._schema.name.removeprefix("fastvr::")
        if name not in OPS:
            # the gradient of a reference, by PyTorch, arithmetic included; autograd is off in a mode
            with self._within(name, self._computing), self, torch._C._ForceDispatchKeyGuard(*self._keys):
                return OPS[name.removesuffix("_backward")]._backward(*args)
        op = OPS[name]
        reason = op.unsupported(*args)
        if reason is not None:
            raise backend.BackendError(f"fastvr.{op.name}: no Triton kernel runs here: {reason}")
        if not self._computing:
            self._flops += op.cost(*args).flops
        with self._within(name, True), self:
            return op.kernel(*args)

    @contextlib.contextmanager
    def _within(self, name: str, computing: bool) -> Iterator[None]:
        before, self._computing = self._computing, computing
        self._inside.append(name)
        try:
            yield
        finally:
            self._inside.pop()
            self._computing = before
