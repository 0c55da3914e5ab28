from __future__ import annotations

import pytest
import torch
from contract import DTYPES, assert_compiles, assert_order_does_not_matter, randn, triton_forced

from fastvr import backend, tuning
from fastvr.compare import traffic
from fastvr.ops.residual_block import RESIDUAL_BLOCK, Layer, flat, residual_block
from fastvr.ops.residual_block_backward import RESIDUAL_BLOCK_BACKWARD
from fastvr.reference.residual_block import residual_block as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import batch_norm_stats as kernels

OPS = ("residual_block", "residual_block_backward")
SEVERAL = kernels.candidate_configs(64, torch.float32, "interpreter")[1]


def image(*shape, **options):
    return randn(*shape, **options).to(memory_format=torch.channels_last)


def layer(o, c, k, stride=1, *, dtype, device, parameters=None):
    weight = (randn(o, c, k, k) * (2 / (k * k * c)) ** 0.5).to(dtype).to(device)
    vectors = ((1 + randn(o) / 2).to(parameters or dtype).to(device) for _ in range(2))
    scale, shift = vectors
    weight = weight.to(memory_format=torch.channels_last)
    return Layer(*(t.requires_grad_() for t in (weight, scale, shift)), 1e-5, stride, k // 2)


def inputs(kind, planes, source, stride, dtype, device, *, size=6, batch=3, **options):
    """``source`` None: no convolution in the shortcut."""
    options = {"dtype": dtype, "device": device, **options}
    out = planes if kind == "basic" else 2 * planes
    channels = source or out
    if kind == "basic":
        branch = [layer(planes, channels, 3, stride, **options), layer(planes, planes, 3, **options)]
    else:
        branch = [layer(planes, channels, 1, **options), layer(planes, planes, 3, stride, **options)]
        branch.append(layer(out, planes, 1, **options))
    x = image(batch, channels, size, size, dtype=dtype, device=device).requires_grad_()
    return {
        "x": x,
        "branch": branch,
        "shortcut": layer(out, source, 1, stride, **options) if source else None,
    }


def call(x, branch, shortcut):
    y, statistics, _ = residual_block(x, branch, shortcut)
    return y, [tuple(pair) for pair in statistics]


def twin(x, branch, shortcut):
    branch = [Layer(*given) for given in branch]
    shortcut = shortcut and Layer(*shortcut)
    y, statistics, _ = reference(x, branch, shortcut)
    layers = [*branch, *([shortcut] if shortcut else [])]
    vectors = iter(statistics.split([len(given.weight) for given in layers for _ in range(2)]))
    return y, list(zip(vectors, vectors, strict=True))


def check(given):
    with triton_forced(), backend.observe() as ran:
        report = check_op(call, twin, given, name="residual_block")
    assert ran["residual_block", "triton"] == ran["residual_block_backward", "triton"] == 1
    return report


# the narrow ones make the product of their 1x1 convolutions again, the wide ones keep it; 31 channels are no
# whole bytes of signs
SHAPES = [
    ("basic", 16, None, 1),
    ("basic", 8, 24, 2),
    ("basic", 31, None, 1),
    ("bottleneck", 16, None, 1),
    ("bottleneck", 16, 24, 1),
    ("bottleneck", 72, 24, 2),
    ("bottleneck", 8, 72, 2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_statistics_and_gradients(shape, dtype, device):
    check(inputs(*shape, dtype, device))


@pytest.mark.parametrize("op", OPS)
def test_several_programs_and_parts(op, device):
    given = inputs("bottleneck", 40, 24, 1, torch.float16, device, size=9)
    with tuning.force_config(op, SEVERAL), tuning.force_config("batch_norm_act", SEVERAL):
        check(given)


def test_parameters_of_float32_beside_bfloat16(device):
    check(inputs("bottleneck", 16, 24, 1, torch.bfloat16, device, parameters=torch.float32))


def test_an_image_that_is_not_channels_last(device):
    given = inputs("basic", 8, 24, 2, torch.float32, device)
    given["x"] = randn(3, 24, 6, 6, device=device).requires_grad_()
    check(given)


NAMES = ["x", *(f"{part}{i}" for i in (1, 2, 3, 4) for part in ("weight", "bn_weight", "bn_bias"))]


@pytest.mark.parametrize("asked", [*NAMES, "weight2 bn_bias1", "bn_weight3 bn_weight4", "x weight3"])
def test_only_what_is_asked_for(asked, device):
    """The same numbers as with all gradients, and no convolution that no one reads."""
    given = flat(**inputs("bottleneck", 8, 24, 2, torch.float32, device))
    upstream = image(3, 16, 3, 3, device=device)
    with triton_forced():
        tensors = [t for t in given if isinstance(t, torch.Tensor)]
        everything = dict(
            zip(NAMES, torch.autograd.grad(RESIDUAL_BLOCK(*given)[0], tensors, upstream), strict=True)
        )
        for name, tensor in given._asdict().items():
            if isinstance(tensor, torch.Tensor):
                tensor.requires_grad_(name in asked.split())
        found = torch.autograd.grad(
            RESIDUAL_BLOCK(*given)[0], [getattr(given, name) for name in asked.split()], upstream
        )
    for name, gradient in zip(asked.split(), found, strict=True):
        torch.testing.assert_close(gradient, everything[name], rtol=0, atol=0)


def test_what_is_kept(device):
    """Of the maps what the convolutions made, but for the 1x1 ones of few channels; of the result a bit."""
    given = inputs("bottleneck", 16, 24, 1, torch.bfloat16, device)
    kept = []
    with triton_forced(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda i: i):
        y, *_ = residual_block(**given)
    maps = [tuple(t.shape) for t in kept if t.dim() == 4 and t.shape[0] == 3]
    assert maps == [tuple(given["x"].shape), (3, 16, 6, 6), (3, 16, 6, 6)]
    assert [t.numel() for t in kept if t.dtype == torch.uint8] == [y.numel() // 8]


def test_the_products_that_are_made(device):
    """Three a convolution, and one more where its product is made again."""
    given = inputs("bottleneck", 8, 72, 2, torch.float32, device)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = torch.nn.ParameterList([t for part in given["branch"] for t in part[:3]])
            self.shortcut = torch.nn.ParameterList(list(given["shortcut"][:3]))

        def forward(self, x):
            t = list(self.tensors)
            branch = [Layer(*t[3 * i : 3 * i + 3], *part[3:]) for i, part in enumerate(given["branch"])]
            return residual_block(x, branch, Layer(*self.shortcut, *given["shortcut"][3:]))[0]

    step = traffic.count(Block(), given["x"].detach(), train=True)
    first, second, last, shortcut = 36 * 8 * 72, 9 * 8 * 72, 9 * 16 * 8, 9 * 16 * 72
    # x asks for no gradient
    assert step.flops == 2 * 3 * (2 * first + 3 * second + 4 * last + 2 * shortcut)


def test_nan_lets_the_gradient_through(device):
    given = inputs("basic", 8, None, 1, torch.float32, device)
    with torch.no_grad():
        given["x"][1, 3] = float("nan")
    with triton_forced():
        y, *_ = residual_block(**given)
        (gradient,) = torch.autograd.grad(y, given["x"], torch.ones_like(y))
    assert y[1, 3].isnan().all()
    assert gradient.isnan().any()


def test_the_order_of_programs_does_not_matter(device):
    given = inputs("bottleneck", 8, 24, 1, torch.float32, device)
    with tuning.force_config(OPS[0], SEVERAL), tuning.force_config(OPS[1], SEVERAL):

        def gradient():
            y, *_ = residual_block(**given)
            return torch.autograd.grad(y, given["x"], torch.ones_like(y))[0]

        assert_order_does_not_matter(gradient)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_compiles_and_exports(kind, device):
    given = inputs(kind, 8, 24, 2, torch.float32, device)
    arguments = flat(**given)
    places = [i for i, t in enumerate(arguments) if isinstance(t, torch.Tensor)]

    def run(*tensors):
        filled = list(arguments)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        return RESIDUAL_BLOCK(*filled)[0]

    assert_compiles(run, [arguments[i] for i in places])
    with triton_forced():
        torch.library.opcheck(RESIDUAL_BLOCK.overload, tuple(arguments))
        results = [t.detach() for t in RESIDUAL_BLOCK(*arguments)]
        bare = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
        needs = [isinstance(t, torch.Tensor) for t in bare]
        args = (torch.randn_like(results[0]), None, *results[1:], *bare, needs)
        torch.library.opcheck(RESIDUAL_BLOCK_BACKWARD.overload, args)


def test_gradcheck_of_the_reference(device):
    given = inputs("basic", 2, 3, 1, torch.float64, device, size=4, batch=2)
    arguments = flat(**given)
    tensors = [t for t in arguments[:7] if isinstance(t, torch.Tensor)]

    def run(*tensors):
        return RESIDUAL_BLOCK(*tensors, *arguments[7:])[0]

    assert torch.autograd.gradcheck(run, tensors)


def test_no_second_derivative(device):
    given = inputs("basic", 8, None, 1, torch.float32, device)
    with triton_forced():
        y, *_ = residual_block(**given)
        with pytest.raises(NotImplementedError, match="second derivative"):
            torch.autograd.grad(y.sum(), given["x"], create_graph=True)


def test_autocast_casts_the_products_alone(device):
    given = inputs("bottleneck", 8, 24, 1, torch.float32, device)
    given["x"] = given["x"].detach().bfloat16().requires_grad_()
    with triton_forced(), torch.autocast(device.type, torch.bfloat16):
        y, statistics, pixels = residual_block(**given)
    y.backward(torch.randn_like(y))
    assert y.dtype == torch.bfloat16
    assert statistics[0].mean.dtype == torch.float32
    assert pixels == [108] * 4
    assert given["branch"][0].weight.grad.dtype == torch.float32


def changed(name, **parts):
    def change(given):
        which = given["branch"] if name == "branch" else [given["shortcut"]]
        which[0] = which[0]._replace(**parts)
        if name == "shortcut":
            given["shortcut"] = which[0]

    return change


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.update(x=torch.zeros(3, 24, 6)), r"x must be \[N, C, H, W\]; got \[3, 24, 6\]"),
        (lambda g: g.update(x=torch.zeros(3, 24, 6, 6).int()), "x must be float32"),
        (lambda g: g.update(branch=g["branch"][:1]), "branch must be 2 or 3 layers; got 1"),
        (lambda g: g.update(shortcut=None), r"x must be \[3, 8, 3, 3\], as the branch's result is"),
        (changed("shortcut", stride=1), r"shortcut's result must be \[3, 8, 3, 3\]"),
        (changed("branch", weight=torch.zeros(8, 7, 3, 3)), r"branch\[0\].weight must be \[out_channels, 24"),
        (
            changed("branch", weight=torch.zeros(8, 24, 3, 3).half()),
            r"branch\[0\].weight must be torch.float32",
        ),
        (changed("branch", bn_weight=torch.zeros(7)), r"branch\[0\].bn_weight must have shape \[8\]"),
        (
            changed("branch", bn_weight=torch.zeros(8).half()),
            r"branch\[0\].bn_weight must be torch.float32 or",
        ),
        (
            changed("shortcut", bn_bias=torch.zeros(8).half()),
            "shortcut.bn_bias must be torch.float32, as bn_weight",
        ),
        (changed("branch", eps=0.0), r"branch\[0\].eps must be above 0; got 0.0"),
        (
            changed("branch", padding=-1),
            r"branch\[0\] must have a stride of at least 1 and no negative padding",
        ),
        (
            lambda g: g.update(x=torch.zeros(1, 24, 1, 1)),
            "Expected more than 1 value per channel when training",
        ),
    ],
)
def test_bad_input_names_the_argument(change, message, mode, device):
    given = inputs("basic", 8, 24, 2, torch.float32, torch.device("cpu"))
    change(given)
    with backend.use_backend(mode), pytest.raises(ValueError, match=message):
        residual_block(**given)


def test_float64_has_no_kernel(device):
    given = inputs("basic", 8, None, 1, torch.float64, device)
    with triton_forced(), pytest.raises(backend.BackendError, match="float64"):
        residual_block(**given)
