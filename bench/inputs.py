"""A case's tensors, its op's public function, and what a call of it consults and costs."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastvr import backend
from fastvr.ops._op import OPS
from fastvr.reference.attention import attention_kv_training, attention_training
from fastvr.reference.layer_norm import row_moments
from fastvr.reference.linear_stats import row_stats
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
    "avg_pool_linear": "pool",
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
        return OPS[op](*(arguments[argument.name] for argument in OPS[op].overload._schema.arguments))

    return call


class _Maker:
    """Random tensors of one dtype on one device, the same for the same seed; on meta only their shapes."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        # made on the device: the real shapes hold gigabytes
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0, like: Any = None) -> Tensor:
        dtype = like or self.dtype
        if self.generator is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return (values * scale + shift).to(dtype)

    def pixels(self, *shape: int) -> Tensor:
        if self.generator is None:
            return torch.empty(shape, dtype=torch.uint8, device=self.device)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator, device=self.device)

    def image(self, *shape: int) -> Tensor:
        return self.normal(*shape).to(memory_format=torch.channels_last)


def _rows(case: Case) -> tuple[int, ...]:
    return (case["batch"],) if case.get("tokens") is None else (case["batch"], case["tokens"])


def _linear(case: Case, make: _Maker) -> dict[str, Any]:
    k, n = case["k"], case["n"]
    return {
        "x": make.normal(*_rows(case), k),
        "weight": make.normal(n, k, scale=k**-0.5),
        "bias": make.normal(n) if case.get("bias", True) else None,
        "act": case.get("act", "none"),
        "gamma": make.normal(n) if case.get("gamma") else None,
        "residual": make.normal(*_rows(case), n) if case.get("residual") else None,
    }


def _by_rows(case: Case, make: _Maker) -> dict[str, Any]:
    """linear's arguments with one dimension for samples and tokens: statistics have one for both."""
    given = _linear(case, make)
    for name in ("x", "residual"):
        given[name] = None if given[name] is None else given[name].flatten(0, -2)
    return given


def _norm_linear(case: Case, make: _Maker) -> dict[str, Any]:
    given = _by_rows(case, make)
    x, weight = given["x"], given["weight"]
    return {
        "x": x,
        "stats": row_stats(x),
        "weight": weight,
        "colsum": weight.float().sum(1),
        "bias": None if given["bias"] is None else given["bias"].float(),
        "act": given["act"],
        "eps": 1e-6,
    }


def _attention(case: Case, make: _Maker) -> dict[str, Any]:
    heads = case["heads"]
    return {"qkv": make.normal(*_rows(case), 3 * heads * case["head_dim"]), "num_heads": heads}


def _attention_kv(case: Case, make: _Maker) -> dict[str, Any]:
    heads, width = case["heads"], case["heads"] * case["head_dim"]
    q, kv = make.normal(case["batch"], case["queries"], width), make.normal(*_rows(case), 2 * width)
    return {"q": q, "kv": kv, "num_heads": heads}


def _attention_training(case: Case, make: _Maker) -> dict[str, Any]:
    return _attention(case, make) | {"scale": case["head_dim"] ** -0.5}


def _attention_kv_training(case: Case, make: _Maker) -> dict[str, Any]:
    return _attention_kv(case, make) | {"scale": case["head_dim"] ** -0.5}


def _attention_backward(case: Case, make: _Maker) -> dict[str, Any]:
    given = _attention_training(case, make)
    y, lse = attention_training(**given)
    rest = {"y": y, "lse": lse, "num_heads": given["num_heads"], "scale": given["scale"]}
    return {"grad": make.normal(*y.shape), "qkv": given["qkv"], **rest}


def _attention_kv_backward(case: Case, make: _Maker) -> dict[str, Any]:
    given = _attention_kv_training(case, make)
    y, lse = attention_kv_training(**given)
    rest = {"y": y, "lse": lse, "num_heads": given["num_heads"], "scale": given["scale"]}
    needs = {"needs_q": True, "needs_kv": True}
    return {"grad": make.normal(*y.shape), "q": given["q"], "kv": given["kv"], **rest, **needs}


