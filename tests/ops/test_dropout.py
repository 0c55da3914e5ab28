"""Dropout of rows: behind a product's activation, of an MLP's hidden values, and back through either."""

from __future__ import annotations

import math

import pytest
import torch
from contract import DTYPES, randn, triton_forced

import fastvr
from fastvr import backend, tuning
from fastvr.nn.block import Block
from fastvr.nn.mlp import Mlp
from fastvr.ops._op import Cost, Op
from fastvr.ops.dropout import DROPOUT, draw_seeds
from fastvr.ops.layernorm_attention import LAYERNORM_ATTENTION_TRAINING
from fastvr.ops.layernorm_mlp import LAYERNORM_MLP_TRAINING, layernorm_mlp
from fastvr.ops.linear import LINEAR, linear
from fastvr.ops.linear_act_backward import LINEAR_ACT_BACKWARD
from fastvr.ops.transformer_block import TRANSFORMER_BLOCK_TRAINING, Arguments
from fastvr.reference import dropout
from fastvr.reference import layernorm_attention as attention_reference
from fastvr.reference import layernorm_mlp as mlp_reference
from fastvr.reference.linear import linear as reference
from fastvr.testing import assert_parity, check_op, truth_model
from fastvr.tuner.calls import Call
from fastvr.tuner.gate import Gate

pytest.importorskip("triton")
from fastvr.kernels import dropout as kernels
from fastvr.kernels import linear as linear_kernels
from fastvr.kernels.common import record_launches

D, HIDDEN, HEADS = 64, 96, 2
HALVES = {
    "attention": {
        "ln_weight": (D,),
        "ln_bias": (D,),
        "qkv_weight": (3 * D, D),
        "qkv_bias": (3 * D,),
        "proj_weight": (D, D),
        "proj_bias": (D,),
    },
    "mlp": {
        "ln_weight": (D,),
        "ln_bias": (D,),
        "fc1_weight": (HIDDEN, D),
        "fc1_bias": (HIDDEN,),
        "fc2_weight": (D, HIDDEN),
        "fc2_bias": (D,),
    },
}


def seed(device, value=7):
    generator = torch.Generator().manual_seed(value)
    return torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator).to(device)


def of_linear(rows, k, n, dtype, device, **rest):
    given = {
        "x": randn(*rows, k, dtype=dtype, device=device),
        "weight": randn(n, k, dtype=dtype, device=device) * k**-0.5,
        "bias": randn(n, dtype=dtype, device=device),
        "gamma": randn(n, dtype=dtype, device=device),
        "residual": randn(*rows, n, dtype=dtype, device=device),
    } | rest
    for value in given.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_()
    return {"dropout_p": 0.3, "seed": seed(device)} | given


def eager(x, weight, bias=None, *, gamma=None, residual=None, act="none", sample_scale=None, **drop):
    return reference(x, weight, bias, gamma, residual, act, sample_scale, **drop)


def parameters(half, dtype, device):
    given = {name: randn(*size, dtype=dtype, device=device) for name, size in HALVES[half].items()}
    return {name: value * D**-0.5 if value.dim() == 2 else value for name, value in given.items()}


def of_half(half, dtype, device, *, wanted=None, rows=(2, 9), p=0.3):
    """The training form's arguments: all kinds of dropout, and what stands behind it."""
    given = parameters(half, dtype, device)
    given |= {name: randn(*rows, D, dtype=dtype, device=device) for name in ("x", "residual")}
    given["gamma"] = randn(D, dtype=dtype, device=device)
    for name, value in given.items():
        value.requires_grad_(wanted is None or name in wanted)
    scale = torch.tensor([2.0, 1.0], device=device)
    if half == "attention":
        numbers = {"num_heads": HEADS, "scale": 0.2, "eps": 1e-6}
        drop = {"dropout_p": p, "seed": seed(device), "proj_dropout_p": p, "proj_seed": seed(device, 8)}
    else:
        numbers = {"eps": 1e-6, "act": "gelu"}
        drop = {"hidden_dropout_p": p, "hidden_seed": seed(device), "dropout_p": p, "seed": seed(device, 8)}
    return given | numbers | {"sample_scale": scale} | drop


