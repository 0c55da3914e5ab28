"""Max pooling by integers, as prepared ResNets on a CPU have it where nothing can be NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import needs_onednn

import fastvr
from fastvr import backend
from fastvr.ops.cpu import positive_pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 8, 112, 112), (1, 3, 7, 10), (3, 16, 1, 1), (2, 5, 1, 6), (2, 5, 9, 2), (0, 4, 8, 8)],
    ids=str,
)
def test_it_is_pytorchs(shape, dtype) -> None:
    x = torch.randn(shape).relu().to(dtype).to(memory_format=torch.channels_last)
    if x.numel():
        x[0, 0, 0, 0] = torch.finfo(dtype).max
        x[-1, -1, -1, -1] = torch.finfo(dtype).tiny / 4
        x[-1, 0] *= -1  # zeros of both signs, and what relu never gives: cleared
        x.relu_()
    before = x.clone()
    y = positive_pool.max_pool(x)
    expected = F.max_pool2d(x, 3, 2, 1)
    assert y.shape == expected.shape
    assert torch.equal(y, expected)
    assert torch.equal(x, before)
    assert y.is_contiguous(memory_format=torch.channels_last)


@needs_onednn
@pytest.mark.parametrize("change", ["", "window", "activation", "nan", "infinity"])
def test_only_the_stem_of_a_prepared_model_whose_numbers_are_finite(
    change, tiny_resnet, images, monkeypatch
) -> None:
    monkeypatch.setattr(backend, "kernels_possible", lambda device: False)
    calls = []
    pool = positive_pool.max_pool
    monkeypatch.setattr(positive_pool, "max_pool", lambda x: calls.append(x.shape) or pool(x))
    model, x = tiny_resnet(), images()
    if change == "window":
        model.maxpool = torch.nn.MaxPool2d(2).eval()
    if change == "activation":
        model.relu = torch.nn.LeakyReLU(0.3).eval()
    prepared = fastvr.prepare(model, images())
    calls.clear()
    if change in ("nan", "infinity"):
        x[0, 1, 9, 9] = float(change)
    actual = prepared(x)
    assert bool(calls) == (not change)
    with torch.no_grad(), fastvr.use_backend("reference"):
        torch.testing.assert_close(actual, model(x), equal_nan=True)
