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
from fastvr.ops.bottleneck import (
    BOTTLENECK,
    BOTTLENECK_CHAIN,
    FOLLOWING,
    PLANES,
    Shortcut,
    bottleneck,
    bottleneck_chain,
)
from fastvr.ops.conv_bn_relu import BatchNorm
from fastvr.reference.conv_bn_relu import conv_bn_relu as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import bottleneck as kernels

# n, planes, height, width, o, stride, what gives the residual
SHAPES = [
    (2, 64, 7, 7, 256, 1, "residual"),
    (2, 64, 7, 5, 256, 1, "shortcut"),
    (2, 128, 7, 7, 128, 2, "shortcut"),
    (1, 128, 5, 6, 64, 1, "residual"),
    (3, 16, 9, 7, 64, 2, "residual"),
    (1, 32, 14, 14, 192, 1, "none"),
    (1, 16, 1, 1, 64, 1, "shortcut"),
    (2, 16, 5, 4, 64, (1, 2), "shortcut"),
]


def both(value):
    return (value, value) if isinstance(value, int) else value


def batch_norm(channels, device, dtype=torch.float32):
    scale, shift, mean, var = (randn(channels, dtype=dtype, device=device) for _ in range(4))
    return BatchNorm(scale, shift, mean, var.abs() + 0.5)


def weight(o, c, kernel, dtype, device):
    w = randn(o, c, kernel, kernel, device=device) * (2 / (c * kernel * kernel)) ** 0.5
    return w.to(dtype).to(memory_format=torch.channels_last)


def image(*size, dtype, device):
    return randn(*size, dtype=dtype, device=device).to(memory_format=torch.channels_last)


def inputs(n, planes, h, w, o, stride, kind, dtype, device, *, following=0, source=64):
    sh, sw = both(stride)
    oh, ow = (h - 1) // sh + 1, (w - 1) // sw + 1
    given = {
        "x": image(n, planes, h, w, dtype=dtype, device=device),
        "weight2": weight(planes, planes, 3, dtype, device),
        "bn2": batch_norm(planes, device),
        "weight3": weight(o, planes, 1, dtype, device),
        "bn3": batch_norm(o, device),
        "stride": stride,
    }
    if kind == "residual":
        given["residual"] = image(n, o, oh, ow, dtype=dtype, device=device)
    elif kind == "shortcut":
        before = image(n, source, h, w, dtype=dtype, device=device)
        given["shortcut"] = Shortcut(
            before, weight(o, source, 1, dtype, device), batch_norm(o, device), stride
        )
    if following:
        given |= {"weight1": weight(following, o, 1, dtype, device), "bn1": batch_norm(following, device)}
    return given


def twin(x, weight2, bn2, weight3, bn3, *, stride=1, residual=None, shortcut=None):
    y = reference(x, weight2, *bn2, both(stride), (1, 1))
    if shortcut is not None:
        residual = reference(*shortcut[:2], *shortcut[2], both(shortcut[3]), act="none")
    return reference(y, weight3, *bn3, residual=residual)


def chain_twin(*, weight1, bn1, **block):
    y = twin(**block)
    return y, reference(y, weight1, *bn1)


