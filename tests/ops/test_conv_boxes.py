"""conv_bn_relu by tensor descriptors: boxes of pixels, in the interpreter and as `takes_boxes` says."""

from __future__ import annotations

import pytest
import torch
from contract import (
    GRID,
    assert_batch_invariant,
    assert_nan_stays_in_its_sample,
    assert_order_does_not_matter,
    randn,
    triton_forced,
)

from fastvr import backend, tuning
from fastvr.ops.conv_bn_relu import CONV_BN_RELU, conv_bn_relu
from fastvr.reference.conv_bn_relu import conv_bn_relu as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import common
from fastvr.kernels import conv_bn_relu as kernels

HALVES = [torch.float16, torch.bfloat16]
CANDIDATES = kernels.candidate_configs(torch.bfloat16, "sm_90", boxes=True)
BOXES = [config for config in CANDIDATES if "TMA" in config]
# n, c, height, width, o, window, stride, padding: maps that boxes of 1, 2, 4 and 8 rows and columns divide,
# batches that they do not, channels past the last block, strides in the view, padding of more than a stride
SHAPES = [
    (3, 64, 8, 8, 64, 3, 1, 1),
    (1, 64, 56, 4, 72, 3, 1, 1),
    (2, 128, 14, 6, 31, 3, 1, 1),
    (5, 64, 7, 7, 64, 3, 1, 1),
    (2, 64, 8, 12, 64, 3, 2, 1),
    (2, 64, 6, 8, 40, 1, 2, 0),
    (2, 192, 7, 5, 96, 1, 1, 0),
    (1, 64, 1, 1, 64, 1, 1, 0),
    (2, 64, 9, 10, 64, 3, 1, 0),
    (1, 64, 6, 6, 64, 5, 2, 3),
    (1, 64, 6, 9, 64, (1, 3), (2, 3), (1, 2)),
    (1, 64, 4, 4, 64, 1, 1, 1),
]


def both(value):
    return (value, value) if isinstance(value, int) else value


def inputs(n, c, h, w, o, window, stride, padding, dtype, device, **others):
    (kh, kw), (sh, sw), (ph, pw) = both(window), both(stride), both(padding)
    size = (n, o, (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1)
    channels_last = {"memory_format": torch.channels_last}
    weight = randn(o, c, kh, kw, device=device) * (c * kh * kw) ** -0.5
    return {
        "x": randn(n, c, h, w, dtype=dtype, device=device).to(**channels_last),
        "weight": weight.to(dtype).to(**channels_last),
        "bn_weight": randn(o, device=device),
        "bn_bias": randn(o, device=device),
        "running_mean": randn(o, device=device),
        "running_var": randn(o, device=device).abs() + 0.5,
        "residual": randn(*size, dtype=dtype, device=device).to(**channels_last),
        "stride": stride,
        "padding": padding,
    } | others


def twin(x, weight, *, stride=1, padding=0, **others):
    return reference(x, weight, stride=both(stride), padding=both(padding), **others)


def check(given):
    with triton_forced():
        return check_op(
            conv_bn_relu, twin, given, backward=False, sample_inputs=("x", "residual"), name="conv_bn_relu"
        )


def recorded(given):
    """The names of the kernels that a call launches, and the configurations that it may be given."""
    names = []
    args = (*(given[name] for name in ("x", "weight")), *[None] * 4, 1e-5, list(both(given["stride"])))
    args += (list(both(given["padding"])), given.get("groups", 1), "relu", given["residual"], None, None)
    recorder = common.record_launches(lambda kernel, *_: names.append(kernel.__name__))
    with tuning.consulted() as found, recorder:
        CONV_BN_RELU.kernel(*args)
    return names, found.knobs[0].candidates


def runs(given, config, kernel):
    with tuning.force_config("conv_bn_relu", config):
        return recorded(given)[0] == [kernel]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, device):
    given = inputs(*shape, dtype, device)
    for index, config in enumerate(BOXES):
        # the second has narrower tiles, and is the same code
        if index == 0 or shape == SHAPES[0]:
            assert runs(given, config, "_conv_boxes_fwd_kernel")
            with tuning.force_config("conv_bn_relu", config):
                check(given)


