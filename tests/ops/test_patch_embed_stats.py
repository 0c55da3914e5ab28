from __future__ import annotations

import pytest
import torch
from contract import DTYPES, GRID, assert_order_does_not_matter, randn, triton_forced

from fastvr import backend, tuning
from fastvr.ops.patch_embed import patch_embed
from fastvr.ops.patch_embed_stats import PATCH_EMBED_STATS, patch_embed_stats
from fastvr.reference.linear_stats import row_stats
from fastvr.reference.patch_embed import patch_embed_stats as reference
from fastvr.testing import check_op

pytest.importorskip("triton")
from fastvr.kernels import patch_embed as kernels


def inputs(batch, d, dtype, device, *, size=(16, 24), patch=8, prefix=1):
    tokens = prefix + (size[0] // patch) * (size[1] // patch)
    return {
        "x": randn(batch, 3, *size, dtype=dtype, device=device),
        "weight": randn(d, 3, patch, patch, dtype=dtype, device=device) * (3 * patch * patch) ** -0.5,
        "bias": randn(d, dtype=dtype, device=device),
        "pos_embed": randn(tokens, d, dtype=dtype, device=device),
        "prefix_tokens": randn(prefix, d, dtype=dtype, device=device) if prefix else None,
    }


def check(given):
    with triton_forced():
        # the statistics lie by rows, the result by samples
        return check_op(
            patch_embed_stats, reference, given, backward=False, sample_dim=None, name="patch_embed_stats"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "prefix"), [(1, 1), (64, 0), (65, 5), (384, 1)])
def test_widths(d, prefix, dtype, device):
    check(inputs(2, d, dtype, device, prefix=prefix))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration(dtype, device):
    given = inputs(3, 330, dtype, device, size=(48, 56))
    every = [
        c for arch in ("interpreter", *GRID.architectures) for c in kernels.candidate_configs(dtype, arch)
    ]
    for config in [config for i, config in enumerate(every) if config not in every[:i]]:
        with tuning.force_config("patch_embed_stats", config):
            check(given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_value_as_stored(dtype, device):
    """With a mean of many deviations, those of the float32 accumulator would be far off."""
    given = inputs(2, 200, dtype, device)
    given["pos_embed"] = given["pos_embed"] + 100
    with triton_forced():
        y, stats = patch_embed_stats(**given)
    torch.testing.assert_close(stats, row_stats(y), rtol=1e-4, atol=1e-4)
    check(given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_uint8_images(dtype, device):
    given = inputs(2, 130, dtype, device, patch=4)
    given["x"] = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8).to(device)
    check(given | {"mean": torch.rand(3, device=device), "std": torch.rand(3, device=device) + 0.2})


def test_the_result_is_patch_embeds(device):
    given = inputs(2, 100, torch.float16, device)
    config = kernels.candidate_configs(torch.float16, "sm_90")[-1]
    with (
        triton_forced(),
        tuning.force_config("patch_embed", config),
        tuning.force_config("patch_embed_stats", config),
    ):
        assert torch.equal(patch_embed_stats(**given)[0], patch_embed(**given))


def test_float32_positions_beside_a_16_bit_image(device):
    given = inputs(2, 70, torch.bfloat16, device)
    given["pos_embed"] = given["pos_embed"].float()
    check(given)


def test_empty(device):
    with triton_forced():
        y, stats = patch_embed_stats(**inputs(0, 70, torch.float32, device))
    assert y.shape == (0, 7, 70)
    assert stats.shape == (0, 2, 2)


def test_nan_stays_in_its_sample(device):
    given = inputs(3, 130, torch.float32, device)
    with triton_forced():
        clean = patch_embed_stats(**given)
        given["x"][1, 0, 3, 3] = float("nan")
        poisoned = patch_embed_stats(**given)
    for before, after in zip(clean, poisoned, strict=True):
        before, after = before.view(3, 7, -1), after.view(3, 7, -1)
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        assert after[1, 1].isnan().all()


@pytest.mark.parametrize("part", [0, 1])
def test_order_and_batch_do_not_matter(part, device):
    given = inputs(15, 150, torch.float32, device)
    config = kernels.candidate_configs(torch.float32, "sm_90")[-1]
    with tuning.force_config("patch_embed_stats", config), triton_forced():
        assert_order_does_not_matter(lambda: patch_embed_stats(**given)[part])
        whole, first = (patch_embed_stats(**given | {"x": given["x"][:n]})[part] for n in (15, 1))
        assert torch.equal(whole.view(15, 7, -1)[0], first.view(7, -1))


def test_compiles_and_refuses_gradients(device):
    given = inputs(2, 70, torch.float32, device)
    arguments = (*given.values(), None, None)
    with triton_forced():
        torch.library.opcheck(
            PATCH_EMBED_STATS.overload, arguments, test_utils=("test_schema", "test_faketensor")
        )
        expected = patch_embed_stats(**given)
        compiled = torch.compile(patch_embed_stats, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, compiled(**given), expected))
        given["weight"].requires_grad_()
        with pytest.raises(NotImplementedError, match="patch_embed_stats has no gradient"):
            patch_embed_stats(**given)


def test_bad_input_names_the_op_and_the_argument(device):
    given = inputs(2, 70, torch.float32, device)
    with pytest.raises(ValueError, match=r"patch_embed_stats: bias must have shape \[70\]; got \[3\]"):
        patch_embed_stats(**given | {"bias": torch.zeros(3, device=device)})


def test_float64_runs_in_pytorch(device):
    given = inputs(2, 70, torch.float64, device)
    with triton_forced(), pytest.raises(backend.BackendError, match=r"patch_embed_stats: .*float64"):
        patch_embed_stats(**given)
    y, stats = patch_embed_stats(**given)
    assert torch.equal(stats, row_stats(y))


def test_cost_counts_the_statistics(device):
    given = inputs(2, 70, torch.bfloat16, device)
    y, stats = reference(**given)
    cost = PATCH_EMBED_STATS.cost(*given.values(), None, None)
    assert cost.flops == 2 * 12 * 192 * 70
    tensors = (*given.values(), y, stats)
    assert cost.bytes == sum(t.numel() * t.element_size() for t in tensors)
