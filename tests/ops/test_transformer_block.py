"""A block in training under autocast as one op: what it keeps, and its gradients beside PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import randn, triton_forced

from fastvr import backend
from fastvr.ops.transformer_block import TRANSFORMER_BLOCK_TRAINING, Arguments, transformer_block
from fastvr.testing import check_op

pytest.importorskip("triton")

D, HEADS, HIDDEN = 64, 2, 96
ATTENTION = {
    "ln_weight": (D,),
    "ln_bias": (D,),
    "qkv_weight": (3 * D, D),
    "qkv_bias": (3 * D,),
    "proj_weight": (D, D),
    "proj_bias": (D,),
    "gamma": (D,),
}
MLP = {
    "ln_weight": (D,),
    "ln_bias": (D,),
    "fc1_weight": (HIDDEN, D),
    "fc1_bias": (HIDDEN,),
    "fc2_weight": (D, HIDDEN),
    "fc2_bias": (D,),
    "gamma": (D,),
}


def inputs(device, *, wanted=None, without=()):
    given = {"x": randn(2, 20, D, device=device)}
    for half, sizes in (("attn_", ATTENTION), ("mlp_", MLP)):
        for name, size in sizes.items():
            scale = D**-0.5 if len(size) == 2 else 1.0
            given[half + name] = None if half + name in without else randn(*size, device=device) * scale
    for name, value in given.items():
        if value is not None and (wanted is None or name in wanted):
            value.requires_grad_()
    return given


def halves(given):
    attention = {name: given[f"attn_{name}"] for name in ATTENTION} | {"num_heads": HEADS}
    return attention, {name: given[f"mlp_{name}"] for name in MLP}


def ours(**given):
    with torch.autocast(given["x"].device.type, dtype=torch.bfloat16):
        return transformer_block(given["x"], *halves(given))


def eager(**given):
    def scaled(y, gamma):
        return y if gamma is None else y * gamma

    with torch.autocast(given["x"].device.type, dtype=torch.bfloat16):
        x, (a, m) = given["x"], halves(given)
        y = F.layer_norm(x, (D,), a["ln_weight"], a["ln_bias"], 1e-6)
        qkv = F.linear(y, a["qkv_weight"], a["qkv_bias"]).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)
        x = x + scaled(F.linear(y, a["proj_weight"], a["proj_bias"]), a["gamma"])
        y = F.layer_norm(x, (D,), m["ln_weight"], m["ln_bias"], 1e-6)
        y = F.linear(F.gelu(F.linear(y, m["fc1_weight"], m["fc1_bias"])), m["fc2_weight"], m["fc2_bias"])
        return x + scaled(y, m["gamma"])


def check(given):
    with triton_forced(), backend.observe() as ran:
        check_op(ours, eager, given, name="transformer_block")
    return ran


@pytest.mark.parametrize(
    "without", [(), ("attn_gamma", "mlp_gamma"), ("attn_qkv_bias", "mlp_ln_bias")], ids=str
)
def test_under_autocast(without, device):
    ran = check(inputs(device, without=without))
    assert ran["transformer_block_training", "triton"] == 1
    assert ran["layer_norm_backward", "triton"] == 2


@pytest.mark.parametrize(
    "wanted",
    [
        ("x",),
        ("mlp_fc2_bias",),
        ("mlp_fc2_weight",),
        ("mlp_fc1_weight", "mlp_gamma"),
        ("attn_proj_weight",),
        ("attn_ln_weight", "mlp_fc1_bias"),
        ("attn_gamma",),
    ],
    ids=str,
)
def test_only_what_is_asked_for_is_computed(wanted, device):
    ran = check(inputs(device, wanted=wanted))
    weights = {"attn_qkv_weight", "attn_proj_weight", "attn_gamma", "mlp_fc1_weight", "mlp_fc2_weight"}
    weights = len((weights | {"mlp_gamma"}) & set(wanted))
    assert ran["linear_weight_backward", "triton"] == weights
    before_attention = {"x", "attn_ln_weight"} & set(wanted)
    assert ran["attention_backward", "triton"] == bool(before_attention)


def test_the_residual_stream_is_kept_once(device):
    given = inputs(device)
    with triton_forced():
        y = ours(**given)
    kept = y.grad_fn.saved_tensors
    sizes = [tuple(t.shape) for t in kept if t.dtype == torch.float32 and t.shape[-1] == D and t.dim() == 3]
    assert sizes == [(2, 20, D)]
    # neither normalised nor activated rows
    assert sum(t.dim() == 2 and t.shape == (40, HIDDEN) for t in kept) == 1


def test_elsewhere_the_halves_run(device):
    given = inputs(device)
    with triton_forced(), backend.observe() as ran:
        transformer_block(given["x"], *halves(given))
    assert ran["layernorm_attention_training", "triton"] == ran["layernorm_mlp_training", "triton"] == 1
    with triton_forced(), backend.observe() as ran, torch.no_grad():
        ours(**given)
    assert not any("training" in op for op, _ in ran)


def test_compiles(device):
    given = inputs(device)
    names = [name for name, value in given.items() if value is not None]
    with triton_forced():
        expected = ours(**given)
        upstream = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, [given[name] for name in names], upstream)
        compiled = torch.compile(lambda given: ours(**given), fullgraph=True, backend="aot_eager")
        result = compiled(given)
        found = torch.autograd.grad(result, [given[name] for name in names], upstream)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_operator(device):
    given = {
        name: None
        if value is None
        else (value.detach() if name == "x" else value.detach().bfloat16()).requires_grad_()
        for name, value in inputs(device).items()
    }
    numbers = {"num_heads": HEADS, "scale": 0.2, "attn_eps": 1e-6, "mlp_eps": 1e-6, "act": "gelu"}
    dropped = torch.tensor([0.0, 2.0], device=device)
    factors = {"attn_sample_scale": dropped, "mlp_sample_scale": dropped.flip(0)}
    for name in ("attn_", "attn_proj_", "mlp_hidden_", "mlp_"):
        factors |= {f"{name}dropout_p": 0.3, f"{name}seed": torch.tensor([5, len(name)], device=device)}
    args = [(given | numbers | factors)[name] for name in Arguments._fields]
    with triton_forced():
        torch.library.opcheck(TRANSFORMER_BLOCK_TRAINING.overload, args)


def test_bad_arguments_name_the_half():
    given = inputs("cpu")
    with pytest.raises(ValueError, match="layernorm_attention: qkv_bias must have shape"):
        transformer_block(given["x"], *halves(given | {"attn_qkv_bias": torch.zeros(3)}))
    with pytest.raises(ValueError, match="layernorm_mlp: fc1_bias must have shape"):
        transformer_block(given["x"], *halves(given | {"mlp_fc1_bias": torch.zeros(3)}))