def test_parts_are_optional(device):
    given = inputs(3, 64, 4, 6, 72, 3, 1, 1, torch.float16, device)
    with tuning.force_config("conv_bn_relu", BOXES[0]):
        check(given | {"residual": None, "act": "none"})
        check(given | {"running_mean": None, "running_var": None})
        check(given | {"residual": given["residual"].float().contiguous()})


def test_parts_of_larger_tensors(device):
    given = inputs(2, 64, 4, 6, 72, 1, 1, 0, torch.bfloat16, device)
    around = randn(3, 80, 5, 8, dtype=torch.bfloat16, device=device).to(memory_format=torch.channels_last)
    given["x"] = around[1:, 16:, 1:, 2:]
    assert runs(given, BOXES[0], "_conv_boxes_fwd_kernel")
    with tuning.force_config("conv_bn_relu", BOXES[0]):
        check(given)
        check(given | {"residual": given["residual"][:, :, :1, :1].expand(-1, -1, 4, 6)})


def one_float_further(t):
    """The same values, 2 bytes past a multiple of 16."""
    whole = torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)
    return whole[1:].as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: {"x": g["x"].contiguous()},
        lambda g: {"x": g["x"][:1].expand(2, -1, -1, -1)},
        lambda g: {"x": one_float_further(g["x"])},
        lambda g: {"weight": g["weight"].contiguous()},
        lambda g: {"weight": one_float_further(g["weight"])},
        lambda g: {"x": g["x"][:, :32], "weight": g["weight"][:, :32]},
        lambda g: {"stride": 2},
        lambda g: {"groups": 2, "weight": g["weight"][:, :32].to(memory_format=torch.channels_last)},
        lambda g: {name: g[name].float() for name in ("x", "weight")},
    ],
    ids=[
        "nchw",
        "expanded",
        "misaligned",
        "nchw-filters",
        "misaligned-filters",
        "narrow",
        "odd",
        "groups",
        "wide",
    ],
)
def test_pointers_where_descriptors_cannot_read(change, device):
    given = inputs(2, 64, 5, 4, 32, 3, 1, 1, torch.bfloat16, device)
    given |= {"residual": None} | change(given)
    assert runs(given, BOXES[1], "_conv_bn_relu_fwd_kernel")
    with tuning.force_config("conv_bn_relu", BOXES[1]):
        check(given)


def test_nan_stays_in_its_sample_and_out_of_the_padding(device):
    given = inputs(4, 64, 6, 4, 24, 3, 1, 1, torch.float16, device, residual=None, act="none")
    x = given.pop("x")
    with tuning.force_config("conv_bn_relu", BOXES[1]):
        assert_nan_stays_in_its_sample(lambda x: conv_bn_relu(x, **given), x)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    given = inputs(4, 64, 4, 4, 24, 3, 1, 1, dtype, device, residual=None)
    x = given.pop("x")
    with tuning.force_config("conv_bn_relu", BOXES[1]):
        assert_batch_invariant(lambda x: conv_bn_relu(x, **given), x)


def test_the_order_of_programs_does_not_matter(device):
    given = inputs(3, 64, 12, 8, 72, 3, 1, 1, torch.float16, device)
    with tuning.force_config("conv_bn_relu", BOXES[1]):
        assert_order_does_not_matter(lambda: conv_bn_relu(**given))


def test_empty_batch(device):
    given = inputs(0, 64, 4, 4, 24, 3, 1, 1, torch.float16, device)
    with tuning.force_config("conv_bn_relu", BOXES[0]), triton_forced():
        assert conv_bn_relu(**given).shape == (0, 24, 4, 4)


def test_candidates_only_where_they_can_run(device):
    given = inputs(2, 64, 4, 4, 64, 3, 1, 1, torch.bfloat16, device)
    for arch in GRID.architectures:
        with backend.assume_architecture(arch):
            for x, there in ((given["x"], arch in ("sm_90", "sm_100")), (given["x"].contiguous(), False)):
                _, candidates = recorded(given | {"x": x})
                assert any("TMA" in config for config in candidates) == there
