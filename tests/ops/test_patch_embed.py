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
from fastvr.ops.patch_embed import PATCH_EMBED, patch_embed
from fastvr.reference.patch_embed import patch_embed as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import patch_embed as kernels
from fastvr.kernels.common import record_launches


def inputs(shape, d, patch, dtype, device, *, prefix=1, missing=()):
    channels, height, width = shape[1:]
    patch_h, patch_w = patch if isinstance(patch, tuple) else (patch, patch)
    tokens = prefix + (height // patch_h) * (width // patch_w)
    fan_in = channels * patch_h * patch_w
    given = {
        "x": randn(*shape, dtype=dtype, device=device),
        "weight": randn(d, channels, patch_h, patch_w, dtype=dtype, device=device) * fan_in**-0.5,
        "bias": randn(d, dtype=dtype, device=device),
        "pos_embed": randn(tokens, d, dtype=dtype, device=device),
        "prefix_tokens": randn(prefix, d, dtype=dtype, device=device) if prefix else None,
    }
    return {name: None if name in missing else t for name, t in given.items()}


def check(given, **options):
    options = {"backward": False} | options
    with triton_forced():
        return check_op(patch_embed, reference, given, name="patch_embed", **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "patch"), [(3, 14), (3, 16), (1, 32), (1, 14), (5, 16), (3, (4, 2)), (2, (7, 5)), (31, 1)]
)
def test_patches(channels, patch, dtype, device):
    height, width = (patch[0] * 3, patch[1] * 5) if isinstance(patch, tuple) else (patch * 3, patch * 2)
    check(inputs((2, channels, height, width), 40, patch, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 31, 384])
def test_widths(d, dtype, device):
    check(inputs((2, 3, 32, 48), d, 16, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(16, 16), (31, 17), (45, 50), (16, 96)])
