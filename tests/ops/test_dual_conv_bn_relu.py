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
from fastvr.ops.conv_bn_relu import BatchNorm
from fastvr.ops.dual_conv_bn_relu import DUAL_CONV_BN_RELU, dual_conv_bn_relu
from fastvr.reference.dual_conv_bn_relu import dual_conv_bn_relu as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import dual_conv_bn_relu as kernels

# n, c, oh, ow, c2, o, stride
SHAPES = [
    (2, 64, 7, 7, 64, 128, 1),
    (2, 64, 4, 7, 128, 96, 2),
    (1, 31, 5, 3, 40, 31, (2, 1)),
    (3, 1, 1, 1, 3, 1, 3),
    (1, 512, 1, 2, 256, 64, 2),
]
TENSORS = ("x", "weight", "x2", "weight2")


def both(value):
    return (value, value) if isinstance(value, int) else value


def inputs(n, c, oh, ow, c2, o, stride, dtype, device, *, running=True, vector_dtype=None, act="relu"):
    sh, sw = both(stride)

    def image(*shape):
        return randn(*shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)

    def norm():
        mean, var = randn(o), randn(o).abs() + 0.5
        vectors = [randn(o), randn(o), *((mean, var) if running else ())]
        return BatchNorm(*(v.to(device, vector_dtype or torch.float32) for v in vectors))

    # rows and columns past the last that the stride takes, as an odd map has them
    return {
        "x": image(n, c, oh, ow),
        "weight": (randn(o, c, 1, 1) * c**-0.5).to(device, dtype),
        "bn": norm(),
        "x2": image(n, c2, oh * sh, ow * sw),
        "weight2": (randn(o, c2, 1, 1) * c2**-0.5).to(device, dtype),
        "bn2": norm(),
        "stride2": stride,
        "act": act,
    }


def twin(x, weight, bn, x2, weight2, bn2, *, stride2=1, act="relu"):
    return reference(x, weight, *bn, x2, weight2, *bn2, both(stride2), act)


def schema(given):
    g = given
    return (
        *(g["x"], g["weight"], *g["bn"], g["x2"], g["weight2"], *g["bn2"]),
        *(list(both(g["stride2"])), g["act"]),
    )


def launched(**given):
    """The kernel itself, and not its parts."""
    with backend.observe() as ran:
        y = dual_conv_bn_relu(**given)
    assert set(ran) == {("dual_conv_bn_relu", "triton")}
    return y


def check(given):
    with triton_forced():
        return check_op(
            launched, twin, given, backward=False, sample_inputs=("x", "x2"), name="dual_conv_bn_relu"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, device):
    check(inputs(*shape, dtype, device))


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("act", ["none", "relu"])
def test_norm_and_activation(running, act, device):
    given = inputs(2, 16, 3, 5, 24, 40, 2, torch.float16, device, running=running, act=act)
    check(given | {"bn2": given["bn2"]._replace(eps=1e-2)})
    check(given | {"bn": given["bn"]._replace(weight=None), "bn2": given["bn2"]._replace(bias=None)})
    check(given | {"bn": BatchNorm()})


def test_vectors_in_the_tensors_dtype_and_strided(device):
    given = inputs(2, 16, 3, 5, 24, 40, 2, torch.bfloat16, device, vector_dtype=torch.bfloat16)
    given["bn"] = BatchNorm(*(v.repeat_interleave(2)[::2] for v in given["bn"][:4]))
    check(given)


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(running, dtype, device):
    given = inputs(2, 16, 3, 5, 24, 40, 2, dtype, device, running=running)
    for t in (
        *(given[name] for name in TENSORS),
        *given["bn"][:2],
        *given["bn2"][:2],
    ):
        t.requires_grad_()
    with triton_forced(), backend.observe() as ran:
        check_op(dual_conv_bn_relu, twin, given, sample_inputs=("x", "x2"), name="dual_conv_bn_relu")
    # by its parts, each of which keeps what its gradient reads
    assert ran == {("conv_bn_relu", "triton"): 2}


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(gathered, dtype, device):
    shape = (1, 5, 4, 5, 7, 72, 2) if gathered else (1, 64, 4, 5, 128, 72, 2)
    given = inputs(*shape, dtype, device)
    tried = []
    for arch in ("interpreter", *GRID.architectures):
        for config in kernels.candidate_configs(dtype, arch, gathered=gathered):
            if config not in tried:
                tried.append(config)
                with tuning.force_config("dual_conv_bn_relu", config):
                    check(given)


