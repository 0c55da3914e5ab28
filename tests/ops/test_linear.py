from __future__ import annotations

import pytest
import torch
from contract import (
    DTYPES,
    GRID,
    assert_autocast,
    assert_batch_invariant,
    assert_compiles,
    assert_nan_stays_in_its_sample,
    assert_order_does_not_matter,
    randn,
    triton_forced,
)

from fastvr import backend, tuning
from fastvr.ops.linear import LINEAR, linear
from fastvr.reference.linear import linear as reference
from fastvr.testing import GELU_TAIL, check_op

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvr.kernels import common
from fastvr.kernels import linear as kernels

WIDTHS = [(1, 1), (31, 192), (192, 31), (384, 768), (768, 384), (1023, 65), (65, 1500), (1280, 16)]


def inputs(rows, k, n, dtype, device, **parts):
    given = {
        "x": randn(*rows, k, dtype=dtype, device=device),
        "weight": randn(n, k, dtype=dtype, device=device) * k**-0.5,
        "bias": randn(n, dtype=dtype, device=device),
        "gamma": randn(n, dtype=dtype, device=device),
        "residual": randn(*rows, n, dtype=dtype, device=device),
    }
    return {name: t for name, t in given.items() if parts.get(name, True)} | {"act": parts.get("act", "none")}


def check(given, **options):
    floor = GELU_TAIL if given["act"] == "gelu" else 0.0
    if "gamma" in given:
        floor *= given["gamma"].detach().abs().double()
    with triton_forced():
        return check_op(linear, reference, given, absolute_floor=floor, name="linear", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), WIDTHS)
def test_widths(k, n, dtype, device):
    check(inputs((2, 37), k, n, dtype, device), backward=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["none", "relu", "gelu", "gelu_tanh", "quick_gelu"])
def test_activations(act, dtype, device):
    check(inputs((3, 50), 192, 96, dtype, device, act=act), backward=False)