def check_half(half, given):
    op, twin = {
        "attention": (LAYERNORM_ATTENTION_TRAINING, attention_reference.layernorm_attention),
        "mlp": (LAYERNORM_MLP_TRAINING, mlp_reference.layernorm_mlp),
    }[half]
    names = [argument.name for argument in op.overload._schema.arguments]

    def ours(**given):
        return op(*(given[name] for name in names))[0]

    with triton_forced(), backend.observe() as ran:
        check_op(ours, twin, given, name=half, sample_inputs=("x", "residual"))
    assert all(implementation == "triton" for _, implementation in ran)
    return ran


# ------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize("p", [0.01, 0.5, 0.99])
def test_how_many_stay(p):
    x = torch.ones(300, 250, dtype=torch.float64)
    y = dropout.dropout(x, p, seed("cpu"))
    stays = y > 0
    assert torch.equal(y, stays.double() * (1 / (1 - p)))
    share = float(stays.double().mean())
    assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / x.numel())
    assert not torch.equal(stays, dropout.dropout(x, p, seed("cpu", 8)) > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype, device):
    x = randn(7, 150, dtype=dtype, device=device)[:, 19:]
    for rows in (x, x.t(), x[:0], x[:, :1], x[:1].expand(5, -1)):
        given = {"rows": rows, "p": 0.4, "seed": seed(device)}
        with triton_forced(), backend.observe() as ran:
            check_op(lambda rows, p, seed: DROPOUT(rows, p, seed), DROPOUT.reference, given, backward=False)
        assert ran["dropout", "triton"] == 1
    with triton_forced():
        narrow = DROPOUT(x, 0.4, seed(device), torch.bfloat16)
    assert torch.equal(narrow, dropout.dropout(x.float(), 0.4, seed(device)).bfloat16())


def test_every_configuration_drops_the_same(device):
    x = randn(13, 100, device=device)
    expected = dropout.dropout(x, 0.2, seed(device))
    for arch in ("interpreter", "sm_90"):
        for config in kernels.candidate_configs(100, arch):
            with tuning.force_config("dropout", config), triton_forced():
                assert torch.equal(DROPOUT(x, 0.2, seed(device)), expected)


# ------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype, device):
    scale = torch.tensor([1.5, 0.0, 1.0], device=device)
    for given in (
        of_linear((3, 7), 31, 65, dtype, device) | {"sample_scale": scale},
        of_linear((5,), 31, 130, dtype, device, gamma=None, residual=None, act="gelu"),
    ):
        with triton_forced(), backend.observe() as ran:
            check_op(linear, eager, given, sample_inputs=("x", "residual"))
        assert ran["linear", "triton"] >= 1
        assert ran["dropout", "triton"] == 1


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "gamma", "residual"])
def test_only_what_is_asked_for(wanted, device):
    given = of_linear((3, 7), 31, 65, torch.float32, device)
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_(name == wanted)
    with triton_forced(), backend.observe() as ran:
        check_op(linear, eager, given, sample_inputs=("x", "residual"))
    assert ran["dropout", "triton"] == (wanted != "residual")


def test_every_configuration(device):
    given = of_linear((3, 25), 100, 72, torch.bfloat16, device)
    every = linear_kernels.candidate_configs(torch.bfloat16, "sm_90", m=20, dropout=True)
    for config in every:
        if not config.keys() & {"PERSISTENT", "SPLIT_K"}:
            continue  # other tests have single tiles
        with tuning.force_config("linear", config), triton_forced():
            check_op(linear, eager, given, backward=False)


def test_almost_nothing_and_everything(device):
    given = of_linear((2, 5), 31, 65, torch.float32, device, residual=None)
    with triton_forced():
        check_op(linear, eager, given | {"dropout_p": 1e-300})
        y = linear(**given | {"dropout_p": 1.0})
        grads = torch.autograd.grad(y, [given[name] for name in ("x", "weight", "bias", "gamma")], y + 1)
    assert not y.any()
    assert not any(grad.any() for grad in grads)


def test_a_dropped_infinity_is_nan_as_pytorchs_is(device):
    given = of_linear((4,), 31, 65, torch.float32, device, gamma=None, residual=None, bias=None)
    x = given["x"].detach().clone()
    x[1] = float("inf")
    with triton_forced(), torch.no_grad():
        clean, y = linear(**given), linear(**given | {"x": x})
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])
    assert y[1][clean[1] == 0].isnan().all()
    assert torch.nn.functional.dropout(torch.full((99,), float("inf")), 0.5).isnan().any()


