"""conv_bn_relu of images of bytes, normalised on their way in."""

from __future__ import annotations

import pytest
import torch
from contract import DTYPES, assert_autocast, randn, triton_forced
from convolutions import VECTORS, check, inputs, layouts, twin

from fastvr import tuning
from fastvr.ops.conv_bn_relu import CONV_BN_RELU, conv_bn_relu

pytest.importorskip("triton")
from fastvr.kernels import conv_bn_relu as kernels


def image_inputs(*shape, dtype, device):
    given = inputs(*shape, dtype, device, residual=False)
    c = given["x"].shape[1]
    given["x"] = torch.randint(0, 256, given["x"].shape, dtype=torch.uint8, device=device)
    return given | {"mean": randn(c, device=device) * 0.2 + 0.5, "std": randn(c, device=device) * 0.05 + 0.25}


# the stem, fewer channels than a block of K, no padding, whole blocks of K, groups
IMAGES = [
    (2, 3, 31, 30, 64, 7, 2, 3, 1),
    (3, 1, 9, 8, 24, 3, 1, 1, 1),
    (2, 5, 6, 7, 31, (1, 3), 1, 0, 1),
    (1, 64, 5, 5, 24, 3, 1, 1, 1),
    (1, 64, 5, 5, 24, 1, 2, 0, 1),
    (2, 8, 6, 6, 12, 3, 2, (0, 1), 2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_images_of_bytes(shape, dtype, device):
    check(image_inputs(*shape, dtype=dtype, device=device))


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_normalising_costs_does_not_show(dtype, window, device):
    """Few products a sum: its rounding hides nothing."""
    for seed in range(4):
        torch.manual_seed(seed)
        given = inputs(2, 3, 13, 9, 31, window, 1, window // 2, 1, dtype, device, residual=False)
        image = torch.randint(0, 256, (2, 3, 13, 9), dtype=torch.uint8, device=device)
        mean, std = (torch.rand(3, device=device) * 0.2 + 0.3 for _ in range(2))
        check(given | {"x": image, "mean": mean, "std": std, "act": "none"})


def test_images_of_bytes_in_any_layout(device):
    given = image_inputs(2, 3, 12, 10, 24, 7, 2, 3, 1, dtype=torch.bfloat16, device=device)
    for x in layouts(given["x"]):
        check(given | {"x": x})
    check(given | {"x": given["x"][:1].expand(2, -1, -1, -1)})
    check(given | {name: given[name].repeat_interleave(2)[::2].half() for name in ("mean", "std")})


def test_padding_is_zero_after_normalising(device):
    given = image_inputs(1, 1, 1, 1, 1, 3, 1, 1, 1, dtype=torch.float32, device=device)
    given |= dict.fromkeys(VECTORS) | {"weight": torch.ones(1, 1, 3, 3, device=device), "act": "none"}
    given |= {"x": torch.full((1, 1, 1, 1), 255, dtype=torch.uint8, device=device)}
    given |= {"mean": torch.tensor([0.5], device=device), "std": torch.tensor([0.25], device=device)}
    with triton_forced():
        assert conv_bn_relu(**given).item() == pytest.approx(2.0)


def test_gradients_beside_bytes(device):
    given = image_inputs(2, 3, 9, 8, 24, 3, 2, 1, 1, dtype=torch.float32, device=device)
    for name in ("weight", "bn_weight", "bn_bias", "mean", "std"):
        given[name].requires_grad_()
    check(given, backward=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_under_every_configuration(dtype, device):
    given = image_inputs(1, 3, 9, 9, 72, 7, 2, 3, 1, dtype=dtype, device=device)
    for config in kernels.candidate_configs(dtype, "sm_90", gathered=True):
        with tuning.force_config("conv_bn_relu", config):
            check(given)


def test_bytes_under_autocast_compiled_and_in_float64(device):
    given = image_inputs(2, 3, 9, 8, 24, 3, 2, 1, 1, dtype=torch.float32, device=device)
    assert_autocast(conv_bn_relu, twin, **given)
    vectors = [given[name] for name in VECTORS]
    options = (1e-5, [2, 2], [1, 1], 1, "relu", None, given["mean"], given["std"])
    with triton_forced():
        torch.library.opcheck(CONV_BN_RELU.overload, (given["x"], given["weight"], *vectors, *options))
    given["weight"] = given["weight"].double()
    assert "float64" in CONV_BN_RELU.unsupported(given["x"], given["weight"], *vectors, *options)
    assert conv_bn_relu(**given).dtype == torch.float64