@pytest.mark.parametrize("missing", [(), ("bias",), ("gamma",), ("residual",), ("bias", "gamma", "residual")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_part_is_optional_and_has_its_gradient(missing, dtype, device):
    given = inputs((4, 9), 40, 24, dtype, device, act="gelu", **dict.fromkeys(missing, False))
    for value in given.values():
        if isinstance(value, torch.Tensor):
            value.requires_grad_()
    check(given, sample_inputs=("x", "residual"))


@pytest.mark.parametrize("rows", [(1,), (2,), (7,), (1025,), (2, 3, 5)], ids=str)
def test_rows(rows, device):
    check(inputs(rows, 64, 48, torch.bfloat16, device), backward=False)


@pytest.mark.parametrize("arch", ["interpreter", "sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(arch, dtype, device):
    given = inputs((2, 75), 200, 136, dtype, device, act="gelu")
    for config in kernels.candidate_configs(dtype, arch, m=20):
        with tuning.force_config("linear", config):
            check(given, backward=False)


CHOICES = {
    "tma": {"TMA": 1},
    "persistent": {"PERSISTENT": 1},
    "persistent tma": {"TMA": 1, "PERSISTENT": 1},
    "split": {"SPLIT_K": 3},
    "split tma": {"TMA": 1, "SPLIT_K": 2},
    "more slices than blocks": {"SPLIT_K": 8},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_choice_of_the_kernel(choice, dtype, device):
    tile = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 2, "num_warps": 4, "num_stages": 1}
    # K is no multiple of a block, M and N are none of a tile, and a program of a persistent grid has several
    given = inputs((3, 60), 200, 264, dtype, device, act="gelu")
    with tuning.force_config("linear", tile | CHOICES[choice]):
        check(given, backward=False)


def test_descriptors_only_where_tma_can_read(device):
    launched = []

    def kinds(x, weight):
        launched.clear()
        config = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "TMA": 1, "PERSISTENT": 1}
        with triton_forced(), tuning.force_config("linear", config | {"num_warps": 4, "num_stages": 1}):
            check({"x": x, "weight": weight, "act": "none"}, backward=False)
            with common.record_launches(lambda *launch: launched.append(launch)):
                linear(x, weight)
        ((_, _, arguments, _),) = launched
        described = [isinstance(arguments[name], TensorDescriptor) for name in ("x", "weight")]
        assert described == [bool(arguments["TMA"])] * 2
        assert arguments["PERSISTENT"] == arguments["TMA"]
        return bool(arguments["TMA"])

    dtype = torch.bfloat16
    x, weight = randn(9, 72, dtype=dtype, device=device), randn(40, 72, dtype=dtype, device=device)
    assert kinds(x, weight)
    assert kinds(randn(9, 3, 72, dtype=dtype, device=device)[:, 1], weight)
    assert not kinds(x.float(), weight.float())
    assert not kinds(x[:, :60].contiguous(), weight[:, :60].contiguous())  # rows of 120 bytes
    assert not kinds(randn(9, 80, dtype=dtype, device=device)[:, 4:76], weight)  # begins at 8 bytes
    assert not kinds(randn(72, 9, dtype=dtype, device=device).t(), weight)
    assert not kinds(x[:1].expand(9, 72), weight)


def test_a_split_product_is_the_same_every_time(device):
    x, weight = randn(90, 200, device=device), randn(70, 200, device=device)
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 8, "SPLIT_K": 4}
    with tuning.force_config("linear", config | {"num_warps": 4, "num_stages": 1}):
        assert_order_does_not_matter(lambda: linear(x, weight, act="gelu"))
        assert_batch_invariant(lambda x: linear(x, weight), x)


@pytest.mark.parametrize("rows", [1, 32, 33, 20000])
def test_default_is_a_candidate(rows):
    for arch in GRID.architectures:
        for dtype in DTYPES:
            config = kernels.default_config(rows, 768, dtype, arch)
            assert config in kernels.candidate_configs(dtype, arch)


def test_layouts(device):
    whole = randn(20, 9, 64, device=device)
    weight, bias = randn(130, 64, device=device), randn(130, device=device)
    for x in (
        whole[:, 0],
        whole[:, 2:],
        whole.transpose(0, 1),
        whole[:1].expand(20, 9, 64),
        randn(20, 9, 128, device=device)[..., ::2],
        randn(20, 64, 9, device=device).transpose(1, 2),
    ):
        residual = randn(130, *x.shape[:-1], device=device).movedim(0, -1)
        given = {"x": x, "weight": weight, "bias": bias, "residual": residual, "act": "none"}
        check(given, backward=False)
    vectors = {
        "bias": randn(260, device=device)[::2],
        "gamma": randn(1, device=device).expand(130),
    }
    check({"x": whole, "weight": weight, "act": "none"} | vectors, backward=False)
    check({"x": whole, "weight": weight.t().contiguous().t(), "act": "none"}, backward=False)
    check({"x": whole, "weight": randn(96, 64, device=device)[::2], "act": "none"}, backward=False)


def test_features_that_lie_far_apart():
    """The kernel steps along them in 32 bits."""
    far, launched = torch.empty_strided((8, 64), (1, 2**25), device="meta"), []
    with triton_forced(), backend.assume_architecture("sm_90"):
        for x, weight in ((far, torch.empty(8, 64, device="meta")), (torch.empty(8, 64, device="meta"), far)):
            with common.record_launches(lambda *launch: launched.append(launch)):
                LINEAR.kernel(x, weight, None, None, None, "none")
    assert [(given["stride_xk"], given["stride_wk"]) for _, _, given, _ in launched] == [(1, 1), (1, 1)]


@pytest.mark.parametrize("rows", [(0,), (0, 5), (5, 0)])
def test_empty(rows, device):
    with triton_forced():
        y = linear(randn(*rows, 16, device=device), randn(8, 16, device=device))
    assert y.shape == (*rows, 8)


def test_float32_residual_and_gamma_beside_bfloat16(device):
    given = inputs((2, 20), 96, 64, torch.bfloat16, device)
    given["residual"], given["gamma"] = given["residual"].float(), given["gamma"].float()
    check(given, backward=False)
    with triton_forced():
        assert linear(**given).dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("act", ["relu", "gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_arguments(value, act, dtype, device):
    """bias alone makes the argument, so that it reaches the activation as it is."""
    given = {
        "x": torch.zeros(3, 16, dtype=dtype, device=device),
        "weight": torch.zeros(16, 16, dtype=dtype, device=device),
        "bias": torch.full((16,), value, dtype=dtype, device=device),
        "act": act,
    }
    check(given, backward=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_over_its_whole_range(dtype, device):
    points = torch.linspace(-12, 12, 2048, dtype=torch.float64).to(dtype).to(device)
    given = {
        "x": torch.zeros(2, 16, dtype=dtype, device=device),
        "weight": torch.zeros(2048, 16, dtype=dtype, device=device),
        "bias": points,
        "act": "gelu",
    }
    tail = torch.where(points < -4, GELU_TAIL, 0.0).double()
    with triton_forced():
        check_op(linear, reference, given, backward=False, absolute_floor=tail, name="gelu")


def test_nan_stays_in_its_sample(device):
    weight, bias = randn(24, 48, device=device), randn(24, device=device)
    assert_nan_stays_in_its_sample(
        lambda x: linear(x, weight, bias, act="gelu"), randn(5, 7, 48, device=device)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    weight = randn(24, 48, dtype=dtype, device=device)
    x = randn(9, 7, 48, dtype=dtype, device=device)
    config = kernels.candidate_configs(dtype, "sm_90")[-1]
    with tuning.force_config("linear", config):
        assert_batch_invariant(lambda x: linear(x, weight, act="relu"), x)


def test_the_order_of_programs_does_not_matter(device):
    x, weight = randn(90, 48, device=device), randn(130, 48, device=device)
    with tuning.force_config("linear", kernels.candidate_configs(torch.float32, "sm_90")[-1]):
        assert_order_does_not_matter(lambda: linear(x, weight, act="gelu"))


def test_compiles_and_exports(device):
    given = inputs((2, 5), 24, 16, torch.float32, device, act="gelu")
    act = given.pop("act")
    tensors = [t.requires_grad_() for t in given.values()]

    def call(x, weight, bias, gamma, residual):
        return linear(x, weight, bias, act=act, gamma=gamma, residual=residual)

    assert_compiles(call, tensors)
    with triton_forced():
        torch.library.opcheck(LINEAR.overload, (*tensors, act))
        torch.library.opcheck(LINEAR.overload, (tensors[0], tensors[1], None, None, None, "none"))


@pytest.mark.parametrize("with_residual", [True, False])
def test_autocast_is_eagers(with_residual, device):
    given = inputs((4, 40), 24, 16, torch.float32, device, gamma=False, residual=with_residual)
    assert_autocast(linear, reference, **given)


def test_only_the_gradients_asked_for(device):
    x, weight = randn(4, 8, device=device), randn(6, 8, device=device, requires_grad=True)
    with triton_forced():
        y = linear(x, weight)
        (grad,) = torch.autograd.grad(y, [weight], torch.ones_like(y))
    assert grad.shape == weight.shape
    with triton_forced():
        assert not linear(x, weight.detach()).requires_grad


def test_forward_mode_is_refused_by_name(device):
    x, weight = randn(4, 8, device=device), randn(6, 8, device=device)
    with triton_forced(), pytest.raises(NotImplementedError, match="linear has no forward-mode derivative"):
        torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))
    with backend.use_backend("reference"):
        _, tangent = torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))
    assert torch.equal(tangent, reference(x, weight))


def test_second_derivative_is_refused_by_name(device):
    x = randn(4, 8, device=device, requires_grad=True)
    with triton_forced():
        y = linear(x, randn(6, 8, device=device))
        with pytest.raises(NotImplementedError, match="linear has no second derivative"):
            torch.autograd.grad(y, [x], randn(4, 6, device=device), create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x must be a torch.Tensor; got list"),
        (
            {"x": torch.zeros(2, 8, dtype=torch.int32)},
            "x must be float32, float16, bfloat16 or float64; got torch.int32",
        ),
        ({"x": torch.zeros(2, 7)}, r"x must be \[\.\.\., 8\] for a weight of \[4, 8\]; got \[2, 7\]"),
        ({"x": torch.tensor(1.0)}, r"x must be \[\.\.\., 8\]"),
        ({"weight": torch.zeros(4, 8, 1)}, r"weight must be \[out_features, in_features\]; got \[4, 8, 1\]"),
        ({"weight": torch.zeros(4, 8, dtype=torch.float16)}, "weight must be torch.float32"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \[4\]; got \[5\]"),
        ({"bias": torch.zeros(4, dtype=torch.float16)}, "bias must be torch.float32, as the operands are"),
        ({"gamma": torch.zeros(3)}, r"gamma must have shape \[4\]; got \[3\]"),
        ({"residual": torch.zeros(2, 5)}, r"residual must have shape \[2, 4\]; got \[2, 5\]"),
        ({"residual": torch.zeros(2, 4, device="meta")}, "residual must be on cpu, where x is; got meta"),
        (
            {"act": "swish"},
            "act must be one of 'none', 'relu', 'gelu', 'gelu_tanh', 'quick_gelu'; got 'swish'",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_bad_input_names_the_argument(change, message, mode):
    given = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8), "bias": torch.zeros(4)} | change
    with backend.use_backend(mode), pytest.raises(ValueError, match=f"linear: {message}"):
        linear(**given)


def test_float64_has_no_kernel(device):
    x, weight = (
        randn(2, 8, dtype=torch.float64, device=device),
        randn(4, 8, dtype=torch.float64, device=device),
    )
    with (
        triton_forced(),
        pytest.raises(backend.BackendError, match="linear: no Triton kernel runs here: dtype"),
    ):
        linear(x, weight)
    assert torch.equal(linear(x, weight), reference(x, weight))


def test_flops_are_counted(device):
    from torch.utils.flop_counter import FlopCounterMode

    with triton_forced(), FlopCounterMode(display=False) as counter:
        linear(randn(3, 5, 8, device=device), randn(4, 8, device=device))
    assert counter.get_total_flops() == 2 * 15 * 4 * 8
