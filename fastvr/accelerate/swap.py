"""How a module is accelerated in place, and restored: by its class, and nothing else.

An accelerated module's class is a subclass, made here, of the class that it had, with the forward of a family
in front. So parameters, buffers, keys, hooks, tied weights and ``isinstance`` stay what they were, and to
restore it is to give the class back. The subclass bears the original's name and module, by which wrapping
policies and tracers know classes; pickles and copies name the original and the family, and make it again.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from fastvr import backend
from fastvr.nn.plain import plain
from fastvr.ops import _check


class Accelerated(nn.Module):
    """Base of the families: how fastvr computes what a class of somebody else's does.

    Attributes:
        runs: what the forward makes of it, for the report.
        part_names: which of its own modules it computes for.
        required: which attributes a version of the library must have given it.
        optional: a module that it refuses is not worth a line in the report.
        original, family: the class that the module had, and the family itself.
        _fastvr_accelerates: what :func:`fastvr.nn.plain.plain` takes the module for: the class that it had,
            unless the family names another that computes the same.
    """

    runs: ClassVar[str]
    part_names: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[bool] = False
    _fastvr_accelerates: ClassVar[type[nn.Module]]
    original: ClassVar[type[nn.Module]]
    family: ClassVar[type[Accelerated]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # a forward in a subclass that somebody makes of an accelerated module's class is called
        made: Any = next((base for base in cls.__mro__[1:] if "original" in base.__dict__), None)
        if made is not None and cls.forward is not made.forward:
            cls._fastvr_accelerates = cls

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why ``module``, of a class that this family is for, is better left to PyTorch, or None."""
        return None

    @classmethod
    def describe(cls, module: nn.Module) -> str:
        """``runs``, for this module."""
        return cls.runs

    @classmethod
    def note(cls, module: nn.Module) -> str | None:
        """What the user of ``module`` should know, or None."""
        return None

    def parts(self) -> Iterable[nn.Module]:
        """The modules that this one computes for."""
        named = (getattr(self, name, None) for name in self.part_names)
        return [module for module in named if isinstance(module, nn.Module)]

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computed before it was accelerated."""
        return type(self).original.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls, reduced = type(self), super().__reduce_ex__(protocol)
        # a subclass that somebody made of this one since is theirs to pickle
        if "original" not in cls.__dict__ or not isinstance(reduced, tuple):
            return reduced
        return (_blank, (cls.original, cls.family), *reduced[2:])


_classes: dict[tuple[type[nn.Module], type[Accelerated]], type[Accelerated]] = {}


def accelerated_class(original: type[nn.Module], family: type[Accelerated]) -> type[Accelerated]:
    """The subclass of ``original`` with the forward of ``family``; one for each pair."""
    if (original, family) in _classes:
        return _classes[original, family]
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "original": original,
        "family": family,
    }
    if not hasattr(family, "_fastvr_accelerates"):
        namespace["_fastvr_accelerates"] = original
    made = types.new_class(original.__name__, (family, original), exec_body=lambda ns: ns.update(namespace))
    return _classes.setdefault((original, family), made)


def swap(module: nn.Module, family: type[Accelerated]) -> None:
    module.__class__ = accelerated_class(type(module), family)


def unswap(module: nn.Module) -> None:
    """Give ``module`` the class back that it had, if it was accelerated."""
    if isinstance(module, Accelerated):
        module.__class__ = type(module).original  # type: ignore[assignment]


def wrapped(module: nn.Module) -> bool:
    """Whether ``module`` was accelerated, and then somebody made a subclass of that (FSDP2, parametrize)."""
    return isinstance(module, Accelerated) and "original" not in type(module).__dict__


def unobserved(module: nn.Module) -> bool:
    """Whether ``module`` is accelerated and nobody observes or replaced its call, so that what contains it
    may compute for it."""
    if not isinstance(module, Accelerated):
        return False
    # not the class's own: that of a subclass with another forward is the subclass
    cls = type(module)
    return plain(module, getattr(cls.family, "_fastvr_accelerates", cls.original))


def takes(x: object, weight: object, *, norm: bool = False) -> bool:
    """Whether ops may compute with ``x`` and ``weight``.

    Where not, a module's own forward runs: what it makes of nested or distributed tensors, mixed dtypes and
    transforms stays its affair, and where no kernel can run on the device, nothing is lost.
    ``norm``: ``weight`` is a LayerNorm's, which may be float32 beside any x.
    """
    if not isinstance(x, torch.Tensor) or not isinstance(weight, torch.Tensor):
        return False
    # in the mode "reference" the ops' references run, by which tests see what a GPU would compute
    if backend.current_backend() == "auto" and not backend.kernels_possible(x.device):
        return False
    if x.dtype not in _check.FLOATING or x.is_nested or x.device != weight.device:
        return False
    if weight.dtype != x.dtype and not (
        (norm and weight.dtype == torch.float32)
        or (not norm and weight.dtype in _check.FLOATING and _check.autocast_dtype(x.device) is not None)
    ):
        return False
    if torch.compiler.is_compiling():
        return True
    return (
        ordinary(x)
        and ordinary(weight)
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def ordinary(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is no subclass of Tensor with operators of its own, such as DTensor."""
    return type(tensor) in (torch.Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)


# what an accelerated module has besides its library's; a module that has one of these itself is left alone
OWN_NAMES = {name for name in (*vars(Accelerated), *Accelerated.__annotations__) if not name.startswith("__")}


def _blank(original: type[nn.Module], family: type[Accelerated]) -> nn.Module:
    """An accelerated module without state, for pickle and copy to fill."""
    cls = accelerated_class(original, family)
    return cls.__new__(cls)
