from __future__ import annotations

import pytest
import torch
from contract import (
    DTYPES,
    assert_autocast,
    assert_batch_invariant,
    assert_compiles,
    assert_nan_stays_in_its_sample,
    randn,
    triton_forced,
)

from fastvr import backend, tuning
from fastvr.ops.layernorm_attention import layernorm_attention
from fastvr.reference.layernorm_attention import layernorm_attention as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import linear as kernels

PARAMETERS = ("ln_weight", "ln_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "gamma")


def inputs(rows, d, heads, head_dim, dtype, device, *, gamma=True, grads=(*PARAMETERS, "x", "residual")):
    width = heads * head_dim
    given = {
        "x": randn(*rows, d, dtype=dtype, device=device),
        "ln_weight": randn(d, dtype=dtype, device=device),
        "ln_bias": randn(d, dtype=dtype, device=device),
        "qkv_weight": randn(3 * width, d, dtype=dtype, device=device) * d**-0.5,
        "qkv_bias": randn(3 * width, dtype=dtype, device=device),
        "proj_weight": randn(d, width, dtype=dtype, device=device) * width**-0.5,
        "proj_bias": randn(d, dtype=dtype, device=device),
        "gamma": randn(d, dtype=dtype, device=device) if gamma else None,
        "residual": randn(*rows, d, dtype=dtype, device=device),
        "num_heads": heads,
        "scale": head_dim**-0.5,
        "eps": 1e-6,
    }
    for name in grads:
        if given[name] is not None:
            given[name].requires_grad_()
    return given


def check(given, **options):
    with triton_forced(), backend.observe() as ran:
        check_op(
            layernorm_attention,
            reference,
            given,
            name="layernorm_attention",
            sample_inputs=("x", "residual"),
            **options,
        )
    return ran


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "d", "heads", "head_dim", "gamma"),
    [((2, 50), 192, 3, 64, False), ((3, 17), 65, 2, 40, True), ((1, 1), 32, 1, 32, True)],
    ids=str,
)
def test_training(rows, d, heads, head_dim, gamma, dtype, device):
    ran = check(inputs(rows, d, heads, head_dim, dtype, device, gamma=gamma))
    assert {op for op, how in ran if how == "triton"} == {
        "layernorm_attention_training",
        "attention_backward",
        "linear_weight_backward",
        "linear",
        "layer_norm_backward",
    }


def test_inference_is_the_four_ops(device):
    ran = check(inputs((2, 20), 64, 2, 32, torch.float16, device, grads=()), backward=False)
    assert {op for op, how in ran if how == "triton"} == {"layer_norm", "linear", "attention"}


def test_the_residual_is_added_in_the_launch_and_little_is_kept(device):
    given = inputs((3, 20), 64, 2, 32, torch.float32, device, gamma=False)
    del given["residual"], given["gamma"]
    with triton_forced():
        check_op(
            lambda x, **rest: layernorm_attention(x, residual=x, **rest),
            lambda x, **rest: reference(x, gamma=None, residual=x, **rest),
            given,
        )
        x = given.pop("x")
        y = layernorm_attention(x, residual=x, **given)
    parameters = {tuple(t.shape) for name, t in given.items() if name in PARAMETERS}
    kept = {tuple(t.shape) for t in y.grad_fn.saved_tensors} - parameters
    assert kept == {(3, 20, 64), (3, 20, 192), (3, 2, 20), (60, 2)}


@pytest.mark.parametrize(
    "wanted",
    [(name,) for name in (*PARAMETERS, "x", "residual")] + [("qkv_bias", "proj_bias")],
    ids=str,
)
def test_only_what_is_asked_for_is_computed(wanted, device):
    ran = check(inputs((2, 20), 48, 1, 32, torch.float32, device, grads=wanted))
    before = {"x", "ln_weight", "ln_bias", "qkv_weight", "qkv_bias"} & set(wanted)
    assert ran["attention_backward", "triton"] == bool(before)
    weights = {"qkv_weight", "proj_weight", "gamma"} & set(wanted)
    assert ran["linear_weight_backward", "triton"] == len(weights)
    assert ran["layer_norm_backward", "triton"] == bool({"x", "ln_weight", "ln_bias"} & set(wanted))