@pytest.mark.parametrize("rows", [1, 64, 65, 3136, 200_704])
@pytest.mark.parametrize("gathered", [False, True])
def test_default_is_a_candidate(rows, gathered):
    for arch in GRID.architectures:
        for dtype in DTYPES:
            for n in (1, 64, 2048):
                config = kernels.default_config(rows, n, dtype, arch, gathered=gathered)
                assert config in kernels.candidate_configs(dtype, arch, gathered=gathered)


def layouts(t):
    """The same values in other layouts: contiguous, every other row and column of a larger tensor, an offset
    into one, H and W exchanged in memory."""
    n, c, h, w = t.shape
    yield t.contiguous()
    wide = torch.zeros(n, 2 * c, 2 * h, 2 * w, dtype=t.dtype, device=t.device)
    wide[:, ::2, ::2, ::2] = t
    yield wide[:, ::2, ::2, ::2]
    around = torch.zeros(n + 1, c + 3, h + 1, w + 2, dtype=t.dtype, device=t.device)
    around = around.to(memory_format=torch.channels_last)
    around[1:, 3:, 1:, 2:] = t
    yield around[1:, 3:, 1:, 2:]
    yield t.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("name", ["x", "weight", "x2", "weight2"])
def test_layouts(name, which, device):
    given = inputs(2, 16, 3, 5, 24, 40, 2, torch.bfloat16, device)
    given[name] = list(layouts(given[name]))[which]
    check(given)


def test_expanded(device):
    given = inputs(3, 16, 3, 5, 24, 40, 1, torch.float32, device)
    check(given | {"x": given["x"][:1].expand(3, -1, -1, -1)})
    check(given | {"x2": given["x2"][:, :, :1, :1].expand(-1, -1, 3, 5)})


def test_a_stride_that_leaves_pixels_over(device):
    given = inputs(2, 16, 3, 5, 24, 40, 2, torch.float32, device)
    check(given | {"x2": given["x2"][:, :, :5, :9]})


def test_result_is_channels_last_on_every_backend(device):
    given = inputs(2, 16, 3, 5, 24, 40, 2, torch.float32, device)
    given["x"], given["x2"] = given["x"].contiguous(), given["x2"].contiguous()
    for mode in ("triton", "reference", "auto"):
        with backend.use_backend(mode):
            assert dual_conv_bn_relu(**given).is_contiguous(memory_format=torch.channels_last)


def test_empty_batch(device):
    with triton_forced():
        assert launched(**inputs(0, 16, 3, 5, 24, 40, 2, torch.float32, device)).shape == (0, 40, 3, 5)


@pytest.mark.parametrize("name", ["x", "x2"])
def test_nan_stays_in_its_sample(name, device):
    given = inputs(4, 16, 3, 5, 24, 40, 2, torch.float32, device)
    image = given.pop(name)
    assert_nan_stays_in_its_sample(lambda x: dual_conv_bn_relu(**given, **{name: x}), image)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    given = inputs(4, 64, 3, 5, 64, 40, 2, dtype, device)
    both_images = torch.stack([given.pop("x")[:, :, :3, :5], given.pop("x2")[:, :, ::2, ::2]], 1)
    given["stride2"] = 1
    with tuning.force_config("dual_conv_bn_relu", kernels.candidate_configs(dtype, "sm_90")[-1]):
        assert_batch_invariant(
            lambda images: dual_conv_bn_relu(x=images[:, 0], x2=images[:, 1], **given), both_images
        )


def test_the_order_of_programs_does_not_matter(device):
    given = inputs(2, 64, 7, 7, 64, 96, 1, torch.float32, device)
    with tuning.force_config("dual_conv_bn_relu", kernels.candidate_configs(torch.float32, "sm_90")[-1]):
        assert_order_does_not_matter(lambda: dual_conv_bn_relu(**given))


def test_compiles_and_exports(device):
    given = inputs(2, 8, 3, 3, 12, 20, 2, torch.float32, device)
    bn, bn2 = given["bn"], given["bn2"]

    def call(x, weight, x2, weight2, scale, scale2):
        norms = {"bn": bn._replace(weight=scale), "bn2": bn2._replace(weight=scale2)}
        changed = {"x": x, "weight": weight, "x2": x2, "weight2": weight2}
        # the operator itself: compiled, the public function is its parts
        return DUAL_CONV_BN_RELU.overload(*schema(given | norms | changed))

    tensors = [given[name] for name in TENSORS] + [bn.weight, bn2.weight]
    for t in tensors:
        t.requires_grad_()
    assert_compiles(call, tensors)
    with triton_forced():
        torch.library.opcheck(DUAL_CONV_BN_RELU.overload, schema(given))