def _patch_embed(case: Case, make: _Maker) -> dict[str, Any]:
    channels, patch, dim, prefix = case["channels"], case["patch"], case["dim"], case.get("prefix", 1)
    tokens = prefix + (case["height"] // patch) * (case["width"] // patch)
    shape, uint8 = (case["batch"], channels, case["height"], case["width"]), case.get("uint8")
    layout = torch.channels_last if case.get("channels_last") else torch.contiguous_format
    x = make.pixels(*shape) if uint8 else make.normal(*shape)
    weight = make.normal(dim, channels, patch, patch, scale=(channels * patch * patch) ** -0.5)
    return {
        "x": x.to(memory_format=layout),
        "weight": weight.to(memory_format=layout),
        "bias": make.normal(dim) if case.get("bias", True) else None,
        "pos_embed": make.normal(tokens, dim) if case.get("pos", True) else None,
        "prefix_tokens": make.normal(prefix, dim) if prefix else None,
        "mean": make.normal(channels, scale=0.05, shift=0.45, like=torch.float32) if uint8 else None,
        "std": make.normal(channels, scale=0.01, shift=0.25, like=torch.float32) if uint8 else None,
    }


def _layer_norm(case: Case, make: _Maker) -> dict[str, Any]:
    dim = case["dim"]
    return {
        "x": make.normal(*_rows(case), dim),
        "weight": make.normal(dim, scale=0.5, shift=1.0),
        "bias": make.normal(dim),
    }


def _layer_norm_backward(case: Case, make: _Maker) -> dict[str, Any]:
    given = _layer_norm(case, make)
    del given["bias"]
    grad, residual = (make.normal(*given["x"].shape) for _ in range(2))
    return given | {
        "grad": grad,
        "residual": residual,
        "eps": 1e-6,
        "needs_x": True,
        "needs_parameters": True,
    }


def _layernorm_mlp(case: Case, make: _Maker) -> dict[str, Any]:
    dim, hidden = case["dim"], case["hidden"]
    return {
        "x": make.normal(*_rows(case), dim),
        "ln_weight": make.normal(dim, scale=0.5, shift=1.0),
        "ln_bias": make.normal(dim),
        "fc1_weight": make.normal(hidden, dim, scale=dim**-0.5),
        "fc1_bias": make.normal(hidden),
        "fc2_weight": make.normal(dim, hidden, scale=hidden**-0.5),
        "fc2_bias": make.normal(dim),
        "act": case.get("act", "gelu"),
        "gamma": make.normal(dim) if case.get("gamma") else None,
        "residual": make.normal(*_rows(case), dim) if case.get("residual", True) else None,
    }


def _layernorm_mlp_training(case: Case, make: _Maker) -> dict[str, Any]:
    return _layernorm_mlp(case, make) | {"eps": 1e-6}


def _layernorm_attention_training(case: Case, make: _Maker) -> dict[str, Any]:
    heads, width = case["heads"], case["heads"] * case["head_dim"]
    return {
        "x": make.normal(*_rows(case), width),
        "ln_weight": make.normal(width, scale=0.5, shift=1.0),
        "ln_bias": make.normal(width),
        "qkv_weight": make.normal(3 * width, width, scale=width**-0.5),
        "qkv_bias": make.normal(3 * width),
        "proj_weight": make.normal(width, width, scale=width**-0.5),
        "proj_bias": make.normal(width),
        "gamma": None,
        "residual": make.normal(*_rows(case), width),
        "num_heads": heads,
        "scale": case["head_dim"] ** -0.5,
        "eps": 1e-6,
    }


def _transformer_block_training(case: Case, make: _Maker) -> dict[str, Any]:
    width = case["heads"] * case["head_dim"]
    attention = _layernorm_attention_training(case, make)
    sizes = tuple((dict(case.sizes) | {"dim": width, "hidden": 4 * width}).items())
    mlp = _layernorm_mlp(dataclasses.replace(case, sizes=sizes), make)
    halves = {f"attn_{name}": value for name, value in attention.items()}
    halves |= {f"mlp_{name}": value for name, value in mlp.items()}
    return halves | {
        "x": attention["x"].to(torch.promote_types(make.dtype, torch.float32)),
        "num_heads": attention["num_heads"],
        "scale": attention["scale"],
        "mlp_eps": 1e-6,
        "act": "gelu",
    }


def _linear_weight_backward(case: Case, make: _Maker) -> dict[str, Any]:
    k, norm = case["k"], case["norm"]
    x = make.normal(*_rows(case), k).flatten(0, -2)
    return {
        "grad": make.normal(*_rows(case), case["n"]).flatten(0, -2),
        "x": x,
        "ln_weight": make.normal(k, scale=0.5, shift=1.0) if norm else None,
        "ln_bias": make.normal(k) if norm else None,
        "moments": row_moments(x, 1e-6) if norm else None,
        "needs_bias": case.get("bias", True),
        "out_dtype": None,
    }


def _linear_act_backward(case: Case, make: _Maker) -> dict[str, Any]:
    return {
        "grad": make.normal(*_rows(case), case["n"]).flatten(0, -2),
        "weight": make.normal(case["n"], case["k"], scale=case["n"] ** -0.5),
        "hidden": make.normal(*_rows(case), case["k"]).flatten(0, -2),
        "act": case.get("act", "gelu"),
        "needs_activated": True,
    }


def _conv_bn_relu(case: Case, make: _Maker) -> dict[str, Any]:
    channels, out, kernel, groups = case["channels"], case["out"], case["kernel"], case.get("groups", 1)
    stride, padding = case["stride"], case["padding"]
    height, width = ((case[side] + 2 * padding - kernel) // stride + 1 for side in ("height", "width"))
    fan_in = channels // groups * kernel * kernel
    weight = make.normal(out, channels // groups, kernel, kernel, scale=(2 / fan_in) ** 0.5)
    running = case.get("norm", "running") == "running"
    variance = make.normal(out, scale=0.5, like=torch.float32).abs() + 0.5
    size = (case["batch"], channels, case["height"], case["width"])
    images: dict[str, Any] = {"x": make.image(*size)}
    if case.get("uint8"):
        images = {"x": make.pixels(*size), "mean": make.normal(channels, like=torch.float32)}
        images["std"] = make.normal(channels, scale=0.05, shift=0.25, like=torch.float32)
    return images | {
        "weight": weight.to(memory_format=torch.channels_last),
        "bn_weight": make.normal(out, scale=0.5, shift=1.0, like=torch.float32),
        "bn_bias": make.normal(out, like=torch.float32),
        "running_mean": make.normal(out, like=torch.float32) if running else None,
        "running_var": variance if running else None,
        "stride": stride,
        "padding": padding,
        "groups": groups,
        "act": case.get("act", "relu"),
        "residual": make.image(case["batch"], out, height, width) if case.get("residual") else None,
    }


def _batch_norm_act(case: Case, make: _Maker) -> dict[str, Any]:
    size = tuple(case[name] for name in ("batch", "channels", "height", "width"))
    return {
        "x": make.image(*size),
        "weight": make.normal(size[1], scale=0.5, shift=1.0, like=torch.float32),
        "bias": make.normal(size[1], like=torch.float32),
        "eps": 1e-5,
        "residual": make.image(*size) if case.get("residual") else None,
        "act": case.get("act", "relu"),
    }


def _batch_norm_act_backward(case: Case, make: _Maker) -> dict[str, Any]:
    given = _batch_norm_act(case, make)
    x, channels = given["x"], case["channels"]
    return {
        "grad": make.image(*x.shape),
        "x": x,
        # half of it below 0, as what went into the activation
        "y": make.image(*x.shape) if given["act"] == "relu" and case.get("residual") else None,
        "mean": make.normal(channels, scale=0.1, like=torch.float32),
        "var": make.normal(channels, scale=0.1, like=torch.float32).abs() + 0.9,
        "weight": given["weight"],
        "bias": given["bias"] if given["act"] == "relu" and not case.get("residual") else None,
        "eps": given["eps"],
        "needs_x": True,
        "needs_parameters": True,
        "needs_residual": bool(case.get("residual")),
    }


def _norm(make: _Maker, channels: int) -> Any:
    from fastvr.ops.conv_bn_relu import BatchNorm

    return BatchNorm(
        make.normal(channels, scale=0.5, shift=1.0, like=torch.float32),
        make.normal(channels, like=torch.float32),
        make.normal(channels, like=torch.float32),
        make.normal(channels, scale=0.5, like=torch.float32).abs() + 0.5,
    )


def _dual_conv_bn_relu(case: Case, make: _Maker) -> dict[str, Any]:
    channels, channels2, out, stride = (case[name] for name in ("channels", "channels2", "out", "stride"))
    height, width = case["height"], case["width"]
    return {
        "x": make.image(case["batch"], channels, height, width),
        "weight": make.normal(out, channels, 1, 1, scale=channels**-0.5),
        "bn": _norm(make, out),
        "x2": make.image(case["batch"], channels2, height * stride, width * stride),
        "weight2": make.normal(out, channels2, 1, 1, scale=channels2**-0.5),
        "bn2": _norm(make, out),
        "stride2": stride,
        "act": case.get("act", "relu"),
    }


def _conv_bn_relu_max_pool(case: Case, make: _Maker) -> dict[str, Any]:
    names = ("x", "mean", "std", "weight", "stride", "padding")
    given = {name: value for name, value in _conv_bn_relu(case, make).items() if name in names}
    pool = {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}
    return given | {"bn": _norm(make, case["out"]), **pool}


def _bottleneck(case: Case, make: _Maker) -> dict[str, Any]:
    from fastvr.ops.bottleneck import Shortcut

    batch, planes, out, stride = (case[name] for name in ("batch", "planes", "out", "stride"))
    height, width = case["height"], case["width"]
    window = make.normal(planes, planes, 3, 3, scale=(2 / (9 * planes)) ** 0.5)
    arguments: dict[str, Any] = {
        "x": make.image(batch, planes, height * stride, width * stride),
        "weight2": window.to(memory_format=torch.channels_last),
        "bn2": _norm(make, planes),
        "weight3": make.normal(out, planes, 1, 1, scale=planes**-0.5),
        "bn3": _norm(make, out),
        "stride": stride,
    }
    if case.get("residual"):
        arguments["residual"] = make.image(batch, out, height, width)
    if source := case.get("source"):
        arguments["shortcut"] = Shortcut(
            make.image(batch, source, height * stride, width * stride),
            make.normal(out, source, 1, 1, scale=source**-0.5),
            _norm(make, out),
            stride,
        )
    if following := case.get("following"):
        arguments["weight1"] = make.normal(following, out, 1, 1, scale=out**-0.5)
        arguments["bn1"] = _norm(make, following)
    return arguments


def _batch_norm_act_max_pool(case: Case, make: _Maker) -> dict[str, Any]:
    x, weight, bias, eps, *_ = _batch_norm_act(case, make).values()
    pool = {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1]}
    return {"x": x, "weight": weight, "bias": bias, "eps": eps, **pool}


def _batch_norm_act_max_pool_backward(case: Case, make: _Maker) -> dict[str, Any]:
    from fastvr.reference.batch_norm_act_max_pool import batch_norm_act_max_pool

    given = _batch_norm_act_max_pool(case, make)
    y, mean, var, taps = batch_norm_act_max_pool(**given)
    grad = make.image(*y.shape)
    return given | {"grad": grad, "mean": mean, "var": var, "taps": taps, "needs_x": True}


def _residual_block(case: Case, make: _Maker) -> dict[str, Any]:
    from fastvr.ops.residual_block import Layer

    planes, out, stride, source = case["planes"], case["out"], case["stride"], case.get("source")

    def layer(o: int, c: int, k: int, stride: int = 1) -> Layer:
        weight = make.normal(o, c, k, k, scale=(2 / (k * k * c)) ** 0.5)
        scale, shift = make.normal(o, scale=0.5, shift=1.0), make.normal(o)
        weight = weight.to(memory_format=torch.channels_last)
        return Layer(weight, scale, shift, 1e-5, stride, k // 2)

    channels = source or out
    return {
        "x": make.image(case["batch"], channels, case["height"] * stride, case["width"] * stride),
        "branch": [layer(planes, channels, 1), layer(planes, planes, 3, stride), layer(out, planes, 1)],
        "shortcut": layer(out, channels, 1, stride) if source else None,
    }


def _residual_block_backward(case: Case, make: _Maker) -> dict[str, Any]:
    """The arguments of the operator, its results those of the reference."""
    from fastvr.ops._residual import Arguments, flat
    from fastvr.ops.residual_block import RESIDUAL_BLOCK

    forward = flat(**_residual_block(case, make))
    y, statistics, *maps, signs = RESIDUAL_BLOCK.reference(*forward)
    return {
        "grad": make.image(*y.shape),
        "y": None if signs.numel() else y,
        "statistics": statistics,
        **{f"map{i}": m for i, m in enumerate(maps, 1)},
        "signs": signs,
        **forward._asdict(),
        "needs": [isinstance(getattr(forward, name), Tensor) for name in Arguments._fields],
    }


def _max_pool(case: Case, make: _Maker) -> dict[str, Any]:
    x = make.image(case["batch"], case["channels"], case["height"], case["width"])
    return {"x": x, "kernel_size": 3, "stride": 2, "padding": 1}


def _avg_pool_linear(case: Case, make: _Maker) -> dict[str, Any]:
    channels, n = case["channels"], case["n"]
    return {
        "x": make.image(case["batch"], channels, case["height"], case["width"]),
        "weight": make.normal(n, channels, scale=channels**-0.5),
        "bias": make.normal(n) if case.get("bias", True) else None,
    }


_BUILDERS: dict[str, Callable[[Case, _Maker], dict[str, Any]]] = {
    "linear": _linear,
    "linear_stats": _by_rows,
    "norm_linear": _norm_linear,
    "attention": _attention,
    "attention_kv": _attention_kv,
    "attention_training": _attention_training,
    "attention_kv_training": _attention_kv_training,
    "attention_backward": _attention_backward,
    "attention_kv_backward": _attention_kv_backward,
    "patch_embed": _patch_embed,
    "patch_embed_stats": _patch_embed,
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "layernorm_mlp": _layernorm_mlp,
    "layernorm_mlp_training": _layernorm_mlp_training,
    "layernorm_attention_training": _layernorm_attention_training,
    "transformer_block_training": _transformer_block_training,
    "linear_weight_backward": _linear_weight_backward,
    "linear_act_backward": _linear_act_backward,
    "conv_bn_relu": _conv_bn_relu,
    "dual_conv_bn_relu": _dual_conv_bn_relu,
    "bottleneck": _bottleneck,
    "bottleneck_chain": _bottleneck,
    "conv_bn_relu_max_pool": _conv_bn_relu_max_pool,
    "batch_norm_act": _batch_norm_act,
    "batch_norm_act_backward": _batch_norm_act_backward,
    "batch_norm_act_max_pool": _batch_norm_act_max_pool,
    "batch_norm_act_max_pool_backward": _batch_norm_act_max_pool_backward,
    "residual_block": _residual_block,
    "residual_block_backward": _residual_block_backward,
    "max_pool": _max_pool,
    "avg_pool_linear": _avg_pool_linear,
}


def make(case: Case, dtype: torch.dtype, device: torch.device | str, *, seed: int = 0) -> dict[str, Any]:
    """The arguments of ``public(case.op)``."""
    return _BUILDERS[case.op](case, _Maker(dtype, torch.device(device), seed))


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
