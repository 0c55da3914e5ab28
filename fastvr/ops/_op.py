"""What every op is made of: a ``torch.library`` operator with two implementations, and its gradient.

An :class:`Op` is registered once, at import, as ``torch.ops.fastvr.<name>``, so that ``torch.compile``,
``torch.export``, FakeTensor, ``opcheck`` and the FLOP counter see one opaque, well-described operator.
Its gradient is made of ops again, with kernels and references of their own (:class:`Gradient`); where it has
none, it is a second operator, ``torch.ops.fastvr.<name>_backward``, which differentiates its reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from fastvr import backend
from fastvr.ops.cpu import mkldnn

_Arguments = TypeVar("_Arguments")
_Result = TypeVar("_Result")
_Value = TypeVar("_Value")

OPS: dict[str, Op[Any]] = {}

_library = torch.library.Library("fastvr", "DEF")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call must do at least: floating-point operations, and bytes with each tensor touched once."""

    flops: int
    bytes: int


def nbytes(arguments: Iterable[object]) -> int:
    """Bytes of the tensors among ``arguments``, each touched once."""
    return sum(a.numel() * a.element_size() for a in arguments if isinstance(a, torch.Tensor))


@dataclasses.dataclass(frozen=True)
class Gradient(Generic[_Arguments]):
    """An op's gradient, by kernels.

    Args:
        saves: called with the arguments and the names of those that need a gradient: which arguments (by
            name) and results (by place) backward reads. Nothing else is kept.
        backward: called with the arguments, those that were not saved as a :class:`Kind`, and one that was an
            earlier one as that very object; the results, None where not saved; the gradient of the first
            result, the only one that has one; and the names that need a gradient. Returns gradients by name.
    """

    saves: Callable[[_Arguments, frozenset[str]], Iterable[str | int]]
    backward: Callable[
        [_Arguments, tuple[Any, ...], torch.Tensor, frozenset[str]], Mapping[str, torch.Tensor | None]
    ]


class Kind(NamedTuple):
    """What is left of a tensor that was not saved."""

    shape: torch.Size
    dtype: torch.dtype