def test_a_seed_is_read_on_the_device(device):
    """As in a CUDA graph that is replayed: what is drawn is in the tensor, and not in the launch."""
    given, drawn = of_linear((4,), 31, 65, torch.float32, device), seed(device)
    with triton_forced(), torch.no_grad():
        first, other = linear(**given | {"seed": drawn}), linear(**given | {"seed": seed(device, 8)})
        drawn.copy_(seed(device, 8))
        assert torch.equal(linear(**given | {"seed": drawn}), other)
    assert not torch.equal(first, other)


def test_the_generator_decides(device):
    given = of_linear((2, 9), 31, 65, torch.float32, device, seed=None)

    def run(p):
        y = linear(**given | {"dropout_p": p})
        return y, torch.autograd.grad(y, given["weight"], torch.ones_like(y))[0]

    with triton_forced():
        torch.manual_seed(1)
        first, second = run(0.4), run(0.4)
        torch.manual_seed(1)
        again = run(0.4)
        torch.manual_seed(1)
        undropped = torch.rand(1)
        torch.manual_seed(1)
        run(0.0)
        assert torch.equal(torch.rand(1), undropped)
    for one, other, same in zip(first, second, again, strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_elsewhere_pytorch_drops(device):
    given = of_linear((2, 9), 31, 65, torch.float32, device, seed=None)
    x, weight, bias, gamma, residual = (given[name] for name in ("x", "weight", "bias", "gamma", "residual"))
    with fastvr.use_backend("reference"):
        torch.manual_seed(1)
        y = linear(**given)
        torch.manual_seed(1)
        product = torch.nn.functional.linear(x, weight, bias)
        assert torch.equal(y, residual + torch.nn.functional.dropout(product, 0.3) * gamma)
        # but a seed is a seed
        given["seed"] = seed(device)
        assert torch.equal(linear(**given), eager(**given))


# ------------------------------------------------------------------------------------- halves of a block


@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize("half", HALVES)
def test_halves_of_a_block(half, dtype, device):
    ran = check_half(half, of_half(half, dtype, device))
    assert ran["dropout", "triton"] == 1


@pytest.mark.parametrize(
    ("half", "wanted"),
    [
        ("attention", "proj_bias"),
        ("attention", "qkv_bias"),
        ("attention", "residual"),
        ("mlp", "fc2_bias"),
        ("mlp", "fc2_weight"),
        ("mlp", "fc1_bias"),
        ("mlp", "residual"),
    ],
)
def test_only_what_is_asked_of_a_half(half, wanted, device):
    check_half(half, of_half(half, torch.float32, device, wanted=(wanted,)))


@pytest.mark.parametrize("kind", ["layernorm_linear", "linear_act_backward"])
def test_an_mlp_with_k_split(kind, device):
    """What a second launch sums is dropped there."""
    tile = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 8, "SPLIT_K": 2}
    with tuning.force_config(kind, tile | {"num_warps": 4, "num_stages": 1}):
        check_half("mlp", of_half("mlp", torch.bfloat16, device))


@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_back_through_an_activation(act, device):
    given = {
        "grad": randn(12, 40, dtype=torch.float16, device=device),
        "weight": randn(40, 72, dtype=torch.float16, device=device) * 40**-0.5,
        "hidden": randn(12, 72, dtype=torch.float16, device=device),
        "seed": seed(device),
    }

    def ours(grad, weight, hidden, seed):
        return list(LINEAR_ACT_BACKWARD(grad, weight, hidden, act, True, None, 0.3, seed))

    def twin(grad, weight, hidden, seed):
        return list(LINEAR_ACT_BACKWARD.reference(grad, weight, hidden, act, True, None, 0.3, seed))

    with triton_forced():
        check_op(ours, twin, given, backward=False)


