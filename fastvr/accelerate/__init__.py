"""accelerate: somebody else's model, in place, on fastvr's ops; restore: the model as it was."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastvr.accelerate.blocks import GAMMA, path_of
from fastvr.accelerate.families import FAMILIES, REASONS, family_of
from fastvr.accelerate.report import Entry, Report
from fastvr.accelerate.swap import OWN_NAMES, Accelerated, swap, unswap, wrapped
from fastvr.nn.plain import has_hooks

# what containers compute for
_COMPUTED = (nn.Linear, NonDynamicallyQuantizableLinear, nn.Conv2d, nn.BatchNorm2d)

__all__ = ["Entry", "Report", "accelerate", "restore"]


def accelerate(model: nn.Module) -> Report:
    """Let fastvr's ops run what they can of ``model``, in place.

    Known are the ViTs and ResNets of timm, torchvision and transformers, ``nn.TransformerEncoderLayer`` and
    ``nn.MultiheadAttention``, and in any model LayerNorm, patch embeddings, and within ``nn.Sequential``
    convolutions with BatchNorm (and ReLU) and LayerNorm with an MLP.

    Only the classes of modules change, each to a subclass of its own: parameters are the same objects, and
    optimisers, state-dict keys, hooks, tied weights, ``.to()``, ``train()``, copies and pickles keep working.
    The function is the model's: with masks, dropout of the attention weights or anything else that no op
    computes a module runs its own forward, as it does where no kernel can run (on a CPU). A module within
    that has hooks or was replaced is called. To accelerate twice is harmless.

    Args:
        model: any module. Nothing is printed.

    Returns:
        What was swapped, and what was left and why; ``print`` it.

    Raises:
        ValueError: ``model`` is no module.
    """
    _check("accelerate", model)
    swapped: list[Entry] = []
    left: dict[str, Entry] = {}
    covered: set[int] = set()
    notes: dict[str, None] = {}
    for name, module in _modules(model):
        reason = _swap(module)
        if isinstance(module, Accelerated) and type(module)._fastvr_accelerates is type(module):
            what = "a subclass of an accelerated module's class, which may compute something else"
            left[name] = Entry(name, _kind(type(module)), what)
        elif isinstance(module, Accelerated):
            family = type(module)
            swapped.append(Entry(name, _kind(family.original), family.describe(module)))
            covered.update(id(part) for part in family.parts(module))
            if (note := family.note(module)) is not None:
                notes[note] = None
        elif reason is not None:
            left[name] = Entry(name, _kind(type(module)), reason)
    for name, module in _modules(model):
        if id(module) not in covered:
            continue
        if has_hooks(module) or "forward" in module.__dict__:
            left[name] = Entry(name, _kind(type(module)), "it has hooks or another forward: it is called")
        elif type(module) in _COMPUTED or path_of(type(module)) in GAMMA:
            left.pop(name, None)
    return Report(tuple(swapped), tuple(left.values()), tuple(notes))


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every module has its own class and forward again; parameters stay as they are.

    Raises:
        ValueError: ``model`` is no module, or somebody made a subclass of an accelerated module's class since
            (FSDP does, and so do parametrizations); nothing is restored then.
    """
    _check("restore", model)
    for name, module in model.named_modules():
        if wrapped(module):
            where = f"model.{name}" if name else "model"
            raise ValueError(
                f"restore: {where} must be of the class that accelerate gave it; somebody made "
                f"{type(module).__name__} of it since: undo that first"
            )
    for module in model.modules():
        unswap(module)


def _check(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{function}: model must be a torch.nn.Module; got {type(model).__name__}")


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules but fastvr's own, which run on its ops already, and TorchScript's, which cannot change."""
    found: list[tuple[str, nn.Module]] = []
    skipped: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in skipped:
            continue
        fastvrs = type(module).__module__.startswith("fastvr.") and not isinstance(module, Accelerated)
        if fastvrs or isinstance(module, torch.jit.ScriptModule):
            skipped.update(map(id, module.modules()))
        found.append((name, module))
    return found


def _swap(module: nn.Module) -> str | None:
    """Swap ``module`` if it can be, else the reason, or None where there is nothing to say."""
    cls = type(module)
    if isinstance(module, Accelerated):
        return None
    if cls.__module__.startswith("fastvr."):
        return "fastvr's own: it runs on its ops already"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript"
    family = family_of(module)
    if family is None:
        return _reason(module)
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if any(hasattr(module, name) for name in OWN_NAMES):
        return "it has attributes of the names that fastvr would give it"
    refusal = family.refusal(module)
    if refusal is not None:
        return None if family.optional else refusal
    missing = [name for name in family.required if getattr(module, name, None) is None]
    if missing:
        return f"it has no {missing[0]}: another version of its library than those known"
    swap(module, family)
    return None


def _reason(module: nn.Module) -> str | None:
    cls = type(module)
    if (known := REASONS.get(path_of(cls))) is not None:
        return known
    for base in cls.__mro__[1:]:
        if path_of(base) in FAMILIES:
            return f"a subclass of {_kind(base)}, which may compute something else"
    # what has no parameters itself, activations and containers, is not worth a line
    if next(module.parameters(recurse=False), None) is None:
        return None
    if next(module.children(), None) is None:
        return "fastvr has no op for it"
    return "its own forward stays, with the parameters that it uses itself; what is in it is listed apart"


def _kind(cls: type) -> str:
    return f"{cls.__module__.split('.')[0]} {cls.__qualname__}"