def check(given, *, ran="bottleneck"):
    op, truth = (bottleneck_chain, chain_twin) if "weight1" in given else (bottleneck, twin)
    with triton_forced(), backend.observe() as observed:
        check_op(op, truth, given, backward=False, sample_inputs=("x", "residual"), name=op.__name__)
    # its parts would be right too
    assert set(observed) == {(op.__name__ if ran == "bottleneck" else ran, "triton")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, device):
    check(inputs(*shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("planes", "following"), [(planes, n) for planes, several in FOLLOWING.items() for n in several]
)
@pytest.mark.parametrize("kind", ["residual", "shortcut", "none"])
def test_chains(planes, following, kind, dtype, device):
    stride = 2 if kind == "shortcut" else 1
    check(inputs(2, planes, 5, 7, 128, stride, kind, dtype, device, following=following))


@pytest.mark.parametrize("without", ["weight", "bias", "statistics", "everything"])
def test_every_vector_is_optional(without, device):
    given = inputs(2, 16, 5, 5, 64, 1, "shortcut", torch.float16, device, following=32)

    def reduced(bn):
        if without == "everything":
            return BatchNorm()
        if without == "statistics":
            return bn._replace(running_mean=None, running_var=None)
        return bn._replace(**{without: None})

    for name in ("bn1", "bn2", "bn3"):
        given[name] = reduced(given[name])
    given["shortcut"] = given["shortcut"]._replace(bn=reduced(given["shortcut"].bn))
    check(given)


def test_every_eps_counts(device):
    given = inputs(2, 16, 5, 5, 64, 1, "shortcut", torch.float32, device, following=16)
    for name, eps in (("bn1", 1e-2), ("bn2", 2e-2), ("bn3", 3e-2)):
        given[name] = given[name]._replace(running_var=given[name].running_var * 1e-2, eps=eps)
    shortcut = given["shortcut"]
    given["shortcut"] = shortcut._replace(
        bn=shortcut.bn._replace(running_var=shortcut.bn.running_var * 1e-2, eps=4e-2)
    )
    check(given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["residual", "shortcut"])
def test_gradients(kind, dtype, device):
    given = inputs(2, 16, 5, 4, 64, 1, kind, dtype, device, source=16)
    wanted = [given["x"], given["weight2"], given["weight3"], *given["bn2"][:2], *given["bn3"][:2]]
    wanted += [given["residual"]] if kind == "residual" else [*given["shortcut"][:2]]
    for tensor in wanted:
        tensor.requires_grad_()
    with triton_forced(), backend.observe() as ran:
        check_op(bottleneck, twin, given, sample_inputs=("x", "residual"), name="bottleneck")
    # by its parts, each of which keeps what its gradient reads
    assert set(ran) <= {("conv_bn_relu", "triton"), ("conv_bn_relu_backward", "triton")}


def test_a_chain_has_no_gradient(device):
    given = inputs(1, 16, 5, 4, 64, 1, "residual", torch.float32, device, following=16)
    given["x"].requires_grad_()
    with triton_forced(), pytest.raises(NotImplementedError, match="bottleneck_chain has no gradient"):
        bottleneck_chain(**given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", [64, 128])
@pytest.mark.parametrize("following", [0, 128])
def test_every_configuration(planes, following, dtype, device):
    name = "bottleneck_chain" if following else "bottleneck"
    for kind in ("residual", "shortcut"):
        given = inputs(1, planes, 5, 7, 64, 1, kind, dtype, device, following=following)
        options = {"shortcut": kind == "shortcut", "following": following}
        tried = []
        for arch in ("interpreter", *GRID.architectures):
            for config in kernels.candidate_configs(dtype, arch, planes, **options):
                if config not in tried:
                    tried.append(config)
                    with tuning.force_config(name, config):
                        check(given)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("shortcut", [False, True])
def test_default_is_a_candidate(planes, shortcut):
    for arch in GRID.architectures:
        for dtype in DTYPES:
            for following in (0, *FOLLOWING[planes]):
                options = {"shortcut": shortcut, "following": following}
                listed = kernels.candidate_configs(dtype, arch, planes, **options)
                for rows in (1, 3136, 200_704):
                    assert kernels.default_config(rows, dtype, arch, planes, **options) in listed


def blocks_of_16_bytes(t):
    """The same values in other memory that the kernel reads: every other row and column of a larger tensor,
    an offset into one, H and W exchanged."""
    n, c, h, w = t.shape
    wide = torch.zeros(n, c, 2 * h, 2 * w, dtype=t.dtype, device=t.device)
    wide = wide.to(memory_format=torch.channels_last)
    wide[:, :, ::2, ::2] = t
    yield wide[:, :, ::2, ::2]
    around = torch.zeros(n + 1, c + 8, h + 1, w + 2, dtype=t.dtype, device=t.device)
    around = around.to(memory_format=torch.channels_last)
    around[1:, 8:, 1:, 2:] = t
    yield around[1:, 8:, 1:, 2:]
    exchanged = t.transpose(2, 3).to(memory_format=torch.channels_last)
    yield exchanged.transpose(2, 3)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("name", ["x", "residual", "weight2", "shortcut"])
def test_layouts(name, which, device):
    kind = "shortcut" if name == "shortcut" else "residual"
    given = inputs(2, 16, 6, 5, 64, 2, kind, torch.bfloat16, device, following=16)
    if name == "shortcut":
        shortcut = given["shortcut"]
        given["shortcut"] = shortcut._replace(x=list(blocks_of_16_bytes(shortcut.x))[which])
    else:
        given[name] = list(blocks_of_16_bytes(given[name]))[which]
    check(given)


def test_expanded(device):
    given = inputs(3, 16, 6, 5, 64, 1, "residual", torch.float32, device)
    check(given | {"x": given["x"][:1].expand(3, -1, -1, -1)})
    check(given | {"residual": given["residual"][:, :, :1, :1].expand(-1, -1, 6, 5)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(1, 16, 5, 5)}, "x's channels do not lie in blocks of 16 bytes"),
        ({"weight2": torch.zeros(16, 16, 3, 3)}, "weight2's channels do not lie"),
        ({"residual": torch.zeros(1, 64, 5, 5)}, "residual's channels do not lie"),
        ({"residual": torch.zeros(1, 64, 5, 5, dtype=torch.float64)}, "dtype torch.float64"),
    ],
    ids=str,
)
def test_what_the_kernel_leaves_to_its_parts(change, reason, device):
    given = inputs(1, 16, 5, 5, 64, 1, "residual", torch.float32, device)
    for name, t in change.items():
        strides = t.stride() if t.dtype == torch.float32 else given[name].stride()
        changed = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=device)
        given[name] = changed.copy_(given[name])
    assert reason in BOTTLENECK.unsupported(*schema(given))
    if "float64" not in reason:
        check(given, ran="conv_bn_relu")


