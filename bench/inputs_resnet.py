"""The arguments of a ResNet's ops, by case."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case
from maker import Builder, Maker
from torch import Tensor


def _conv_bn_relu(case: Case, make: Maker) -> dict[str, Any]:
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


def _conv_bn_relu_backward(case: Case, make: Maker) -> dict[str, Any]:
    given = _conv_bn_relu(case, make)
    x, padding, residual = given["x"], case["padding"], given.pop("residual")
    height, width = (
        (case[side] + 2 * padding - case["kernel"]) // case["stride"] + 1 for side in ("height", "width")
    )
    size = (case["batch"], case["out"], height, width)
    relu = given.pop("act") == "relu"
    return given | {
        "grad": make.image(*size),
        # half of it below 0, as what went into the activation
        "y": make.image(*size) if relu else None,
        "size": list(x.shape),
        "eps": 1e-5,
        "stride": [case["stride"]] * 2,
        "padding": [padding] * 2,
        "mean": None,
        "std": None,
        "needs": [True, True, True, residual is not None and relu],
    }


def _batch_norm_act(case: Case, make: Maker) -> dict[str, Any]:
    size = tuple(case[name] for name in ("batch", "channels", "height", "width"))
    return {
        "x": make.image(*size),
        "weight": make.normal(size[1], scale=0.5, shift=1.0, like=torch.float32),
        "bias": make.normal(size[1], like=torch.float32),
        "eps": 1e-5,
        "residual": make.image(*size) if case.get("residual") else None,
        "act": case.get("act", "relu"),
    }


def _batch_norm_act_backward(case: Case, make: Maker) -> dict[str, Any]:
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
        "frozen": bool(case.get("frozen")),
    }


def _norm(make: Maker, channels: int) -> Any:
    from fastvr.ops.conv_bn_relu import BatchNorm

    return BatchNorm(
        make.normal(channels, scale=0.5, shift=1.0, like=torch.float32),
        make.normal(channels, like=torch.float32),
        make.normal(channels, like=torch.float32),
        make.normal(channels, scale=0.5, like=torch.float32).abs() + 0.5,
    )


def _dual_conv_bn_relu(case: Case, make: Maker) -> dict[str, Any]:
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


def _conv_bn_relu_max_pool(case: Case, make: Maker) -> dict[str, Any]:
    names = ("x", "mean", "std", "weight", "stride", "padding")
    given = {name: value for name, value in _conv_bn_relu(case, make).items() if name in names}
    pool = {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}
    return given | {"bn": _norm(make, case["out"]), **pool}


def _bottleneck(case: Case, make: Maker) -> dict[str, Any]:
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


def _batch_norm_act_max_pool(case: Case, make: Maker) -> dict[str, Any]:
    x, weight, bias, eps, *_ = _batch_norm_act(case, make).values()
    pool = {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1]}
    return {"x": x, "weight": weight, "bias": bias, "eps": eps, **pool}


def _batch_norm_act_max_pool_backward(case: Case, make: Maker) -> dict[str, Any]:
    from fastvr.reference.batch_norm_act_max_pool import batch_norm_act_max_pool

    given = _batch_norm_act_max_pool(case, make)
    y, mean, var, taps = batch_norm_act_max_pool(**given)
    grad = make.image(*y.shape)
    return given | {"grad": grad, "mean": mean, "var": var, "taps": taps, "needs_x": True}


def _residual_block(case: Case, make: Maker) -> dict[str, Any]:
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


def _residual_block_backward(case: Case, make: Maker) -> dict[str, Any]:
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


def _max_pool(case: Case, make: Maker) -> dict[str, Any]:
    x = make.image(case["batch"], case["channels"], case["height"], case["width"])
    return {"x": x, "kernel_size": 3, "stride": 2, "padding": 1}


def _avg_pool_linear(case: Case, make: Maker) -> dict[str, Any]:
    channels, n = case["channels"], case["n"]
    return {
        "x": make.image(case["batch"], channels, case["height"], case["width"]),
        "weight": make.normal(n, channels, scale=channels**-0.5),
        "bias": make.normal(n) if case.get("bias", True) else None,
    }


def _max_pool_training(case: Case, make: Maker) -> dict[str, Any]:
    given = _max_pool(case, make)
    return {"x": given["x"], "kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1]}


def _max_pool_backward(case: Case, make: Maker) -> dict[str, Any]:
    from fastvr.reference.pool import max_pool_training

    given = _max_pool_training(case, make)
    y, taps = max_pool_training(**given)
    size = list(given.pop("x").shape[2:])
    return given | {"grad": make.image(*y.shape), "taps": taps, "size": size}


def _avg_pool_linear_backward(case: Case, make: Maker) -> dict[str, Any]:
    weight = _avg_pool_linear(case, make)["weight"]
    grad = make.normal(case["batch"], case["n"])
    return {"grad": grad, "weight": weight, "size": [case["height"], case["width"]]}


BUILDERS: dict[str, Builder] = {
    "conv_bn_relu": _conv_bn_relu,
    "conv_bn_relu_backward": _conv_bn_relu_backward,
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
    "max_pool_training": _max_pool_training,
    "max_pool_backward": _max_pool_backward,
    "avg_pool_linear": _avg_pool_linear,
    "avg_pool_linear_training": _avg_pool_linear,
    "avg_pool_linear_backward": _avg_pool_linear_backward,
}