class Op(Generic[_Result]):
    """One operator.

    Args:
        name: what it is called everywhere: ``fastvr.ops.<name>``, ``torch.ops.fastvr.<name>``.
        parameters: the parameters of its ``torch.library`` schema, without defaults (with ``gradient`` or
            ``differentiable=False`` the last may have some; ``arguments`` and ``reference`` have them too).
        arguments: a NamedTuple of the schema's arguments, in order; what follows takes one, except
            ``reference``, which takes them one by one.
        kernel: allocates with :func:`fastvr.backend.empty`, launches Triton kernels, returns the result.
            Imports ``fastvr.kernels`` itself: Triton may not be there.
        reference: plain PyTorch, differentiable, right in every floating dtype.
        fake: returns an empty result of the right shape, dtype and strides.
        unsupported: the reason why the kernel cannot take these arguments, or None.
        measured: "triton" or "reference", what to run on a GPU where the kernel could (`tuning.py`).
        cost: FLOPs and bytes.
        parts: for an op that fuses others: the same by their public functions, each of which chooses for
            itself, taking the schema's arguments one by one. What runs where the kernel does not, and where
            a gradient is needed: each keeps what its own takes, and nothing is computed twice.
        vendor: on a CPU, the vendor's fused call with weights that ``prepare`` packed for it; None where it
            does not apply. Counts itself (:func:`fastvr.backend.ran`).
        returns: of the schema; more than one tensor takes a ``gradient`` or ``differentiable=False``.
        gradient: by kernels; None is the gradient of the reference.
        training: the op that runs in this one's place where a gradient is needed and kernels run: the same
            arguments, this op's result first, and behind it what its gradient reads.
        differentiable: False for an op that only inference uses, or that is itself part of a gradient. It
            refuses tensors that need one.

    As attributes all of them take the schema's arguments one by one.
    """

    def __init__(
        self,
        name: str,
        parameters: str,
        *,
        arguments: Callable[..., _Arguments],
        kernel: Callable[[_Arguments], _Result],
        reference: Callable[..., _Result],
        fake: Callable[[_Arguments], _Result],
        unsupported: Callable[[_Arguments], str | None],
        measured: Callable[[_Arguments], str],
        cost: Callable[[_Arguments], Cost],
        parts: Callable[..., _Result] | None = None,
        vendor: Callable[[_Arguments], _Result | None] | None = None,
        returns: str = "Tensor",
        gradient: Gradient[_Arguments] | None = None,
        training: Op[Any] | None = None,
        differentiable: bool = True,
    ) -> None:
        def spread(function: Callable[[_Arguments], _Value]) -> Callable[..., _Value]:
            return lambda *args: function(arguments(*args))

        self.name = name
        self.kernel = spread(kernel)
        self.reference = reference
        self.unsupported = spread(unsupported)
        self.measured = spread(measured)
        self.cost = spread(cost)
        self.parts = parts
        self.vendor = None if vendor is None else spread(vendor)
        self.training = training
        self.differentiable = differentiable
        self._arguments = arguments
        self._gradient = gradient
        _library.define(f"{name}({parameters}) -> {returns}")
        _library.impl(name, self._forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastvr::{name}", spread(fake), lib=_library)
        self.overload = getattr(torch.ops.fastvr, name).default
        self._names = [argument.name for argument in self.overload._schema.arguments]
        if gradient is not None:
            torch.library.register_autograd(
                f"fastvr::{name}", self._gradient_backward, setup_context=self._save, lib=_library
            )
        elif differentiable:
            self._define_backward(parameters)
        register_flop_formula(getattr(torch.ops.fastvr, name), get_raw=True)(self._flops)
        OPS[name] = self

    def _define_backward(self, parameters: str) -> None:
        backward = f"{self.name}_backward"
        _library.define(f"{backward}(Tensor grad, {parameters}, bool[] needs) -> Tensor[]")
        _library.impl(backward, self._backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastvr::{backward}", self._backward_fake, lib=_library)
        torch.library.register_autograd(
            f"fastvr::{self.name}",
            self._autograd_backward,
            setup_context=self._setup_context,
            lib=_library,
        )
        self.overload_backward = getattr(torch.ops.fastvr, backward).default

    def __call__(self, *args: Any) -> _Result:
        """``args`` are the schema's, positional; the first is a tensor and gives the device.

        Where PyTorch runs anyhow it is called directly: autograd keeps what it needs instead of computing the
        forward pass twice, the dispatcher costs nothing, and ``torch.compile`` can fuse it.
        """
        device = args[0].device
        possible = backend.kernels_possible(device)
        if not self.differentiable and _needs_gradient(args):
            raise NotImplementedError(f"fastvr.{self.name} has no gradient: call it under torch.no_grad()")
        if not torch.compiler.is_compiling() and _transformed(args):
            if backend.current_backend() == "triton":
                raise NotImplementedError(
                    f"fastvr.{self.name}: torch.func's transforms do not differentiate operators; "
                    "use_backend('reference') has none"
                )
            return backend.run_reference(self.name, self.reference, args)  # type: ignore[no-any-return]
        if self.training is not None and not _exporting() and _needs_gradient(args):
            if self.training.trains(*args):
                return self.training(*args)[0]  # type: ignore[no-any-return]
            # by PyTorch's own backward, which keeps what it needs in its own way
            return backend.run_reference(self.name, self.reference, args)  # type: ignore[no-any-return]
        # sizes may be symbols there, and a fake tensor's GPU may not exist: neither can be looked up
        if torch.compiler.is_compiling() or isinstance(args[0], FakeTensor):
            if self.parts is not None:
                return self.parts(*args)
            return self._operator(args) if possible else self.reference(*args)
        if self.vendor is not None and device.type == "cpu" and not possible:
            result = self._vendor(args)
            if result is not None:
                return result
        auto = backend.current_backend() == "auto"
        if self.parts is None:
            # in the mode "triton" the operator itself says what is wrong
            runs = possible and (not auto or self._kernel_runs(args, device))
        else:
            trained = _needs_gradient(args)
            runs = possible and not trained and self._kernel_fits(args, device)
            if not runs and backend.current_backend() != "reference":
                return self.parts(*args)
        if not runs:
            return backend.run_reference(self.name, self.reference, args)  # type: ignore[no-any-return]
        if forward_ad._current_level >= 0:
            # the dispatcher would drop the tangents without a word
            raise NotImplementedError(
                f"fastvr.{self.name} has no forward-mode derivative; use_backend('reference') has it{_MATH}"
            )
        if _watched(args):
            return self._operator(args)
        return self._launch(args, device) if auto else self._forward(*args)

    def chosen(self, *args: Any) -> bool:
        """Whether a call runs the kernel, or under a compiler leaves the choice to the operator: for a caller
        that has modules of its own to call where it does not."""
        device = args[0].device
        if not backend.kernels_possible(device):
            return False
        if torch.compiler.is_compiling() or isinstance(args[0], FakeTensor):
            return True
        return self._kernel_runs(args, device)

    def trains(self, *args: Any) -> bool:
        """Whether a gradient is needed and this op, the training form of others, runs by its kernel."""
        return _needs_gradient(args) and self.runs(*args)

    def runs(self, *args: Any) -> bool:
        """Whether this op, which something else stands in for elsewhere, runs by its kernel. What runs has to
        be known here, so a compiler gets it only where kernels are forced. An exported program is for
        inference, and gets the operator that is for it, which has a gradient too."""
        if _exporting():
            return False
        device = args[0].device
        if not backend.kernels_possible(device):
            return False
        if torch.compiler.is_compiling() or isinstance(args[0], FakeTensor):
            return backend.current_backend() == "triton"
        return self._kernel_runs(args, device)

    def where_supported(self, *args: Any) -> _Result:
        """As called, but PyTorch also in the mode "triton" where no kernel takes the arguments: for gradients
        of what a kernel did compute."""
        if self.unsupported(*args) is not None:
            return backend.run_reference(self.name, self.reference, args)  # type: ignore[no-any-return]
        return self(*args)

    def _operator(self, args: tuple[Any, ...]) -> _Result:
        return self.overload(*args)  # type: ignore[no-any-return]

    def _vendor(self, args: tuple[Any, ...]) -> _Result | None:
        """What the vendor's fused call gives, which has no gradient; None where it does not apply."""
        if backend.current_backend() != "auto" or _needs_gradient(args):
            return None
        if (pack := mkldnn.packer()) is not None:
            pack(self.name, args)
        assert self.vendor is not None
        return self.vendor(*args)

    def _kernel_fits(self, args: tuple[Any, ...], device: torch.device) -> bool:
        """Whether the fused kernel is the one to run; its parts say themselves what is wrong with them."""
        if self.unsupported(*args) is not None or backend.unavailable(device) is not None:
            return False
        return self._kernel_runs(args, device)

    def _kernel_runs(self, args: tuple[Any, ...], device: torch.device) -> bool:
        return backend.kernel_runs(
            self.name, args, device, unsupported=self.unsupported, measured=self.measured
        )

    def _forward(self, *args: Any) -> _Result:
        device = args[0].device
        if self._kernel_runs(args, device):
            return self._launch(args, device)
        with _no_autocast(device):
            return backend.run_reference(self.name, self.reference, args)  # type: ignore[no-any-return]

    def _launch(self, args: tuple[Any, ...], device: torch.device) -> _Result:
        with _no_autocast(device):
            return backend.run_kernel(  # type: ignore[no-any-return]
                self.name, args, device, kernel=self.kernel, reference=self.reference
            )

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert self._gradient is not None
        ctx.set_materialize_grads(False)
        results = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*results[1:])
        names = self._names
        saves = set(self._gradient.saves(self._arguments(*inputs), self._needs(ctx)))
        kept: dict[str | int, torch.Tensor] = {}
        ctx.others, ctx.repeated, ctx.cast = {}, {}, {}
        for name, value in [*zip(names, inputs, strict=True), *enumerate(results)]:
            if not isinstance(value, torch.Tensor):
                ctx.others[name] = value
            elif (first := next((other for other in kept if kept[other] is value), None)) is not None:
                ctx.repeated[name] = first
            elif name in saves and (parameter := _cast_from(value)) is not None:
                # it is there anyhow, and costs less to cast again than to keep
                kept[name], ctx.cast[name] = parameter, value.dtype
            elif name in saves:
                kept[name] = value
            else:
                ctx.others[name] = None if isinstance(name, int) else Kind(value.shape, value.dtype)
        ctx.kept = list(kept)
        ctx.save_for_backward(*kept.values())

    def _needs(self, ctx: Any) -> frozenset[str]:
        # torch.library appends an argument of its own
        pairs = zip(self._names, ctx.needs_input_grad, strict=False)
        return frozenset(name for name, need in pairs if need)

    def _gradient_backward(
        self, ctx: Any, grad: torch.Tensor | None, *others: object
    ) -> tuple[torch.Tensor | None, ...]:
        assert self._gradient is not None
        self._refuse_double_backward()
        names = self._names
        if grad is None:
            return (None,) * len(names)
        values = ctx.others | dict(zip(ctx.kept, ctx.saved_tensors, strict=True))
        values |= {name: values[first] for name, first in ctx.repeated.items()}
        values |= {name: values[name].detach().to(dtype) for name, dtype in ctx.cast.items()}
        results = tuple(values[i] for i in range(len(values) - len(names)))
        needs = self._needs(ctx)
        with _no_autocast(grad.device):
            grads = self._gradient.backward(
                self._arguments(*(values[name] for name in names)), results, grad, needs
            )
        return tuple(grads[name] if name in needs else None for name in names)

    def _refuse_double_backward(self) -> None:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"fastvr.{self.name} has no second derivative; use_backend('reference') has it{_MATH}"
            )

    def _backward(self, grad: torch.Tensor, *args_needs: Any) -> list[torch.Tensor]:
        """The gradients of the reference with respect to the tensor arguments that ``needs`` asks for."""
        *args, needs = args_needs
        wanted = _wanted(args, needs)
        with _no_autocast(grad.device):
            grads = reference_gradients(self.reference, args, grad, wanted)
        # strides as the fake says, and no result that is another's memory (torch.library forbids both)
        return [_like(given, args[i]) for given, i in zip(grads, wanted, strict=True)]

    def _backward_fake(self, grad: torch.Tensor, *args_needs: Any) -> list[torch.Tensor]:
        *args, needs = args_needs
        return [torch.empty_like(args[i]) for i in _wanted(args, needs)]

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, torch.Tensor)))
        ctx.others = [None if isinstance(a, torch.Tensor) else (a,) for a in inputs]

    def _autograd_backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        self._refuse_double_backward()
        tensors = iter(ctx.saved_tensors)
        args = [next(tensors) if other is None else other[0] for other in ctx.others]
        needs = [bool(need) for need in ctx.needs_input_grad]
        grads = iter(self.overload_backward(grad, *args, needs))
        wanted = set(_wanted(args, needs))
        return tuple(next(grads) if i in wanted else None for i in range(len(args)))

    def _flops(self, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return self.cost(*args).flops


def reference_gradients(
    reference: Callable[..., Any], args: Sequence[Any], grad: torch.Tensor, wanted: Sequence[int]
) -> Sequence[torch.Tensor]:
    """Gradients of ``reference(*args)`` with respect to the arguments at the places ``wanted``."""
    with torch.enable_grad():
        leaves = [
            arg.detach().requires_grad_(i in wanted) if isinstance(arg, torch.Tensor) else arg
            for i, arg in enumerate(args)
        ]
        return torch.autograd.grad(reference(*leaves), [leaves[i] for i in wanted], grad)


def _cast_from(value: torch.Tensor) -> torch.nn.Parameter | None:
    """The parameter that ``value`` is a copy of in autocast's dtype, or None."""
    node = value.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return None
    parameter = getattr(node.next_functions[0][0], "variable", None)
    # of another shape where a batched or sharded tensor came from it
    same = isinstance(parameter, torch.nn.Parameter) and parameter.shape == value.shape
    return parameter if same else None


def _watched(args: Iterable[object]) -> bool:
    """Whether anybody needs the operator to be called, rather than the kernel behind it: autograd, a mode, a
    transform, a tracer, the profiler, a subclass. Where nobody does, a call costs less than half."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or any(isinstance(a, torch.Tensor) and (type(a) not in _PLAIN or a.is_meta) for a in args)
        or _needs_gradient(args)
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)

# PyTorch's own fused attention has a first derivative alone
_MATH = ", attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"


def _exporting() -> bool:
    # not torch.compiler.is_exporting(), which PyTorch 2.11's compiler takes for true in every graph
    return torch.compiler._is_exporting_flag


def _transformed(args: Iterable[object]) -> bool:
    """Whether a transform of ``torch.func`` (grad, vmap) is at work on what needs a gradient."""
    return torch._C._functorch.peek_interpreter_stack() is not None and _needs_gradient(args)


def _needs_gradient(args: Iterable[object]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


def _like(grad: torch.Tensor, arg: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(arg)
    return grad if grad.stride() == result.stride() and grad._base is None else result.copy_(grad)


def _wanted(args: Sequence[Any], needs: Sequence[bool]) -> list[int]:
    return [i for i, (arg, need) in enumerate(zip(args, needs, strict=True)) if need and arg is not None]


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Operands were cast by the op's public function, argument by argument; inside, dtypes stand as given."""
    # entering torch.autocast costs microseconds, so only where it is on
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