@pytest.mark.parametrize(
    ("planes", "o", "source", "following", "reason"),
    [
        (8, 64, 64, 0, "8 channels; the kernel takes 16, 32, 64, 128"),
        (256, 64, 64, 0, "256 channels"),
        (16, 72, 64, 0, "72 output channels are not a multiple of 64"),
        (16, 64, 24, 0, "24 channels of the shortcut are not a multiple of 16"),
        (16, 64, 64, 24, "24 channels after 16"),
    ],
)
def test_sizes_that_the_kernel_leaves_to_its_parts(planes, o, source, following, reason, device):
    given = inputs(
        1, planes, 3, 3, o, 1, "shortcut", torch.float16, device, following=following, source=source
    )
    op = BOTTLENECK_CHAIN if following else BOTTLENECK
    assert reason in op.unsupported(*schema(given))
    with torch.no_grad(), triton_forced(), backend.observe() as observed:
        check_op(
            bottleneck_chain if following else bottleneck,
            chain_twin if following else twin,
            given,
            backward=False,
        )
    assert {implementation for _, implementation in observed} == {"triton"}
    assert (op.name, "triton") not in observed


def schema(given):
    """The operator's arguments of a call of the public function."""
    taken = []
    op = BOTTLENECK_CHAIN if "weight1" in given else BOTTLENECK
    parts, op.parts = op.parts, lambda *args: taken.append(args)
    try:
        with torch.no_grad(), backend.use_backend("auto"):
            (bottleneck_chain if "weight1" in given else bottleneck)(**given)
    finally:
        op.parts = parts
    return taken[0]


def test_result_is_channels_last_on_every_backend(device):
    given = inputs(2, 16, 6, 5, 64, 1, "shortcut", torch.float32, device, following=16)
    for mode in ("auto", "triton", "reference"):
        with backend.use_backend(mode):
            for result in bottleneck_chain(**given):
                assert result.is_contiguous(memory_format=torch.channels_last)


def test_empty_batch(device):
    given = inputs(0, 16, 6, 5, 64, 2, "shortcut", torch.float32, device, following=32)
    with triton_forced():
        y, z = bottleneck_chain(**given)
    assert (y.shape, z.shape) == ((0, 64, 3, 3), (0, 32, 3, 3))


def test_float32_residual_beside_bfloat16(device):
    given = inputs(2, 16, 5, 5, 64, 1, "residual", torch.bfloat16, device)
    given["residual"] = given["residual"].float()
    check(given)
    with triton_forced():
        assert bottleneck(**given).dtype == torch.float32