@pytest.mark.parametrize("half", HALVES)
def test_one_launch_more_and_no_mask_is_kept(half, device):
    op = {"attention": LAYERNORM_ATTENTION_TRAINING, "mlp": LAYERNORM_MLP_TRAINING}[half]
    counts, kept = [], []
    for p in (0.0, 0.1):
        given, seeds = of_half(half, torch.bfloat16, device, p=p), []
        if p == 0:
            given |= {name: None for name in given if "seed" in name}
        wanted = [t for t in given.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        with (
            triton_forced(),
            record_launches(lambda *launch, seeds=seeds: seeds.append(launch[2].get("seed_ptr"))),
        ):
            y = op(*(given[argument.name] for argument in op.overload._schema.arguments))[0]
            saved = [t for t in y.grad_fn.saved_tensors if t.dtype != torch.int64]
            torch.autograd.grad(y, wanted, torch.ones_like(y))
        assert any(seed is not None for seed in seeds) == (p > 0)
        counts.append(len(seeds))
        kept.append(sum(t.numel() * t.element_size() for t in saved))
    assert counts[1] == counts[0] + 1
    assert kept[1] == kept[0]


def test_without_a_gradient_an_mlp_drops_too(device):
    given = parameters("mlp", torch.float32, device) | {"x": randn(2, 9, D, device=device)}
    with triton_forced(), torch.no_grad():
        y = layernorm_mlp(**given, dropout_p=0.5)
        hidden = layernorm_mlp(**given, hidden_dropout_p=1.0)
    assert 0.3 < float((y == 0).double().mean()) < 0.7
    assert torch.equal(hidden, given["fc2_bias"].expand_as(hidden))


def test_a_block(device):
    """As under autocast: the residual stream in float32, and what products read in bfloat16."""
    given = {"x": randn(2, 9, D, device=device)}
    for prefix, half in (("attn_", "attention"), ("mlp_", "mlp")):
        for name, value in parameters(half, torch.float32, device).items():
            given[prefix + name] = value if name.startswith("ln") else value.bfloat16()
    for value in given.values():
        value.requires_grad_()
    given |= {"num_heads": HEADS, "scale": 0.2, "attn_eps": 1e-6, "mlp_eps": 1e-6, "act": "gelu"}
    for i, name in enumerate(("attn_", "attn_proj_", "mlp_hidden_", "mlp_")):
        given |= {f"{name}dropout_p": 0.1 * (i + 1), f"{name}seed": seed(device, i)}

    def ours(**given):
        return TRANSFORMER_BLOCK_TRAINING(*(given.get(name) for name in Arguments._fields))[0]

    def twin(**given):
        return TRANSFORMER_BLOCK_TRAINING.reference(*(given.get(name) for name in Arguments._fields))[0]

    with triton_forced(), backend.observe() as ran:
        check_op(ours, twin, given, name="transformer_block")
    assert ran["dropout", "triton"] == 2
    assert not any(implementation == "reference" for _, implementation in ran)


def by_references(patch):
    """Every op by its reference, which autograd differentiates; seeds are drawn as where kernels run."""
    patch.setattr(Op, "__call__", lambda op, *args: op.reference(*args))
    patch.setattr(Op, "runs", lambda op, *args: True)


def gradients(model, x, upstream):
    torch.manual_seed(5)
    logits = model(x)
    found = torch.autograd.grad(logits, list(model.parameters()), upstream.to(logits))
    return dict(zip(dict(model.named_parameters()), found, strict=True)) | {"logits": logits.detach()}


def test_a_vit_in_training(device, monkeypatch):
    """All parameters' gradients beside what autograd makes of the references, with the same masks."""
    options = {"img_size": 16, "patch_size": 8, "embed_dim": D, "depth": 2, "num_heads": HEADS}
    model = fastvr.ViT(**options, mlp_ratio=1, num_classes=5, proj_drop_rate=0.1).to(device).train()
    x, upstream = randn(3, 3, 16, 16, device=device), randn(3, 5, device=device)
    with triton_forced(), backend.observe() as ran:
        actual = gradients(model, x, upstream)
    assert not any(implementation == "reference" for _, implementation in ran)
    # of the last block a class token's share alone
    assert ran["layernorm_attention_training", "triton"] == 1
    assert ran["layernorm_mlp_training", "triton"] == 2
    assert ran["dropout", "triton"] == 4
    exact = truth_model(model)
    by_references(monkeypatch)
    with triton_forced():
        eager, truth = gradients(model, x, upstream), gradients(exact, x.double(), upstream)
    for name, value in actual.items():
        kind = "forward" if name == "logits" else "gradient"
        assert_parity(value, eager[name], truth[name], kind=kind, name=name, sample_dim=None)


@pytest.mark.parametrize(("norm_first", "act", "count"), [(True, "swiglu", 2), (False, "gelu", 3)])
def test_modules(norm_first, act, count, device):
    """Where no op does a half, those of each layer drop; in eval nothing does. SwiGLU's hidden values are
    PyTorch's to drop."""
    options = {"mlp_ratio": 1, "proj_drop": 0.5, "drop_path": 0.5}
    block = Block(D, HEADS, norm_first=norm_first, act=act, **options).to(device)
    x = randn(2, 5, D, device=device)
    with triton_forced(), backend.observe() as ran:
        block(x).square().mean().backward()
    assert ran["dropout", "triton"] == count
    assert not any(implementation == "reference" for _, implementation in ran)
    assert all(p.grad.isfinite().all() for p in block.parameters())
    with triton_forced(), torch.no_grad():
        whole = block.eval()(x)
        for module in block.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        assert torch.equal(block(x), whole)


def test_a_hook_sees_what_is_dropped(device):
    mlp, seen = Mlp(D, HIDDEN, drop=0.5).to(device).train(), []
    mlp.drop1.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    with triton_forced():
        mlp(randn(2, 3, D, device=device)).square().mean().backward()
    ((before, after),) = seen
    assert torch.equal(after, torch.where(after == 0, 0.0, before * 2))


# ------------------------------------------------------------------------------------- contracts


def test_operators(device):
    with triton_forced():
        given = of_linear((3, 7), 24, 40, torch.float32, device)
        names = ("x", "weight", "bias", "gamma", "residual")
        args = [*(given[name] for name in names), "none", None, 0.3, given["seed"]]
        few = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(LINEAR.overload, args, test_utils=few)
        rows = randn(6, 24, device=device)
        torch.library.opcheck(DROPOUT.overload, (rows, 0.3, seed(device), torch.bfloat16), test_utils=few)
        args = (rows, randn(24, 40, device=device), randn(6, 40, device=device), "gelu", True, None, 0.3)
        torch.library.opcheck(LINEAR_ACT_BACKWARD.overload, (*args, seed(device)), test_utils=few)
        given, op = of_half("mlp", torch.float32, device), LAYERNORM_MLP_TRAINING.overload
        args = [given[argument.name] for argument in op._schema.arguments]
        torch.library.opcheck(op, args, test_utils=few)


def test_a_tuner_holds_whole_batches(device):
    """A sample's mask depends on where in its batch it lies."""
    args = randn(200, 8, device=device), randn(8, 8, device=device), None, None, None, "none", None, 0.3
    args = (*args, seed(device))
    with triton_forced():
        Gate(Call("linear", args, "", (), Cost(0, 0)), args).check()


def test_seeds_are_drawn_together(device):
    x = torch.zeros(1, device=device)
    torch.manual_seed(3)
    first, nothing, second = draw_seeds(x, 0.1, 0.0, 0.5)
    torch.manual_seed(3)
    assert nothing is None
    assert torch.equal(torch.stack([first, second]), torch.randint(2**63 - 1, (2, 2), device=device))
    assert draw_seeds(x, 0.0, 0.0) == [None, None]


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan"), True, "half"])
def test_bad_probabilities(p):
    x = torch.zeros(2, D)
    with pytest.raises(ValueError, match="linear: dropout_p must be a number from 0 to 1; got"):
        linear(x, torch.zeros(3, D), dropout_p=p)
    for name in ("hidden_dropout_p", "dropout_p"):
        with pytest.raises(ValueError, match=f"layernorm_mlp: {name} must be a number from 0 to 1; got"):
            layernorm_mlp(x, **parameters("mlp", torch.float32, "cpu"), **{name: p})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "must be a torch.Tensor; got int"),
        (torch.zeros(3).long(), r"must be \[2\] torch.int64; got \[3\] torch.int64"),
        (torch.zeros(2), r"must be \[2\] torch.int64; got \[2\] torch.float32"),
        (torch.zeros(2, device="meta").long(), "must be on cpu, where x is; got meta"),
    ],
    ids=["number", "shape", "dtype", "device"],
)
def test_bad_seeds(value, message):
    with pytest.raises(ValueError, match=f"linear: seed {message}"):
        linear(torch.zeros(2, D), torch.zeros(3, D), dropout_p=0.1, seed=value)
