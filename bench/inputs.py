"""A case's tensors, its op's public function, and what a call of it consults and costs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import inputs_resnet
import inputs_vit
import torch
from cases import Case
from maker import Maker
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastvr import backend
from fastvr.ops._op import OPS
from fastvr.tuner.calls import SchemaCalls, on_meta
from fastvr.tuner.gate import absolute_floor as _absolute_floor

_MODULES = {
    "attention_kv": "attention",
    "attention_training": "attention",
    "attention_kv_training": "attention",
    "layernorm_mlp_training": "layernorm_mlp",
    "layernorm_attention_training": "layernorm_attention",
    "transformer_block_training": "transformer_block",
    "linear_weight_backward": "linear_backward",
    "linear_act_backward": "linear_act_backward",
    "bottleneck_chain": "bottleneck",
    "max_pool": "pool",
    "max_pool_training": "pool",
    "avg_pool_linear": "pool",
    "avg_pool_linear_training": "pool",
}


def module(op: str) -> str:
    """The file that an op shares with others of its kind."""
    return _MODULES.get(op) or _MODULES.get(op.removesuffix("_backward"), op.removesuffix("_backward"))


def public(op: str) -> Callable[..., Tensor]:
    """``fastvr.ops.<module>.<op>``, what a user calls; of an op that only gradients call, the op itself."""
    found = importlib.import_module(f"fastvr.ops.{module(op)}")
    function: Callable[..., Tensor] | None = getattr(found, op, None)
    return function or _by_name(op)


def _by_name(op: str) -> Callable[..., Any]:
    from fastvr.ops._op import OPS

    def call(**arguments: Any) -> Any:
        parameters = OPS[op].overload._schema.arguments
        return OPS[op](*(arguments.get(p.name, p.default_value) for p in parameters))

    return call


_BUILDERS = inputs_vit.BUILDERS | inputs_resnet.BUILDERS


def make(case: Case, dtype: torch.dtype, device: torch.device | str, *, seed: int = 0) -> dict[str, Any]:
    """The arguments of ``public(case.op)``."""
    return _BUILDERS[case.op](case, Maker(dtype, torch.device(device), seed))


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in float64, for the truth."""
    copied: dict[str, Any] = tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments
    )
    return copied


def absolute_floor(case: Case) -> float:
    """What the parity rule grants this case's output: GELU's tail has an absolute bound."""
    return _absolute_floor(case.op, case.get("act"))


def cost(op: str, arguments: dict[str, Any]) -> tuple[int, int]:
    """(FLOPs, bytes) that one call must do at least, by the op's own ``cost``."""
    schema = SchemaCalls()
    # on any GPU: without one an op that fuses others is its parts
    with backend.use_backend("triton"), backend.assume_architecture("sm_90"), schema:
        public(op)(**on_meta(arguments))
    costs = [OPS[name].cost(*args) for name, args in schema.calls]
    if not costs:
        raise RuntimeError(f"{op} called no operator of fastvr")
    return sum(c.flops for c in costs), sum(c.bytes for c in costs)