@pytest.mark.parametrize("bn", ["bn2", "bn3"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_relu_keeps_nan(bn, value, device):
    given = inputs(2, 16, 4, 4, 64, 1, "residual", torch.float16, device)
    given[bn] = given[bn]._replace(bias=torch.full_like(given[bn].bias, value))
    check(given)


@pytest.mark.parametrize("kind", ["none", "shortcut"])
def test_nan_stays_in_its_sample(kind, device):
    given = inputs(4, 16, 5, 5, 64, 1, kind, torch.float32, device, following=16)
    x = given.pop("x")
    for result in range(2):
        assert_nan_stays_in_its_sample(lambda x, r=result: bottleneck_chain(x, **given)[r], x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    given = inputs(4, 64, 5, 5, 64, 1, "none", dtype, device, following=64)
    x = given.pop("x")
    with tuning.force_config("bottleneck_chain", kernels.candidate_configs(dtype, "sm_90", 64)[-1]):
        for result in range(2):
            assert_batch_invariant(lambda x, r=result: bottleneck_chain(x, **given)[r], x)


def test_the_order_of_programs_does_not_matter(device):
    given = inputs(3, 16, 9, 9, 64, 1, "shortcut", torch.float32, device, following=32)
    config = kernels.candidate_configs(torch.float32, "interpreter", 16)[-1]
    with tuning.force_config("bottleneck_chain", config):
        assert_order_does_not_matter(lambda: torch.cat(bottleneck_chain(**given), 1))


def test_compiles_and_exports(device):
    # sizes that the kernel leaves to its parts, which a compiled graph always has
    given = inputs(2, 8, 5, 5, 16, 2, "residual", torch.float32, device)
    names = ("x", "weight2", "weight3", "residual")
    tensors = [given.pop(name).requires_grad_() for name in names]
    assert_compiles(lambda *tensors: bottleneck(**dict(zip(names, tensors, strict=True)), **given), tensors)


@pytest.mark.parametrize("kind", ["residual", "shortcut"])
def test_operators_are_described_right(kind, device):
    given = inputs(2, 16, 5, 5, 64, 2, kind, torch.float32, device, following=16)
    chain = schema(given)
    block = schema({name: t for name, t in given.items() if name not in ("weight1", "bn1")})
    with triton_forced():
        torch.library.opcheck(BOTTLENECK_CHAIN.overload, chain)
        for tensor in block[:2]:
            tensor.requires_grad_()
        torch.library.opcheck(BOTTLENECK.overload, block)


@pytest.mark.parametrize("kind", ["residual", "none"])
def test_autocast_is_eagers(kind, device):
    given = inputs(2, 16, 9, 9, 64, 1, kind, torch.float32, device)
    assert_autocast(bottleneck, twin, **given)


def test_autocast_casts_the_shortcut_and_the_next_weight(device):
    given = inputs(2, 16, 9, 9, 64, 1, "shortcut", torch.float32, device, following=16)
    narrow = inputs(2, 16, 9, 9, 64, 1, "none", torch.bfloat16, device, following=16)
    for name in ("x", "weight2", "weight3", "weight1"):
        narrow[name] = given[name].bfloat16()
    shortcut = given["shortcut"]
    narrow["shortcut"] = shortcut._replace(x=shortcut.x.bfloat16(), weight=shortcut.weight.bfloat16())
    narrow |= {name: given[name] for name in ("bn1", "bn2", "bn3")}
    with torch.no_grad(), triton_forced():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            cast = bottleneck_chain(**given)
        for ours, plain in zip(cast, bottleneck_chain(**narrow), strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x must be a torch.Tensor; got NoneType"),
        (
            {"x": torch.zeros(2, 16, 5, 5, dtype=torch.uint8)},
            "x must be float32, float16, bfloat16 or float64",
        ),
        ({"x": torch.zeros(2, 8, 5, 5)}, r"x must be \[N, 16, H, W\] for a weight2 of"),
        ({"x": torch.zeros(16, 5, 5)}, r"x must be \[N, 16, H, W\]"),
        ({"weight2": torch.zeros(16, 16, 1, 1)}, r"weight2 must be \[C, C, 3, 3\]; got \[16, 16, 1, 1\]"),
        ({"weight2": torch.zeros(16, 16, 3, 3).half()}, "weight2 must be torch.float32, as the operands are"),
        ({"weight3": torch.zeros(64, 8, 1, 1)}, r"weight3 must be \[O, 16, 1, 1\]; got \[64, 8, 1, 1\]"),
        ({"bn2": BatchNorm(torch.ones(15))}, r"bn2.weight must have shape \[16\]; got \[15\]"),
        ({"bn3": BatchNorm(None, torch.ones(64).half())}, "bn3.bias must be float32 or torch.float32"),
        ({"bn3": BatchNorm(running_mean=torch.ones(64))}, "bn3.running_var must be given with its companion"),
        ({"stride": 0}, "stride must be one or two integers of at least 1; got 0"),
        ({"residual": torch.zeros(2, 64, 5, 4)}, r"residual must have shape \[2, 64, 5, 5\]; got"),
        (
            {"residual": torch.zeros(2, 64, 5, 5), "shortcut": Shortcut(*[torch.zeros(1)] * 2, BatchNorm())},
            "shortcut must be None beside a residual",
        ),
        (
            {"shortcut": Shortcut(None, torch.zeros(1), BatchNorm())},
            "shortcut.x must be a torch.Tensor; got NoneType",
        ),
        (
            {"shortcut": Shortcut(torch.zeros(2, 8, 9, 9), torch.zeros(64, 8, 1, 1), BatchNorm())},
            r"shortcut.x must be \[2, 8, H, W\] and give 5 x 5 pixels with a stride of \[1, 1\]; got",
        ),
        (
            {"shortcut": Shortcut(torch.zeros(2, 8, 5, 5), torch.zeros(32, 8, 1, 1), BatchNorm())},
            r"shortcut.weight must be \[64, C, 1, 1\]; got \[32, 8, 1, 1\]",
        ),
        (
            {"shortcut": Shortcut(torch.zeros(2, 8, 5, 5), torch.zeros(64, 8, 1, 1), BatchNorm(), 0)},
            "shortcut.stride must be one or two integers of at least 1; got 0",
        ),
        ({"weight1": torch.zeros(16, 32, 1, 1)}, r"weight1 must be \[C1, 64, 1, 1\]; got \[16, 32, 1, 1\]"),
        ({"bn1": BatchNorm(torch.ones(15))}, r"bn1.weight must have shape \[16\]; got \[15\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_bad_input_names_the_argument(change, message, mode):
    given = {
        "x": torch.zeros(2, 16, 5, 5),
        "weight2": torch.zeros(16, 16, 3, 3),
        "bn2": BatchNorm(),
        "weight3": torch.zeros(64, 16, 1, 1),
        "bn3": BatchNorm(),
        "weight1": torch.zeros(16, 64, 1, 1),
        "bn1": BatchNorm(),
    }
    with backend.use_backend(mode), pytest.raises(ValueError, match=f"bottleneck_chain: {message}"):
        bottleneck_chain(**(given | change))


def test_more_pixels_than_32_bits_count():
    meta = {"device": "meta", "dtype": torch.bfloat16}
    given = {
        "x": torch.empty(1, 128, 128, 16, **meta).permute(0, 3, 1, 2).expand(2**17, -1, -1, -1),
        "weight2": torch.empty(16, 3, 3, 16, **meta).permute(0, 3, 1, 2),
        "bn2": BatchNorm(),
        "weight3": torch.empty(64, 16, 1, 1, **meta),
        "bn3": BatchNorm(),
    }
    assert "output pixels" in BOTTLENECK.unsupported(*schema(given))


def test_flops_and_bytes(device):
    from torch.utils.flop_counter import FlopCounterMode

    given = inputs(2, 16, 6, 6, 64, 2, "shortcut", torch.float32, device, following=32)
    with triton_forced(), FlopCounterMode(display=False) as counter:
        bottleneck_chain(**given)
    pixels = 2 * 3 * 3
    assert counter.get_total_flops() == 2 * pixels * (16 * (9 * 16 + 64) + 64 * 64 + 64 * 32)
    weights = 9 * 16 * 16 + 16 * 64 + 64 * 64 + 64 * 32
    vectors = 4 * (16 + 64 + 64 + 32)
    # a quarter of the shortcut's 6 x 6 pixels
    moved = 2 * 36 * 16 + pixels * 64 + pixels * (64 + 32) + weights + vectors
    assert BOTTLENECK_CHAIN.cost(*schema(given)).bytes == 4 * moved