@pytest.mark.parametrize("missing", ["ln_bias", "qkv_bias", "proj_bias", "residual"])
def test_optional_parts(missing, device):
    given = inputs((2, 20), 48, 1, 32, torch.bfloat16, device, gamma=False)
    given[missing] = None
    check(given)


@pytest.mark.parametrize("rows", [(0, 5), (2, 0)], ids=str)
def test_nothing(rows, device):
    given = inputs(rows, 48, 1, 32, torch.float32, device)
    with triton_forced():
        y = layernorm_attention(**given)
        grads = torch.autograd.grad(y, [given[name] for name in (*PARAMETERS, "x")], torch.ones_like(y))
    assert y.shape == (*rows, 48)
    assert all(not grad.any() for grad in grads)


def test_strided_and_mixed_inputs(device):
    given = inputs((2, 20), 48, 1, 32, torch.bfloat16, device, grads=())
    given["x"] = randn(2, 40, 48, dtype=torch.bfloat16, device=device)[:, ::2]
    given["ln_weight"], given["ln_bias"] = given["ln_weight"].float(), given["ln_bias"].float()
    given["gamma"] = given["gamma"].float()
    given["residual"] = given["residual"].float()
    for name in (*PARAMETERS, "x", "residual"):
        given[name].requires_grad_()
    check(given)


def test_nan_stays_in_its_sample(device):
    given = inputs((5, 20), 48, 1, 32, torch.float32, device)
    del given["x"], given["residual"]

    def train(x):
        return layernorm_attention(x.requires_grad_(), residual=x, **given).detach()

    assert_nan_stays_in_its_sample(train, randn(5, 20, 48, device=device))
    with tuning.force_config("linear", kernels.candidate_configs(torch.float32, "interpreter")[0]):
        assert_batch_invariant(train, randn(3, 20, 48, device=device))


def test_autocast(device):
    given = inputs((2, 20), 48, 1, 32, torch.float32, device, grads=("qkv_weight",))
    eager = dict(given)

    def plain(**rest):
        dtype = torch.bfloat16 if rest["x"].dtype == torch.float32 else rest["x"].dtype
        cast = {name: rest[name].to(dtype) for name in ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias")}
        return reference(**rest | cast)

    assert_autocast(layernorm_attention, plain, **eager)


def test_compiles(device):
    names = (*PARAMETERS, "x")
    given = inputs((2, 20), 48, 1, 32, torch.float32, device, grads=names)

    def call(*tensors):
        return layernorm_attention(**given | dict(zip(names, tensors, strict=True)))

    assert_compiles(call, [given[name] for name in names])


def test_operator(device):
    given = inputs((2, 20), 48, 1, 32, torch.float32, device)
    names = ("x", *PARAMETERS, "residual", "num_heads", "scale", "eps")
    with triton_forced():
        torch.library.opcheck(
            torch.ops.fastvr.layernorm_attention_training.default, [given[name] for name in names]
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4, 48)}, r"x must be \[B, N, features\]; got \[4, 48\]"),
        ({"num_heads": 0}, "num_heads must be a positive int; got 0"),
        ({"num_heads": 5}, r"qkv_weight must be \[3 \* num_heads \* head_dim, 48\] with num_heads=5"),
        ({"proj_weight": torch.zeros(48, 31)}, r"proj_weight must be \[out_features, 32\]"),
        ({"qkv_bias": torch.zeros(3)}, r"qkv_bias must have shape \[96\]; got \[3\]"),
        ({"scale": float("nan")}, "scale must be a finite number or None; got nan"),
        ({"eps": -1.0}, "eps must be"),
        ({"residual": torch.zeros(1)}, r"residual must have shape \[2, 20, 48\]"),
        ({"qkv_weight": torch.zeros(96, 48).half()}, "qkv_weight must be torch.float32, as x is"),
    ],
)
def test_bad_arguments(changed, message):
    given = inputs((2, 20), 48, 1, 32, torch.float32, "cpu") | changed
    with pytest.raises(ValueError, match=f"layernorm_attention: {message}"):
        layernorm_attention(**given)
