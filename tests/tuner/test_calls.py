"""What the tuner finds in a model, and what it makes up to measure and judge it: calls, tensors, the gate."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvr
from fastvr import backend, tuner
from fastvr.models.resnet import ResNet
from fastvr.models.vit import ViT
from fastvr.nn.residual import Bottleneck
from fastvr.ops._op import OPS, Cost
from fastvr.ops.layer_norm import layer_norm
from fastvr.ops.layernorm_mlp import layernorm_mlp
from fastvr.ops.linear import linear
from fastvr.ops.linear_stats import linear_stats
from fastvr.ops.norm_linear import norm_linear
from fastvr.reference.linear_stats import row_stats
from fastvr.tuner import calls, command, gate

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="stand-in timers, on a CPU"),
    pytest.mark.skipif(backend.triton_missing() is not None, reason="needs Triton"),
]

CPU = torch.device("cpu")


def test_a_models_calls_most_expensive_first_each_key_once() -> None:
    model = fastvr.ViT(img_size=32, patch_size=8, num_classes=10, embed_dim=96, depth=3, num_heads=3).eval()
    found, unsupported = calls.collect(model, [torch.zeros(2, 3, 32, 32)], "sm_90")
    assert not unsupported
    assert next(model.parameters()).device == CPU
    assert [call.weight for call in found] == sorted((call.weight for call in found), reverse=True)
    assert len({(call.op, call.key) for call in found}) == len(found)
    assert {call.op for call in found} >= {"patch_embed", "attention", "linear"}
    assert {call.count for call in found if call.op == "attention"} == {2}  # the last block has its own
    assert all(tensor.device.type == "meta" for call in found for tensor in call.args if tensor is Tensor)
    with pytest.raises(ValueError, match="at least one"):
        tuner.tune(model, [], budget_seconds=1)


def parts_of_mlp(*args: Any) -> Tensor:
    x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, residual, eps, act, *_ = args
    hidden = linear(layer_norm(x, ln_weight, ln_bias, eps), fc1_weight, fc1_bias, act=act)
    return linear(hidden, fc2_weight, fc2_bias, gamma=gamma, residual=residual)


def test_a_fused_op_comes_after_its_parts_and_is_measured_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OPS["layernorm_mlp"], "parts", parts_of_mlp)

    def model(x: Tensor) -> Tensor:
        new = x.new_empty
        return layernorm_mlp(x, new(8), new(8), new(32, 8), new(32), new(8, 32), new(8), residual=x)

    found, _ = calls.collect(model, [torch.zeros(2, 5, 8)], "interpreter")
    assert [call.op for call in found] == ["layer_norm", "linear", "linear", "layernorm_mlp"]
    with backend.observe() as ran:
        report = tuner.tune(model, torch.zeros(2, 5, 8), budget_seconds=60, path=tmp_path / "cpu.json")
    assert [won.call.split()[0] for won in report.won] == [call.op for call in found]
    # its own reference gives the truth and the eager result, never the time
    assert ran["layernorm_mlp", "reference"] == 0
    assert ran["layernorm_mlp", "triton"] > 0
    assert not report.dropped


def test_real_tensors_are_as_the_models() -> None:
    base = torch.empty(4, 9, 8, device="meta")
    x = base[:, 1:, :]
    weight = torch.empty(6, 8, device="meta", dtype=torch.bfloat16)
    residual = torch.empty(8, 1, device="meta").expand(4, 8, 6)
    args = (x, weight, None, None, residual, "none", None, 0.0, None)
    call = calls.Call("linear", args, "k", (), Cost(0, 0))
    made = calls.materialise(call, CPU)
    for tensor, like in zip(made, call.args, strict=True):
        if isinstance(like, Tensor):
            assert (tensor.shape, tensor.stride(), tensor.dtype) == (like.shape, like.stride(), like.dtype)
            assert tensor.storage_offset() % 64 == like.storage_offset() % 64
            assert tensor.std() > 0
    assert made[2:4] == (None, None)
    assert made[5] == "none"
    assert abs(float(made[1].float().std()) - 8**-0.5) < 0.15
    again = calls.materialise(call, CPU)
    assert torch.equal(made[0], again[0])


def test_variances_are_positive_and_images_are_bytes() -> None:
    names = [argument.name for argument in OPS["conv_bn_relu"].overload._schema.arguments]
    values = {"running_var": torch.empty(64, device="meta"), "x": torch.empty(2, 3, 8, 8, device="meta")}
    values["x"] = values["x"].to(torch.uint8)
    call = calls.Call("conv_bn_relu", tuple(values.get(name) for name in names), "k", (), Cost(0, 0))
    made = dict(zip(names, calls.materialise(call, CPU), strict=True))
    assert made["running_var"].min() >= 0.5
    assert made["x"].dtype == torch.uint8
    assert made["x"].unique().numel() > 100


def test_the_same_tensor_twice_stays_one() -> None:
    x = torch.empty(2, 8, 8, device="meta")
    call = calls.Call("tuner_test_twice", (x, x), "k", (), Cost(0, 0))
    schema = SimpleNamespace(arguments=[SimpleNamespace(name="x"), SimpleNamespace(name="residual")])
    OPS["tuner_test_twice"] = SimpleNamespace(overload=SimpleNamespace(_schema=schema))  # type: ignore[assignment]
    try:
        one, two = calls.materialise(call, CPU)
    finally:
        del OPS["tuner_test_twice"]
    assert one is two


def test_row_statistics_are_held_to_the_truth_with_their_samples() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, wide = meta(12, 5, 96), {"dtype": torch.float32}
    folded = (x, meta(60, 2, 2, **wide), meta(48, 96), meta(48, **wide), None, 1e-6, "gelu")
    for op, args in (
        (linear_stats, (x, meta(96, 96), None, None, x, "none")),
        (norm_linear, folded),
    ):
        call = calls.make_call(op.__name__, args, "interpreter")
        assert call is not None
        made = calls.materialise(call, CPU)
        held = gate.Gate(call, made)
        assert held._ends is not None
        truth = held._truth if isinstance(held._truth, tuple) else (held._truth,)
        assert [len(t) for t in truth] == ([8, 40] if op is linear_stats else [8])
        if op is norm_linear:
            assert torch.equal(made[1], row_stats(made[0]))
            assert torch.equal(made[3], made[2].float().sum(1))
        with backend.use_backend("triton"):
            held.check()


def test_a_gradients_inputs_belong_together() -> None:
    def meta(*shape: int, **options: torch.dtype) -> Tensor:
        return torch.empty(shape, device="meta", **options)

    half = {"dtype": torch.float16}
    y, kv, lse = meta(2, 50, 64, **half), meta(2, 9, 128, **half), meta(2, 2, 50)
    for op, args in (
        ("attention_backward", (y, meta(2, 50, 192, **half), y.clone(), lse, 2, 0.2)),
        ("attention_kv_backward", (y, y.clone(), kv, y.clone(), lse, 2, 0.2, True, True)),
    ):
        call = calls.make_call(op, args, "interpreter")
        assert call is not None
        held = gate.Gate(call, calls.materialise(call, CPU))
        with backend.use_backend("triton"):
            held.check()


def training_calls(family: str) -> list[calls.Call]:
    """Those of a step of a small model."""
    model: ViT | ResNet
    if family == "vit":
        model = ViT(img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=7)
    else:
        model = ResNet(Bottleneck, (1, 1, 1, 1), num_classes=7, width=8)
    x = torch.zeros(6, 3, *((16, 16) if family == "vit" else (32, 32)))
    step = functools.partial(command.step, model.to("meta").train())
    found, unsupported = calls.collect(step, [x], "interpreter")
    assert not unsupported
    assert all(p.grad is None for p in model.parameters())
    return found


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_every_call_of_a_training_step_passes_its_own_gate(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tuner makes up belongs together, and what it holds to the truth can be held to it."""
    monkeypatch.setattr(gate, "_CHECKED", 2)
    monkeypatch.setattr(gate, "_CHECKED_ROWS", 2)
    found = training_calls(family)
    ends = set()
    for call in found:
        held = gate.Gate(call, calls.materialise(call, CPU))
        if held._ends is not None:
            ends.add(call.op)
        with backend.use_backend("triton"):
            held.check()
    wanted = {
        "vit": {"attention_backward", "linear_act_backward", "layernorm_mlp_training"},
        "resnet": {"avg_pool_linear_backward"},
    }
    assert wanted[family] <= ends
    whole = {"residual_block", "residual_block_backward", "batch_norm_act_max_pool_backward"}
    assert not ends & whole
    assert family == "vit" or whole <= {call.op for call in found}


def test_gelus_tail_is_granted_to_a_linears_output_alone() -> None:
    assert gate.absolute_floor("linear", "gelu") > 0
    assert gate.absolute_floor("linear", "relu") == gate.absolute_floor("layernorm_mlp", "gelu") == 0
