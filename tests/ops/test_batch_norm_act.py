from __future__ import annotations

import pytest
import torch
from contract import (
    DTYPES,
    assert_compiles,
    assert_order_does_not_matter,
    randn,
    triton_forced,
)

from fastvr import backend, tuning
from fastvr.ops.batch_norm_act import BATCH_NORM_ACT, BATCH_NORM_ACT_BACKWARD, batch_norm_act
from fastvr.reference import batch_norm_act as reference
from fastvr.testing import assert_parity, check_op

pytest.importorskip("triton")
from fastvr.kernels import batch_norm_act as kernels
from fastvr.kernels import batch_norm_stats as layout

OPS = ("batch_norm_act", "batch_norm_act_backward")
# several programs and parts even of a small map
GIVEN = ("running_mean", "running_var")
SEVERAL = layout.candidate_configs(64, torch.float32, "interpreter")[1]


def check(given, **options):
    with triton_forced():
        return check_op(batch_norm_act, reference.batch_norm_act, given, name="batch_norm_act", **options)


def image(*shape, **options):
    return randn(*shape, **options).to(memory_format=torch.channels_last)


def inputs(shape, dtype, device, *, residual=False, act="relu", parameters=None, grad=True):
    parameters = parameters or dtype
    given = {
        "x": image(*shape, dtype=dtype, device=device),
        "weight": (1 + randn(shape[1]) / 2).to(parameters).to(device),
        "bias": randn(shape[1], dtype=parameters, device=device),
        "residual": image(*shape, dtype=dtype, device=device) if residual else None,
        "act": act,
    }
    for value in given.values():
        if isinstance(value, torch.Tensor):
            value.requires_grad_(grad)
    return given


class Several:
    """Both ops with a configuration that makes several programs."""

    def __enter__(self):
        self.forced = [tuning.force_config(op, SEVERAL) for op in OPS]
        for one in self.forced:
            one.__enter__()

    def __exit__(self, *error):
        for one in self.forced:
            one.__exit__(*error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_values_statistics_and_gradients(residual, act, dtype, device):
    check(inputs((3, 40, 9, 7), dtype, device, residual=residual, act=act))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 1), (7, 31, 1, 1), (1, 3, 31, 2), (2, 512, 2, 2), (2, 64, 56, 14), (1, 130, 7, 7)]
)
def test_shapes(shape, dtype, device):
    check(inputs(shape, dtype, device, residual=True))


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
@pytest.mark.parametrize("channels", [48, 130])
def test_every_configuration(channels, arch, device):
    given = inputs((2, channels, 11, 9), torch.float16, device, residual=True)
    for config in layout.candidate_configs(channels, torch.float16, arch):
        with tuning.force_config(OPS[0], config), tuning.force_config(OPS[1], config):
            check(given)


def statistics(channels, dtype, device):
    return {
        "running_mean": randn(channels, dtype=dtype, device=device),
        "running_var": randn(channels, dtype=dtype, device=device).abs() + 0.5,
    }