def test_sizes(size, dtype, device):
    """Pixels that fill no patch are left out, as a convolution leaves them."""
    check(inputs((3, 3, *size), 24, 16, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("prefix", "missing"),
    [
        (0, ()),
        (1, ("bias",)),
        (5, ("pos_embed",)),
        (0, ("bias", "pos_embed")),
        (130, ()),
    ],
)
def test_every_part_is_optional_and_has_its_gradient(prefix, missing, dtype, device):
    given = inputs((2, 3, 16, 24), 20, 8, dtype, device, prefix=prefix, missing=missing)
    for value in given.values():
        if value is not None:
            value.requires_grad_()
    check(given, backward=True)


def configurations(dtype):
    """Of every architecture, each once."""
    every = [
        c for arch in ("interpreter", *GRID.architectures) for c in kernels.candidate_configs(dtype, arch)
    ]
    return [config for i, config in enumerate(every) if config not in every[:i]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch", [14, 16])
def test_every_configuration(patch, dtype, device):
    given = inputs((5, 3, 4 * patch, 4 * patch), 70, patch, dtype, device)
    for config in configurations(dtype):
        with tuning.force_config("patch_embed", config):
            check(given)


@pytest.mark.parametrize("rows", [1, 197, 20000])
def test_default_is_a_candidate(rows):
    for arch in GRID.architectures:
        for dtype in DTYPES:
            assert kernels.default_config(rows, 768, dtype, arch) in kernels.candidate_configs(dtype, arch)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "offset", "expanded", "batch last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_layouts(layout, dtype, device):
    given = inputs((2, 3, 32, 32), 24, 8, dtype, device)
    given["x"] = {
        "channels_last": lambda: given["x"].to(memory_format=torch.channels_last),
        "strided": lambda: randn(2, 6, 64, 96, dtype=dtype, device=device)[:, ::2, ::2, ::3],
        "offset": lambda: randn(4, 5, 40, 39, dtype=dtype, device=device)[1:3, 2:, 3:35, 7:],
        "expanded": lambda: randn(1, 1, 32, 32, dtype=dtype, device=device).expand(2, 3, 32, 32),
        "batch last": lambda: randn(3, 32, 32, 2, dtype=dtype, device=device).permute(3, 0, 1, 2),
    }[layout]()
    check(given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "patch"), [(3, 16), (3, 14), (1, 8), (31, (2, 3))])
def test_channels_last_image_and_weight(channels, patch, dtype, device):
    patch_h, patch_w = patch if isinstance(patch, tuple) else (patch, patch)
    given = inputs((2, channels, 3 * patch_h, 2 * patch_w + 1), 40, patch, dtype, device)
    for name in ("x", "weight"):
        given[name] = given[name].to(memory_format=torch.channels_last)
    check(given)
    seen = []
    with triton_forced(), record_launches(lambda kernel, grid, arguments, options: seen.append(arguments)):
        patch_embed(**given)
    assert [arguments["CHANNELS_LAST"] for arguments in seen] == [True]


def uint8_inputs(shape, d, patch, dtype, device, **options):
    given = inputs(shape, d, patch, dtype, device, **options)
    given["x"] = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    mean, std = [0.485, 0.456, 0.406, 0.5, 0.5], [0.229, 0.224, 0.225, 0.3, 0.3]
    given["mean"] = torch.tensor(mean[: shape[1]], device=device)
    given["std"] = torch.tensor(std[: shape[1]], device=device)
    return given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "patch", "prefix"), [(3, 16, 1), (3, 14, 5), (1, 8, 0), (5, (4, 2), 1), (3, 7, 130)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_uint8_images(channels, patch, prefix, memory_format, dtype, device):
    patch_h, patch_w = patch if isinstance(patch, tuple) else (patch, patch)
    given = uint8_inputs((2, channels, 3 * patch_h, 2 * patch_w + 1), 40, patch, dtype, device, prefix=prefix)
    for name in ("x", "weight"):
        given[name] = given[name].to(memory_format=memory_format)
    check(given)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_few_products_hide_no_rounding_of_a_normalised_byte(seed, patch, device):
    torch.manual_seed(seed)
    check(uint8_inputs((2, 3, 8, 8), 24, patch, torch.float32, device))


def test_uint8_images_are_normalised_ones(device):
    given = uint8_inputs((2, 3, 16, 16), 24, 8, torch.float32, device)
    given["x"][0] = 0
    given["x"][1] = 255
    mean, std = (given.pop(name)[:, None, None] for name in ("mean", "std"))
    normalised = given | {"x": (given["x"].double() / 255 - mean) / std}
    exact = patch_embed(**{name: t.double() for name, t in normalised.items()})
    with triton_forced():
        y = patch_embed(**given, mean=mean.flatten(), std=std.flatten())
    torch.testing.assert_close(y, exact.float())


@pytest.mark.parametrize(
    "wanted",
    [("x",), ("weight",), ("bias",), ("pos_embed",), ("prefix_tokens",), ("weight", "bias")],
    ids=str,
)
def test_only_what_is_asked_for_is_computed(wanted, device):
    # a row and a column of pixels that no patch reaches
    given = {
        "x": randn(3, 3, 33, 49, device=device),
        "weight": randn(40, 3, 16, 16, device=device) * 0.04,
        "bias": randn(40, device=device),
        "pos_embed": randn(8, 40, device=device),
        "prefix_tokens": randn(2, 40, device=device),
    }
    for name in wanted:
        given[name].requires_grad_()
    with triton_forced(), backend.observe() as ran:
        check_op(patch_embed, reference, given, name="patch_embed")
    assert ran["linear_weight_backward", "triton"] == ("weight" in wanted)
    assert ran["linear", "triton"] == ("x" in wanted)


def test_gradients_of_a_uint8_image(device):
    given = uint8_inputs((2, 3, 16, 24), 20, 8, torch.float32, device)
    for name in ("weight", "bias", "pos_embed", "prefix_tokens"):
        given[name].requires_grad_()
    check(given, backward=True)


@pytest.mark.parametrize("prefix_dtype", [torch.float32, torch.bfloat16])
def test_a_uint8_image_takes_the_weights_dtype(prefix_dtype, device):
    given = uint8_inputs((2, 3, 16, 16), 24, 8, torch.bfloat16, device)
    given["prefix_tokens"] = given["prefix_tokens"].to(prefix_dtype)
    check(given)
    with triton_forced():
        assert patch_embed(**given).dtype == prefix_dtype


def test_autocast_leaves_a_uint8_image(device):
    given = uint8_inputs((2, 3, 32, 32), 24, 8, torch.float32, device, prefix=0, missing=("pos_embed",))

    def eager(x, weight, bias, mean, std, **none):
        # as a model under autocast sees an image that was normalised before it
        wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        image = (x.to(wide) / 255 - mean[:, None, None]) / std[:, None, None]
        return reference(image, weight, bias)

    assert_autocast(patch_embed, eager, **given)


@pytest.mark.parametrize("part", ["weight", "bias", "pos_embed", "prefix_tokens"])
def test_parameter_layouts(part, device):
    given = inputs((2, 3, 16, 16), 24, 8, torch.float32, device, prefix=2)
    plain = given[part]
    if part == "weight":
        given[part] = plain.to(memory_format=torch.channels_last)
    else:
        given[part] = torch.stack([plain, plain], -1)[..., 0]
    assert not given[part].is_contiguous()
    check(given)
    with triton_forced():
        torch.testing.assert_close(patch_embed(**given), patch_embed(**given | {part: plain}), rtol=0, atol=0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("part", ["three of four", "every second", "expanded", "turned", "one"])
def test_weights_that_are_part_of_another(part, channels_last, device):
    given = inputs((2, 3, 16, 24), 20, 8, torch.float32, device)
    wide = randn(40, 4, 8, 8, device=device) * 192**-0.5
    if channels_last:
        given["x"] = given["x"].to(memory_format=torch.channels_last)
        wide = wide.to(memory_format=torch.channels_last)
    given["weight"] = {
        "three of four": lambda: wide[:20, 1:],
        "every second": lambda: wide[::2, :3],
        "expanded": lambda: wide[:1, :3].expand(20, 3, 8, 8),
        "turned": lambda: wide[:20, :3].transpose(2, 3),
        "one": lambda: wide[7:8, :3],
    }[part]()
    if part == "one":
        given |= {"bias": None, "pos_embed": None, "prefix_tokens": None}
    check(given)


def test_the_result_is_contiguous_and_the_leading_one_of_pos_embed_is_taken(device):
    given = inputs((2, 3, 16, 24), 20, 8, torch.float32, device)
    batched = given | {"pos_embed": given["pos_embed"][None]}
    for mode in ("triton", "reference"):
        with backend.use_backend(mode):
            for missing in ({}, {"prefix_tokens": None, "pos_embed": None}):
                y = patch_embed(**given | missing)
                assert y.is_contiguous()
                assert torch.equal(y, patch_embed(**batched | missing))


@pytest.mark.parametrize("patch_dtype", [torch.float16, torch.bfloat16])
def test_float32_parameters_beside_a_16_bit_image(patch_dtype, device):
    given = inputs((2, 3, 32, 32), 24, 16, patch_dtype, device)
    for part in ("pos_embed", "prefix_tokens"):
        mixed = given | {part: given[part].float()}
        check(mixed)
        with triton_forced():
            assert patch_embed(**mixed).dtype == torch.float32


def test_empty(device):
    given = inputs((0, 3, 32, 32), 24, 16, torch.float32, device)
    with triton_forced():
        assert patch_embed(**given).shape == (0, 5, 24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_sample(dtype, device):
    given = inputs((4, 3, 24, 24), 24, 8, dtype, device)
    assert_nan_stays_in_its_sample(lambda x: patch_embed(**given | {"x": x}), given["x"])


def test_prefix_tokens_do_not_meet_the_weight(device):
    """Their rows multiply zeros, and zero times NaN is NaN."""
    given = inputs((2, 3, 16, 16), 24, 8, torch.float32, device, prefix=2)
    given["weight"][3] = float("nan")
    with triton_forced():
        y = patch_embed(**given)
    expected = given["prefix_tokens"] + given["pos_embed"][:2]
    assert torch.equal(y[:, :2], expected.expand(2, 2, 24))
    assert y[:, 2:, 3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(dtype, device):
    given = inputs((5, 3, 24, 24), 24, 8, dtype, device)
    with tuning.force_config("patch_embed", kernels.candidate_configs(dtype, "sm_90")[-1]):
        assert_batch_invariant(lambda x: patch_embed(**given | {"x": x}), given["x"])


def test_the_order_of_programs_does_not_matter(device):
    given = inputs((9, 3, 24, 24), 150, 8, torch.float32, device)
    with tuning.force_config("patch_embed", kernels.candidate_configs(torch.float32, "sm_90")[-1]):
        assert_order_does_not_matter(lambda: patch_embed(**given))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 10 GB on a GPU")
def test_offsets_past_two_to_the_31(device):
    batch = 2**31 // (3 * 224 * 224) + 2
    given = inputs((1, 3, 224, 224), 768, 16, torch.bfloat16, device)
    x = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16, device=device)
    x[-1:] = given["x"]
    config = kernels.default_config(batch, 768, torch.bfloat16, backend.architecture(device))
    with triton_forced(), tuning.force_config("patch_embed", config):
        assert torch.equal(patch_embed(**given | {"x": x})[-1:], patch_embed(**given))


def test_compiles_and_exports(device):
    given = inputs((2, 3, 16, 16), 24, 8, torch.float32, device)
    tensors = [t.requires_grad_() for t in given.values()]

    def call(x, weight, bias, pos_embed, prefix_tokens):
        return patch_embed(x, weight, bias, pos_embed=pos_embed, prefix_tokens=prefix_tokens)

    assert_compiles(call, tensors)
    with triton_forced():
        torch.library.opcheck(PATCH_EMBED.overload, (*tensors, None, None))
        torch.library.opcheck(PATCH_EMBED.overload, (tensors[0], tensors[1], *[None] * 5))
        image = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, device=device)
        of_uint8 = (image, *tensors[1:], torch.rand(3, device=device), torch.rand(3, device=device) + 0.1)
        torch.library.opcheck(PATCH_EMBED.overload, of_uint8)


@pytest.mark.parametrize(
    ("prefix", "missing"), [(1, ()), (1, ("pos_embed",)), (0, ()), (0, ("pos_embed",)), (1, ("bias",))]
)
def test_autocast_is_eagers(prefix, missing, device):
    given = inputs((2, 3, 32, 32), 24, 8, torch.float32, device, prefix=prefix, missing=missing)
    assert_autocast(patch_embed, reference, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x must be a torch.Tensor; got NoneType"),
        ({"x": torch.zeros(2, 3, 16, 16, dtype=torch.int16)}, "x must be float32.*got torch.int16"),
        (
            {"x": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)},
            "mean must be given for uint8 images; got None",
        ),
        ({"std": torch.ones(3)}, "std is for uint8 images only; got torch.float32"),
        ({"x": torch.zeros(3, 16, 16)}, r"x must be \[B, 3, H, W\].*got \[3, 16, 16\]"),
        ({"x": torch.zeros(2, 4, 16, 16)}, r"x must be \[B, 3, H, W\].*got \[2, 4, 16, 16\]"),
        (
            {"x": torch.zeros(2, 3, 7, 16)},
            r"x must be at least one patch of 8 x 8 in size; got \[2, 3, 7, 16\]",
        ),
        ({"weight": torch.zeros(4, 192)}, r"weight must be \[D, C, p_h, p_w\]; got \[4, 192\]"),
        ({"weight": torch.zeros(4, 3, 0, 8)}, r"weight must be \[D, C, p_h, p_w\]; got \[4, 3, 0, 8\]"),
        ({"weight": torch.zeros(4, 3, 8, 8, dtype=torch.float16)}, "weight must be torch.float32"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \[4\]; got \[5\]"),
        ({"bias": torch.zeros(4, dtype=torch.float16)}, "bias must be torch.float32, as the operands are"),
        (
            {"pos_embed": torch.zeros(4, 4)},
            r"pos_embed must have shape \[5, 4\] \(1 prefix tokens and 4 patches",
        ),
        ({"pos_embed": torch.zeros(2, 5, 4)}, r"pos_embed must have shape \[5, 4\].*got \[2, 5, 4\]"),
        ({"prefix_tokens": torch.zeros(1, 5)}, r"prefix_tokens must have shape \[1, 4\].*got \[1, 5\]"),
        ({"prefix_tokens": torch.zeros(4)}, r"prefix_tokens must have shape \[P, 4\]; got \[4\]"),
        (
            {"prefix_tokens": torch.zeros(1, 4, device="meta")},
            "prefix_tokens must be on cpu, where x is; got meta",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_bad_input_names_the_argument(change, message, mode):
    given = {
        "x": torch.zeros(2, 3, 16, 16),
        "weight": torch.zeros(4, 3, 8, 8),
        "bias": torch.zeros(4),
        "pos_embed": torch.zeros(5, 4),
        "prefix_tokens": torch.zeros(1, 4),
    } | change
    with backend.use_backend(mode), pytest.raises(ValueError, match=f"patch_embed: {message}"):
        patch_embed(**given)


def test_what_the_kernel_cannot_take_runs_in_pytorch(device):
    given = inputs((2, 3, 16, 16), 24, 8, torch.float64, device)
    with triton_forced(), pytest.raises(backend.BackendError, match=r"patch_embed: .*dtype torch\.float64"):
        patch_embed(**given)
    with backend.use_backend("auto"), backend.observe() as ran:
        assert torch.equal(patch_embed(**given), reference(**given))
    assert dict(ran) == {("patch_embed", "reference"): 1}


def test_rows_are_counted_in_31_bits():
    x = torch.empty(2**27, 3, 16, 16, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(4, 3, 4, 4, dtype=torch.bfloat16, device="meta")
    reason = PATCH_EMBED.unsupported(x, weight, *[None] * 5)
    assert reason is not None
    assert "31 bits" in reason
    assert PATCH_EMBED.unsupported(x[:100], weight, *[None] * 5) is None


def test_flops_are_counted(device):
    from torch.utils.flop_counter import FlopCounterMode

    given = inputs((2, 3, 16, 16), 24, 8, torch.float32, device)
    with triton_forced(), FlopCounterMode(display=False) as counter:
        patch_embed(**given)
    assert counter.get_total_flops() == 2 * (2 * 4) * (3 * 8 * 8) * 24
