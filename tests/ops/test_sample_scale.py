"""Stochastic depth inside the ops: a factor for each sample's branch, behind the last product of a half."""

from __future__ import annotations

import pytest
import torch
from contract import DTYPES, assert_order_does_not_matter, randn, triton_forced

from fastvr import backend, tuning
from fastvr.ops.dropout import draw_seed
from fastvr.ops.layernorm_attention import layernorm_attention
from fastvr.ops.layernorm_mlp import layernorm_mlp
from fastvr.ops.linear import linear
from fastvr.ops.linear_act_backward import LINEAR_ACT_BACKWARD
from fastvr.ops.linear_backward import LINEAR_WEIGHT_BACKWARD
from fastvr.ops.transformer_block import transformer_block
from fastvr.reference import layernorm_attention as attention_reference
from fastvr.reference import layernorm_mlp as mlp_reference
from fastvr.reference.linear import activate
from fastvr.reference.linear import linear as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import linear as linear_kernels
from fastvr.kernels import linear_backward as kernels
from fastvr.kernels.common import record_launches

D, HIDDEN, HEADS = 64, 96, 2
SIZES = {
    "ln_weight": (D,),
    "ln_bias": (D,),
    "qkv_weight": (3 * D, D),
    "qkv_bias": (3 * D,),
    "proj_weight": (D, D),
    "proj_bias": (D,),
    "fc1_weight": (HIDDEN, D),
    "fc1_bias": (HIDDEN,),
    "fc2_weight": (D, HIDDEN),
    "fc2_bias": (D,),
    "gamma": (D,),
}
ATTENTION = ("ln_weight", "ln_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "gamma")
MLP = ("ln_weight", "ln_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "gamma")


def factors(samples, device, keep=0.75):
    """The second sample is dropped."""
    scale = torch.full((samples,), 1 / keep, device=device)
    scale[1:2] = 0
    return scale


def parameters(names, dtype, device):
    return {
        name: randn(*SIZES[name], dtype=dtype, device=device) * (D**-0.5 if len(SIZES[name]) == 2 else 1.0)
        for name in names
    }


def of_half(half, dtype, device, *, wanted=None, rows=(3, 9)):
    names, numbers = {
        "attention": (ATTENTION, {"num_heads": HEADS, "scale": 0.2, "eps": 1e-6}),
        "mlp": (MLP, {"act": "gelu", "eps": 1e-6}),
    }[half]
    given = parameters(names, dtype, device)
    given["x"] = randn(*rows, D, dtype=dtype, device=device)
    given["residual"] = randn(*rows, D, dtype=dtype, device=device)
    for name, value in given.items():
        value.requires_grad_(wanted is None or name in wanted)
    return given | numbers | {"sample_scale": factors(rows[0], device)}


HALVES = {
    "attention": (layernorm_attention, attention_reference.layernorm_attention),
    "mlp": (layernorm_mlp, mlp_reference.layernorm_mlp),
}


def check_half(half, given):
    with triton_forced(), backend.observe() as ran:
        check_op(*HALVES[half], given, name=half, sample_inputs=("x", "residual"))
    return ran


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", HALVES)
def test_halves_of_a_block(half, dtype, device):
    check_half(half, of_half(half, dtype, device))


@pytest.mark.parametrize("half", HALVES)
def test_no_launch_more_and_only_the_factors_are_kept(half, device):
    given = of_half(half, torch.bfloat16, device)
    wanted = [t for t in given.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    launches, kept = [], []
    for sample_scale in (None, given["sample_scale"]):
        count = len(launches)
        with triton_forced(), record_launches(lambda *launch: launches.append(launch)):
            y = HALVES[half][0](**given | {"sample_scale": sample_scale})
            kept.append([*y.grad_fn.saved_tensors])
            torch.autograd.grad(y, wanted, torch.ones_like(y))
    assert len(launches) == 2 * count > 0
    (more,) = [t for t in kept[1] if t.shape == (3,)]
    assert torch.equal(more, given["sample_scale"])
    assert len(kept[1]) == len(kept[0]) + 1


@pytest.mark.parametrize(
    ("half", "wanted"),
    [
        ("attention", "proj_bias"),
        ("attention", "proj_weight"),
        ("attention", "gamma"),
        ("attention", "residual"),
        ("mlp", "fc2_bias"),
        ("mlp", "fc2_weight"),
        ("mlp", "gamma"),
        ("mlp", "x"),
    ],
)
def test_only_what_is_asked_for(half, wanted, device):
    check_half(half, of_half(half, torch.float32, device, wanted=(wanted,)))


def test_without_a_gradient_the_halves_drop_too(device):
    for half in HALVES:
        given = of_half(half, torch.bfloat16, device, wanted=())
        with triton_forced():
            check_op(*HALVES[half], given, backward=False)


def test_rows_are_samples(device):
    """A class token's MLP, where a sample is one row."""
    check_half("mlp", of_half("mlp", torch.float32, device, rows=(5,)))


@pytest.mark.parametrize(
    ("without", "dropout_p"), [((), 0.3), (("gamma",), 0.0)], ids=["dropout", "no gamma"]
)
def test_a_block_under_autocast(without, dropout_p, device):
    def inputs():
        given = {"x": randn(3, 9, D, device=device)}
        for half, names in (("attn_", ATTENTION), ("mlp_", MLP)):
            kept = [name for name in names if name not in without]
            given |= {half + name: t for name, t in parameters(kept, torch.float32, device).items()}
        return {name: value.requires_grad_() for name, value in given.items()} | {
            "attn_sample_scale": factors(3, device),
            "mlp_sample_scale": factors(3, device).flip(0),
        }

    def halves(given):
        return tuple(
            {name.removeprefix(half): value for name, value in given.items() if name.startswith(half)}
            for half in ("attn_", "mlp_")
        )

    def ours(**given):
        attention, mlp = halves(given)
        attention |= {"num_heads": HEADS, "dropout_p": dropout_p}
        torch.manual_seed(5)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return transformer_block(given["x"], attention, mlp)

    def eager(**given):
        attention, mlp = halves(given)
        wide, numbers = given["x"].dtype, {"num_heads": HEADS, "scale": 32**-0.5, "eps": 1e-6}
        torch.manual_seed(5)
        numbers |= {"dropout_p": dropout_p, "seed": draw_seed(given["x"])} if dropout_p else {}
        narrow = torch.bfloat16 if wide == torch.float32 else wide

        def cast(half):
            own = {name: t.to(narrow) if name[0] in "qpf" else t for name, t in half.items()}
            return {"gamma": None} | own

        y = attention_reference.layernorm_attention(
            given["x"], residual=given["x"], **cast(attention), **numbers
        )
        return mlp_reference.layernorm_mlp(y, residual=y, **cast(mlp))

    with triton_forced(), backend.observe() as ran:
        check_op(ours, eager, inputs(), name="transformer_block")
    assert ran["transformer_block_training", "triton"] == 1


def eager_linear(x, weight, bias=None, *, act="none", gamma=None, residual=None, sample_scale=None):
    return reference(x, weight, bias, gamma, residual, act, sample_scale)


def of_linear(rows, k, n, dtype, device, **rest):
    given = {
        "x": randn(*rows, k, dtype=dtype, device=device),
        "weight": randn(n, k, dtype=dtype, device=device) * k**-0.5,
        "bias": randn(n, dtype=dtype, device=device),
        "gamma": randn(n, dtype=dtype, device=device),
        "residual": randn(*rows, n, dtype=dtype, device=device),
    } | rest
    for name in ("x", "weight", "bias", "gamma", "residual"):
        if given[name] is not None:
            given[name].requires_grad_()
    return given | {"sample_scale": factors(rows[0], device)}


def check_linear(given):
    with triton_forced():
        check_op(linear, eager_linear, given, name="linear", sample_inputs=("x", "residual"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype, device):
    check_linear(of_linear((3, 7), 31, 65, dtype, device))
    check_linear(of_linear((4,), 31, 65, dtype, device, gamma=None, residual=None))
    check_linear(of_linear((3, 7), 31, 65, dtype, device, act="gelu"))


def test_every_configuration(device):
    given = of_linear((3, 50), 100, 72, torch.bfloat16, device)
    for config in linear_kernels.candidate_configs(torch.bfloat16, "sm_90", kind="linear", m=150):
        with tuning.force_config("linear", config), triton_forced():
            check_op(linear, eager_linear, given, backward=False)


def test_every_configuration_of_the_weights_gradient(device):
    given = {
        "grad": randn(150, 70, dtype=torch.bfloat16, device=device),
        "x": randn(150, 100, dtype=torch.bfloat16, device=device),
        "sample_scale": factors(3, device),
    }

    def ours(grad, x, sample_scale):
        return list(LINEAR_WEIGHT_BACKWARD(grad, x, None, None, None, True, None, sample_scale))

    def eager(grad, x, sample_scale):
        grad = grad * sample_scale.to(grad.dtype).repeat_interleave(50)[:, None]
        return [grad.t() @ x, grad.sum(0)]

    for config in kernels.candidate_configs(torch.bfloat16, "sm_90", norm=True, m=4096, n=70, k=100):
        small = config | ({"SPLIT_M": 3} if "SPLIT_M" in config else {})
        with tuning.force_config("linear_weight_backward", small), triton_forced():
            check_op(ours, eager, given, backward=False, sample_dim=None)
            if "SPLIT_M" in config:
                assert_order_does_not_matter(lambda: ours(**given)[0])


@pytest.mark.parametrize("act", ["none", "relu"])
def test_back_through_an_activation(act, device):
    given = {
        "grad": randn(12, 40, dtype=torch.float16, device=device),
        "weight": randn(40, 72, dtype=torch.float16, device=device) * 40**-0.5,
        "hidden": randn(12, 72, dtype=torch.float16, device=device),
        "sample_scale": factors(3, device),
    }

    def ours(grad, weight, hidden, sample_scale):
        return list(LINEAR_ACT_BACKWARD(grad, weight, hidden, act, True, sample_scale))

    def eager(grad, weight, hidden, sample_scale):
        grad = grad * sample_scale.to(grad.dtype).repeat_interleave(4)[:, None]
        slope = (hidden > 0).to(grad.dtype) if act == "relu" else torch.ones_like(hidden)
        return [(grad @ weight) * slope, activate(hidden.clone(), act)]

    with triton_forced():
        check_op(ours, eager, given, backward=False)


def test_operators(device):
    with triton_forced():
        given = of_linear((3, 7), 24, 40, torch.float32, device)
        names = ("x", "weight", "bias", "gamma", "residual")
        args = [given[name] for name in names] + ["none", given["sample_scale"]]
        torch.library.opcheck(torch.ops.fastvr.linear.default, args)
        rows = randn(6, 40, device=device), randn(6, 24, device=device)
        args = [*rows, None, None, None, True, None, given["sample_scale"]]
        torch.library.opcheck(torch.ops.fastvr.linear_weight_backward.default, args)
        args = [rows[1], randn(24, 40, device=device), rows[0], "gelu", True, given["sample_scale"]]
        torch.library.opcheck(torch.ops.fastvr.linear_act_backward.default, args)


def test_what_a_dropped_branch_overflowed_to_stays_visible(device):
    """0 times Inf is NaN, as where a module multiplies; and it is that sample's alone."""
    given = of_linear((3, 7), 31, 65, torch.float32, device)
    with triton_forced(), torch.no_grad():
        clean = linear(**given)
        x = given["x"].clone()
        x[1, 2] = float("inf")
        y = linear(**given | {"x": x})
    assert y[1, 2].isnan().all()
    y[1, 2], clean[1, 2] = 0, 0
    assert torch.equal(y, clean)


def test_no_samples(device):
    for half in HALVES:
        given = of_half(half, torch.float32, device, rows=(0, 5))
        with triton_forced():
            y = HALVES[half][0](**given)
            wanted = [given[name] for name in (ATTENTION if half == "attention" else MLP)]
            grads = torch.autograd.grad(y, wanted, torch.ones_like(y))
        assert y.shape == (0, 5, D)
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("sample_scale", "message"),
    [
        (torch.ones(2), r"must have shape \[3\], a factor for each sample; got \[2\]"),
        (torch.ones(3).double(), "must be torch.float32 for an x of torch.float32; got torch.float64"),
        (torch.ones(3).int(), "must be float32, float16, bfloat16 or float64; got torch.int32"),
        (torch.ones(3, requires_grad=True), "has no gradient; got a tensor that requires one"),
        (0.5, "must be a torch.Tensor; got float"),
    ],
    ids=["shape", "dtype", "integer", "gradient", "number"],
)
def test_bad_arguments(sample_scale, message):
    for half, (op, _) in HALVES.items():
        given = of_half(half, torch.float32, "cpu") | {"sample_scale": sample_scale}
        with pytest.raises(ValueError, match=f"layernorm_{half}: sample_scale {message}"):
            op(**given)
    with pytest.raises(ValueError, match=f"linear: sample_scale {message}"):
        linear(torch.ones(3, 4), torch.ones(5, 4), sample_scale=sample_scale)


def test_one_row_alone_has_no_samples():
    with pytest.raises(
        ValueError, match=r"linear: sample_scale needs an x of samples, \[B, ...\]; got \[4\]"
    ):
        linear(torch.ones(4), torch.ones(5, 4), sample_scale=torch.ones(4))