def check_given(given, dtype, device):
    """The result alone: the statistics come back as they are."""
    given = given | statistics(given["x"].shape[1], dtype, device)
    with triton_forced():
        _, *same = batch_norm_act(**given)
        check_op(
            lambda **arguments: batch_norm_act(**arguments)[0],
            lambda **arguments: reference.batch_norm_act(**arguments)[0],
            given,
            name="batch_norm_act",
        )
    assert [id(t) for t in same] == [id(given["running_mean"]), id(given["running_var"])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_given_statistics(residual, act, dtype, device):
    check_given(inputs((3, 40, 9, 7), dtype, device, residual=residual, act=act), dtype, device)


def test_given_statistics_of_one_pixel_and_in_several_programs(device):
    check_given(inputs((1, 6, 1, 1), torch.float32, device), torch.float32, device)
    with Several():
        check_given(inputs((2, 48, 11, 9), torch.bfloat16, device, residual=True), torch.float32, device)


@pytest.mark.parametrize("asked", [("x",), ("weight",), ("residual",), ("x", "residual")], ids=str)
def test_only_what_is_asked_for_beside_given_statistics(asked, device):
    given = inputs((2, 8, 5, 4), torch.float32, device, residual=True, grad=False)
    for name in asked:
        given[name].requires_grad_()
    check_given(given, torch.float32, device)


def test_many_parts(device, monkeypatch):
    """More parts than the launch that merges them loads at a time, and several tiles in each."""
    monkeypatch.setattr(layout, "_PROGRAMS", 100)
    given = inputs((2, 5, 59, 47), torch.float32, device)
    with Several():
        assert len(range(0, 2 * 59 * 47, layout.rows_a_part(2 * 59 * 47, 5, SEVERAL))) > 64
        check(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mean", [100.0, 1000.0])
def test_mean_of_many_deviations(mean, dtype, device):
    """Sums of squares lose every digit here."""
    given = inputs((2, 33, 13, 11), dtype, device)
    with torch.no_grad():
        given["x"] += mean
    with Several():
        check(given)


def test_layouts(device):
    weight, bias = randn(12, device=device)[::2], randn(1, device=device).expand(6)
    wide = image(2, 12, 5, 4, device=device)
    for x in (
        randn(2, 6, 5, 4, device=device),
        wide[:, 3:9],
        wide[:, ::2],
        wide[:1, :6].expand(3, 6, 5, 4),
        randn(2, 6, 4, 5, device=device).transpose(2, 3),
    ):
        residual = randn(*x.shape, device=device).requires_grad_()
        check({"x": x.requires_grad_(), "weight": weight, "bias": bias, "residual": residual})


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_float32_parameters_and_residual_beside_bfloat16(residual_dtype, device):
    """As under autocast."""
    given = inputs((2, 20, 5, 6), torch.bfloat16, device, parameters=torch.float32)
    given["residual"] = randn(2, 20, 5, 6, dtype=residual_dtype, device=device).requires_grad_()
    check(given)
    check(given | {"act": "none"})


@pytest.mark.parametrize(
    "asked",
    [{"x"}, {"weight", "bias"}, {"bias"}, {"residual"}, {"x", "residual"}],
    ids=lambda asked: "-".join(sorted(asked)),
)
@pytest.mark.parametrize("act", ["relu", "none"])
def test_only_what_is_asked_for(asked, act, device, monkeypatch):
    given = inputs((2, 24, 5, 5), torch.float32, device, residual=True, act=act, grad=False)
    for name in asked:
        given[name].requires_grad_()
    launched = []
    launch = kernels.launch
    monkeypatch.setattr(
        kernels, "launch", lambda kernel, *args, **kw: (launched.append(kernel), launch(kernel, *args, **kw))
    )
    check(given)
    reduces = kernels._batch_norm_act_bwd_sums_kernel in launched
    writes = kernels._batch_norm_act_bwd_kernel in launched
    assert reduces == (asked != {"residual"})
    # without an activation the residual's gradient is the upstream one
    assert writes == ("x" in asked or ("residual" in asked and act == "relu"))


def test_what_is_kept_for_backward(device):
    """The map that came in, the one that went out where it shows the activation, and vectors."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    for act, maps in (("relu", 2), ("none", 1)):
        given = inputs((2, 24, 5, 5), torch.bfloat16, device, residual=True, act=act)
        kept.clear()
        with triton_forced(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            batch_norm_act(**given)
        assert sorted(kept) == [24] * 3 + [2 * 24 * 25] * maps


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_empty(mode, device):
    with backend.use_backend(mode):
        given = inputs((0, 6, 5, 4), torch.float32, device, residual=True)
        y, mean, var = batch_norm_act(**given)
        assert y.shape == (0, 6, 5, 4)
        assert mean.tolist() == var.tolist() == [0.0] * 6
        y.sum().backward()
        assert given["weight"].grad.tolist() == given["bias"].grad.tolist() == [0.0] * 6
        assert given["x"].grad.shape == given["residual"].grad.shape == y.shape


def test_one_pixel_a_channel_is_refused_as_pytorch_does(device):
    x, vector = torch.zeros(1, 6, 1, 1, device=device), torch.ones(6, device=device)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as ours:
        batch_norm_act(x, vector, vector)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as theirs:
        torch.nn.BatchNorm2d(6).to(device)(x)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_stays_in_its_channel(poison, device):
    given = inputs((2, 40, 9, 7), torch.float32, device)
    with triton_forced(), Several():
        clean = batch_norm_act(**given)
        upstream = torch.randn_like(clean[0])
        expected = torch.autograd.grad(clean[0], [given["x"], given["weight"]], upstream)
        with torch.no_grad():
            given["x"][1, 5, 2, 3] = poison
        poisoned = batch_norm_act(**given)
        found = torch.autograd.grad(poisoned[0], [given["x"], given["weight"]], upstream)
    others = [c for c in range(40) if c != 5]
    pairs = [(poisoned[0], clean[0], 1), (found[0], expected[0], 1), (found[1], expected[1], 0)]
    pairs += [(poisoned[1], clean[1], 0), (poisoned[2], clean[2], 0)]
    for after, before, dim in pairs:
        channels = torch.tensor(others, device=device)
        assert torch.equal(after.index_select(dim, channels), before.index_select(dim, channels))
        assert not torch.isfinite(after.select(dim, 5)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_of_programs_and_determinism(dtype, device):
    given = inputs((3, 40, 9, 7), dtype, device, residual=True)
    upstream = randn(3, 40, 9, 7, dtype=dtype, device=device)
    wanted = [value for value in given.values() if isinstance(value, torch.Tensor)]

    def everything():
        y, mean, var = batch_norm_act(**given)
        parts = (y, mean, var, *torch.autograd.grad(y, wanted, upstream))
        return torch.cat([part.float().flatten() for part in parts])

    with Several():
        with triton_forced():
            assert torch.equal(everything(), everything())
        assert_order_does_not_matter(everything)


def test_compiles_and_exports(device):
    given = inputs((2, 6, 5, 4), torch.float32, device, residual=True)
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
    assert_compiles(lambda x, w, b, r: batch_norm_act(x, w, b, residual=r)[0], tensors)
    x, weight, bias, residual = tensors
    with triton_forced():
        torch.library.opcheck(BATCH_NORM_ACT.overload, (x, weight, bias, 1e-5, residual, "relu", None, None))
        torch.library.opcheck(BATCH_NORM_ACT.overload, (x, weight, bias, 1e-5, None, "none", None, None))
        y, mean, var = (t.detach() for t in batch_norm_act(x, weight, bias))
        x, weight = x.detach(), weight.detach()
        torch.library.opcheck(BATCH_NORM_ACT.overload, (x, weight, bias, 1e-5, None, "relu", mean, var))
        rests = ((True, True, True, False), (False, True, False, False), (False, False, True, True))
        for rest in rests:
            args = (randn(*y.shape, device=device), x, y, mean, var, weight, None, 1e-5, *rest)
            torch.library.opcheck(BATCH_NORM_ACT_BACKWARD.overload, args)


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_op_alone(dtype, mode, device):
    """As where the forward pass ran on one implementation and the backward pass runs on the other."""
    given = inputs((2, 20, 5, 6), dtype, device, residual=True)
    exact = {n: v.detach().double() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    grad = image(2, 20, 5, 6, dtype=dtype, device=device)

    def gradients(given, grad):
        wanted = [v.requires_grad_() for v in given.values() if isinstance(v, torch.Tensor)]
        y, mean, var = reference.batch_norm_act(**given)
        return (y, mean, var), torch.autograd.grad(y, wanted, grad)

    (y, mean, var), eager = gradients(given, grad)
    _, truth = gradients(exact, grad.double())
    x, weight = given["x"].detach(), given["weight"].detach()
    with backend.use_backend(mode):
        found = BATCH_NORM_ACT_BACKWARD(
            grad, x, y.detach(), mean, var, weight, None, 1e-5, True, True, True, False
        )
    assert_parity(found, eager, truth, kind="gradient", sample_dim=None)


def test_a_second_derivative_is_refused(device):
    given = inputs((2, 6, 5, 4), torch.float32, device)
    with triton_forced(), pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(batch_norm_act(**given)[0].sum(), given["x"], create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 3, 3, dtype=torch.int64)}, "x must be float32, float16, bfloat16"),
        ({"x": torch.zeros(2, 8)}, r"x must be \[N, C, H, W\]; got \[2, 8\]"),
        ({"x": torch.zeros(2, 8, 0, 3)}, r"x must be \[N, C, H, W\]; got \[2, 8, 0, 3\]"),
        ({"weight": torch.zeros(7)}, r"weight must have shape \[8\]; got \[7\]"),
        ({"weight": torch.zeros(8, dtype=torch.float16)}, "weight must be torch.float32 or float32"),
        ({"bias": torch.zeros(8, dtype=torch.float16)}, "bias must be torch.float32"),
        ({"residual": torch.zeros(2, 8, 3, 1)}, r"residual must have shape \[2, 8, 3, 3\]"),
        ({"eps": 0.0}, "eps must be above 0; got 0.0"),
        ({"eps": float("nan")}, "eps must be above 0; got nan"),
        ({"act": "gelu"}, "act must be one of 'none', 'relu'; got 'gelu'"),
        ({"running_mean": torch.zeros(8)}, "running_var must be given with its companion"),
        (dict.fromkeys(GIVEN, torch.zeros(7)), r"running_mean must have shape \[8\]; got \[7\]"),
        (dict.fromkeys(GIVEN, torch.zeros(8).half()), "running_mean must be torch.float32 or float32"),
        (
            dict.fromkeys(GIVEN, torch.zeros(8, requires_grad=True)),
            "running_mean must not require a gradient",
        ),
    ],
)
def test_bad_input_names_the_argument(change, message):
    given = {"x": torch.zeros(2, 8, 3, 3), "weight": torch.zeros(8), "bias": torch.zeros(8)} | change
    for mode in ("triton", "reference"):
        with backend.use_backend(mode), pytest.raises(ValueError, match=f"batch_norm_act: {message}"):
            batch_norm_act(**given)