def test_compiled_it_is_its_parts(device):
    given = inputs(2, 8, 3, 3, 12, 20, 2, torch.float32, device)
    compiled = torch.compile(dual_conv_bn_relu, fullgraph=True, backend="aot_eager")
    with triton_forced(), backend.observe() as ran:
        y = compiled(**given)
    assert ran == {("conv_bn_relu", "triton"): 2}
    torch.testing.assert_close(y, twin(**given))


def test_parts_where_the_kernel_is_not_the_choice(device):
    given = inputs(2, 16, 3, 5, 24, 40, 2, torch.float64, device)
    with backend.observe() as ran:
        y = dual_conv_bn_relu(**given)
    assert set(ran) == {("conv_bn_relu", "reference")}
    assert ran["conv_bn_relu", "reference"] == 2
    assert torch.equal(y, twin(**given))


def test_autocast_is_eagers(device):
    given = inputs(2, 16, 3, 5, 24, 40, 2, torch.float32, device)
    tensors = {name: given.pop(name) for name in TENSORS}
    assert_autocast(lambda **t: launched(**given | t), lambda **t: twin(**given | t), **tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x must be a torch.Tensor; got NoneType"),
        (
            {"x2": torch.zeros(2, 4, 6, 6, dtype=torch.int32)},
            "x2 must be float32, float16, bfloat16 or float64",
        ),
        ({"x": torch.zeros(2, 7, 3, 3)}, r"x must be \[N, 8, H, W\] for a weight of \[12, 8, 1, 1\]"),
        ({"x2": torch.zeros(4, 6, 6)}, r"x2 must be \[N, 4, H, W\] for a weight2 of \[12, 4, 1, 1\]"),
        ({"weight": torch.zeros(12, 8, 3, 3)}, r"weight must be \[O, C, 1, 1\]; got \[12, 8, 3, 3\]"),
        ({"weight2": torch.zeros(12, 4)}, r"weight2 must be \[O, C, 1, 1\]; got \[12, 4\]"),
        ({"weight2": torch.zeros(11, 4, 1, 1)}, r"weight2 must have shape \[12, 4, 1, 1\]; got"),
        ({"weight": torch.zeros(12, 8, 1, 1).half()}, "weight must be torch.float32, as the operands are"),
        ({"x2": torch.zeros(2, 4, 6, 6).half()}, "x2 must be torch.float32, as the operands are"),
        ({"x2": torch.zeros(1, 4, 6, 6)}, r"x2 must give x's \[2, 3, 3\] pixels .* got \[1, 3, 3\]"),
        ({"x2": torch.zeros(2, 4, 8, 6)}, r"x2 must give x's \[2, 3, 3\] pixels .* got \[2, 4, 3\]"),
        ({"stride2": 1}, r"x2 must give x's \[2, 3, 3\] pixels .* got \[2, 6, 6\]"),
        ({"stride2": 0}, "stride2 must be one or two integers of at least 1; got 0"),
        ({"bn": BatchNorm(torch.zeros(11))}, r"bn.weight must have shape \[12\]; got \[11\]"),
        (
            {"bn2": BatchNorm(bias=torch.zeros(12).half())},
            "bn2.bias must be float32 or torch.float32, as weight is",
        ),
        (
            {"bn2": BatchNorm(running_mean=torch.zeros(12))},
            "bn2.running_var must be given with its companion",
        ),
        ({"bn": BatchNorm(torch.zeros(12, device="meta"))}, "bn.weight must be on cpu, where x is; got meta"),
        ({"act": "gelu"}, "act must be one of 'none', 'relu'; got 'gelu'"),
    ],
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_bad_input_names_the_argument(change, message, mode):
    given = {
        "x": torch.zeros(2, 8, 3, 3),
        "weight": torch.zeros(12, 8, 1, 1),
        "bn": BatchNorm(),
        "x2": torch.zeros(2, 4, 6, 6),
        "weight2": torch.zeros(12, 4, 1, 1),
        "bn2": BatchNorm(),
        "stride2": 2,
    } | change
    with backend.use_backend(mode), pytest.raises(ValueError, match=f"dual_conv_bn_relu: {message}"):
        dual_conv_bn_relu(**given)


def test_flops_and_bytes(device):
    from torch.utils.flop_counter import FlopCounterMode

    given = inputs(2, 8, 3, 5, 4, 12, 2, torch.float32, device)
    with triton_forced(), FlopCounterMode(display=False) as counter:
        launched(**given)
    pixels = 2 * 3 * 5
    assert counter.get_total_flops() == 2 * pixels * 12 * (8 + 4)
    # a quarter of x2
    expected = pixels * (8 + 4 + 12) + 12 * (8 + 4) + 8 * 12
    assert DUAL_CONV_BN_RELU.cost(*schema(given)).bytes == 4 * expected
