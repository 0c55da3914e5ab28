"""What prepare measures for itself, and that a LayerNorm is folded where the measurements say so."""

from __future__ import annotations

import functools
import json

import pytest
import torch

import fastvr
from fastvr import backend, tuner, tuning
from fastvr.ops.cpu import mkldnn
from fastvr.prepare import measured
from fastvr.prepare.folded import FoldedViT, folded_if_faster

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="stand-in timers, on a CPU"),
    pytest.mark.skipif(backend.triton_missing() is not None, reason="needs Triton"),
]


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The real thing as on a GPU, by the interpreter's clock; gives the reports of its runs and the table."""
    reports = []

    def run(*args, **kwargs):
        reports.append(unchanged(*args, **kwargs, path=tmp_path / "table.json"))
        return reports[-1]

    unchanged = functools.partial(tuner.quick, budget_seconds=300)
    monkeypatch.setattr(tuner, "quick", run)
    # the interpreter takes its time over each
    monkeypatch.setattr(tuner, "_QUICK_CANDIDATES", 1)
    monkeypatch.setattr(measured, "_has_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return reports, tmp_path / "table.json"


def test_measures_what_is_unknown_and_only_once(quick, tiny_vit, images, monkeypatch) -> None:
    reports, table = quick
    # the CPU's own calls, where it has them, round elsewhere
    monkeypatch.setattr(mkldnn, "supports", lambda dtype: False)
    model, x = tiny_vit(depth=1).bfloat16(), images(2).bfloat16()
    prepared = fastvr.prepare(model, x)
    assert reports[0].planned > 0
    assert len(reports[0].won) == reports[0].planned
    ops = {key.split("|")[0] for key in json.loads(table.read_text())["entries"]}
    # as it is and folded
    assert {"linear", "layernorm_mlp", "attention_kv", "norm_linear", "linear_stats"} <= ops
    assert torch.equal(prepared(x), model(x))
    fastvr.prepare(model, x)
    assert reports[1].known == reports[1].planned
    fastvr.prepare(model, x, tune=False)
    with fastvr.use_backend("reference"):
        fastvr.prepare(model, x)
    assert len(reports) == 2


def test_every_batch_size_is_measured(monkeypatch, tiny_resnet, images) -> None:
    seen = []

    def quick(run, examples, *, progress):
        seen.extend(tuple(example.shape) for example in examples)
        assert all(e.is_contiguous(memory_format=torch.channels_last) for e in examples)
        for example in examples:
            run(example.to("meta"))
        return tuner.Report("none", None, "none")

    monkeypatch.setattr(tuner, "quick", quick)
    monkeypatch.setattr(measured, "_has_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = images(2).contiguous(memory_format=torch.channels_last)
    fastvr.prepare(tiny_resnet(), x, batch_sizes=(1, 4))
    assert seen == [(1, *x.shape[1:]), (4, *x.shape[1:])]


@pytest.mark.parametrize(
    ("stopped", "error"), [("interrupted", KeyboardInterrupt), ("the GPU failed: x", RuntimeError)]
)
def test_a_run_that_was_broken_off(stopped, error, monkeypatch, tiny_vit, images) -> None:
    def quick(*args, **kwargs):
        return tuner.Report("none", None, "none", stopped=stopped)

    monkeypatch.setattr(tuner, "quick", quick)
    monkeypatch.setattr(measured, "_has_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(error):
        fastvr.prepare(tiny_vit(), images())


@pytest.mark.parametrize("tune", [True, "slow", None])
def test_tune_is_quick_or_nothing(tune, tiny_vit, images) -> None:
    with pytest.raises(ValueError, match="tune must be"):
        fastvr.prepare(tiny_vit(), images(), tune=tune)


@pytest.mark.parametrize(
    ("slow", "folds"),
    [
        ((), True),
        (("norm_linear",), False),
        (("linear_stats",), False),
        (("layernorm_mlp",), True),
    ],
)
def test_folds_where_the_sum_of_the_launches_is_smaller(slow, folds, monkeypatch, tiny_vit, images) -> None:
    def lookup(key: str, device: torch.device) -> tuning.Entry:
        ms = 9.0 if key.split("|")[0] in slow else 1.0
        return tuning.Entry("triton", None, ms, None, None)

    monkeypatch.setattr(tuning, "lookup", lookup)
    model, x = tiny_vit(depth=3).bfloat16(), images(2).bfloat16()
    assert isinstance(folded_if_faster(model, x), FoldedViT) == folds


def test_does_not_fold_by_half_a_measurement(monkeypatch, tiny_vit, images) -> None:
    def lookup(key: str, device: torch.device) -> tuning.Entry | None:
        return None if key.startswith("attention") else tuning.Entry("triton", None, 1.0, None, None)

    monkeypatch.setattr(tuning, "lookup", lookup)
    model, x = tiny_vit().bfloat16(), images(2).bfloat16()
    assert folded_if_faster(model, x) is model
