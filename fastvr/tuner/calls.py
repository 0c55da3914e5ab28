"""Which calls of fastvr's operators a model makes, found on meta tensors, and what each asks the tables."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastvr import backend, tuning
from fastvr.ops._op import OPS, Cost
from fastvr.reference.linear_stats import row_stats

# what a gradient reads of results: the op that leaves them, and what they are called
_LEFT = {
    "attention_backward": ("attention_training", ("y", "lse")),
    "attention_kv_backward": ("attention_kv_training", ("y", "lse")),
    "max_pool_backward": ("max_pool_training", ("", "taps")),
    "batch_norm_act_max_pool_backward": ("batch_norm_act_max_pool", ("", "mean", "var", "taps")),
    "residual_block_backward": (
        "residual_block",
        ("y", "statistics", "map1", "map2", "map3", "map4", "signs"),
    ),
}

# FLOPs a GPU does while it moves one byte (16-bit matrix products on an H200: 788 TFLOP/s, 4.3 TB/s)
_BALANCE = 180.0


class SchemaCalls(TorchDispatchMode):
    """Collects the calls of fastvr's operators with the arguments of their schema."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled inside, and keeping the compiler away from it takes seconds to import
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastvr":
            self.calls.append((func._schema.name.removeprefix("fastvr::"), args))
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call to tune: an op, its schema's arguments with tensors on meta, and what it asks the tables.

    ``count`` is how often the model makes it, or another with the same keys.
    """

    op: str
    args: tuple[Any, ...]
    key: str
    knobs: tuple[tuning.Knob, ...]
    cost: Cost
    count: int = 1

    @property
    def weight(self) -> float:
        """What its runs cost at least, all together, in bytes moved."""
        return self.count * max(self.cost.flops / _BALANCE, self.cost.bytes)

    def __str__(self) -> str:
        shapes = ("x".join(map(str, a.shape)) for a in self.args if isinstance(a, Tensor) and a.dim() > 1)
        return f"{self.op} {' '.join(shapes)}"


def on_meta(arguments: Any) -> Any:
    """The same tree with its tensors on meta, strides kept."""
    return tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta", requires_grad=False), arguments)


def meta_copy(model: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on meta, strides kept; no memory is allocated for them."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        meta = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(meta, False) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(model, memo)


def schema_calls(run: Callable[[], Any], arch: str) -> list[tuple[str, tuple[Any, ...]]]:
    """The operators that ``run``, its tensors on meta, calls where kernels are forced, as on ``arch``."""
    calls = SchemaCalls()
    with backend.use_backend("triton"), backend.assume_architecture(arch), torch.no_grad(), calls:
        run()
    return [(name, args) for name, args in calls.calls if name in OPS]


def consult(op: str, args: tuple[Any, ...], arch: str) -> tuning.Consulted:
    """What a call, its tensors on meta, asks the tables for on ``arch``.

    Raises:
        BackendError: no kernel takes these arguments.
    """
    from fastvr.kernels.common import record_launches

    if reason := OPS[op].unsupported(*args):
        raise backend.BackendError(f"fastvr.{op}: no Triton kernel runs here: {reason}")
    with (
        backend.use_backend("triton"),
        backend.assume_architecture(arch),
        torch.no_grad(),
        record_launches(lambda *launch: None),
        tuning.consulted() as found,
    ):
        OPS[op].kernel(*args)
        OPS[op].measured(*args)
    return found


def make_call(op: str, args: tuple[Any, ...], arch: str) -> Call | None:
    """The call as something to tune, or None where it has nothing to choose (its batch is empty).

    Raises:
        BackendError: no kernel takes these arguments.
    """
    # the dispatcher leaves out the last arguments where they are as by default
    parameters = OPS[op].overload._schema.arguments
    args = (*args, *(parameter.default_value for parameter in parameters[len(args) :]))
    found = consult(op, args, arch)
    if not found.choices or not found.knobs:
        return None
    # a knob that two launches of one call share is one knob
    knobs = {(knob.name, knob.key): knob for knob in found.knobs}
    return Call(op, args, found.choices[0], tuple(knobs.values()), OPS[op].cost(*args))


def collect(
    model: Callable[[Tensor], Any], examples: Iterable[Tensor], arch: str
) -> tuple[list[Call], dict[str, str]]:
    """The calls of ``model`` on images like ``examples``, the most expensive first, each key once.

    An op that fuses others comes right after its parts: what it saves shows once they are at their fastest.

    Args:
        model: a module (it is copied to meta tensors and stays as it is), or any callable on meta tensors.
        examples: give shapes, dtypes and strides; their values and device do not matter.
        arch: whose kernels and configurations.

    Returns:
        The calls, and why others have no kernel, by their op.
    """
    run = meta_copy(model) if isinstance(model, nn.Module) else model
    groups: dict[tuple[str, str], list[Call]] = {}
    unsupported: dict[str, str] = {}
    for example in examples:
        x = on_meta(example)
        for op, args in schema_calls(lambda x=x: run(x), arch):  # type: ignore[misc]
            try:
                group = _with_parts(op, args, arch, unsupported)
            except backend.BackendError as error:
                unsupported[op] = str(error)
                continue
            if not group:
                continue
            known = groups.get((op, group[-1].key))
            count = 1 + (known[-1].count if known else 0)
            if known and known[-1].cost.bytes >= group[-1].cost.bytes:
                group = known
            groups[op, group[-1].key] = [*group[:-1], dataclasses.replace(group[-1], count=count)]
    ordered = sorted(groups.values(), key=lambda group: -group[-1].weight)
    calls = {(call.op, call.key): call for group in reversed(ordered) for call in group}
    order = dict.fromkeys((call.op, call.key) for group in ordered for call in group)
    return [calls[which] for which in order], unsupported


def known_ms(run: Callable[[Tensor], Any], example: Tensor, device: torch.device) -> float | None:
    """Milliseconds that the operators which ``run`` calls take on ``device`` by what was measured there, each
    on the faster of its implementations; None where one of them was not measured.

    Args:
        run: a module or any callable on meta tensors.
        example: gives shape, dtype and strides.
    """
    arch, x, total = backend.architecture(device), on_meta(example), 0.0
    run = meta_copy(run) if isinstance(run, nn.Module) else run
    try:
        calls = [make_call(op, args, arch) for op, args in schema_calls(lambda: run(x), arch)]
    except backend.BackendError:
        return None
    for call in calls:
        entry = None if call is None else tuning.lookup(call.key, device)
        if call is not None and entry is None:
            return None
        total += 0.0 if entry is None else entry.ms
    return total


def _with_parts(op: str, args: tuple[Any, ...], arch: str, unsupported: dict[str, str]) -> list[Call]:
    """The parts of a fused op, if it has any, then the op itself."""
    call = make_call(op, args, arch)
    if call is None:
        return []
    group = []
    if (parts := OPS[op].parts) is not None:
        for part, part_args in schema_calls(lambda: parts(*args), arch):
            try:
                group += _with_parts(part, part_args, arch, unsupported)
            except backend.BackendError as error:
                unsupported[part] = str(error)
    return [*group, call]


# -------------------------------------------------------------------------------------- real tensors


def materialise(call: Call, device: torch.device, *, seed: int = 0) -> tuple[Any, ...]:
    """The call's arguments on ``device``: shaped, strided, typed and aligned as they were, values random and
    scaled as a model's are."""
    generator = torch.Generator(device).manual_seed(seed)
    names = [argument.name for argument in OPS[call.op].overload._schema.arguments]
    made: dict[int, Tensor] = {}

    def real(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = _random(name, value, device, generator)
        return made[id(value)]

    named = {name: real(name, value) for name, value in zip(names, call.args, strict=True)}
    # what is computed from another argument, as a folded LayerNorm has it
    if named.get("stats") is not None:
        named["stats"].copy_(row_stats(named["x"]))
    if named.get("colsum") is not None:
        named["colsum"].copy_(named["weight"].float().sum(1))
    if (left := _LEFT.get(call.op)) is not None:
        forward, results = OPS[left[0]], left[1]
        if "taps" in named and "x" not in named:
            # the map that they are of
            size = (*named["grad"].shape[:2], *named["size"])
            named["x"] = torch.randn(size, device=device, generator=generator)
        parameters = [argument.name for argument in forward.overload._schema.arguments]
        made_before = forward.reference(*(named[name] for name in parameters))
        for name, result in zip(results, made_before, strict=True):
            if named.get(name) is not None:
                named[name].copy_(result)
    return tuple(named[name] for name in names)


def _random(name: str, like: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    # an expanded dimension is one element in memory, and what a strided view skips is there too
    extent = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True))
    # loads are as wide as the address allows
    offset = int(like.storage_offset()) % 64
    size = (offset + (extent if like.numel() else 0),)
    if like.dtype == torch.uint8:
        values = torch.randint(256, size, dtype=torch.uint8, device=device, generator=generator)
    elif like.dtype == torch.int64:  # a generator's seed
        values = torch.randint(2**63 - 1, size, device=device, generator=generator)
    elif like.is_floating_point():
        values = _scaled(name, like, torch.randn(size, device=device, generator=generator)).to(like.dtype)
    else:
        raise TypeError(f"no values are known for {name}, a tensor of {like.dtype}")
    return values.as_strided(like.shape, like.stride(), offset)


def _scaled(name: str, like: Tensor, values: Tensor) -> Tensor:
    if any(word in name for word in ("var", "std", "m2", "scale")):
        return values.mul_(0.25).abs_().add_(0.5)
    if "weight" in name and like.dim() > 1:
        return values.mul_((like.shape[0] / max(like.numel(), 1)) ** 0.5)  # 1 / sqrt(fan in)
    if "weight" in name or name == "gamma":
        return values.mul_(0.5).add_(1.0)
    return values
