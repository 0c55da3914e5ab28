"""Inside DDP and FSDP2: two processes find the gradients of one."""

from __future__ import annotations

from pathlib import Path

import wrapped_jobs

import fastvr
from fastvr.testing import assert_parity, truth_model


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """Two processes for all kinds: to start them takes longer than their steps."""
    found = wrapped_jobs.run(tmp_path)
    assert found.keys() == {(kind, how) for kind in wrapped_jobs.KINDS for how in wrapped_jobs.WRAPPERS}
    for kind in wrapped_jobs.KINDS:
        model, x = wrapped_jobs.make(kind), wrapped_jobs.images()
        with fastvr.use_backend("reference"):
            truth = truth_model(model)
            expected = wrapped_jobs.gradients(model, x)
            exact = wrapped_jobs.gradients(truth, x.double())
        for wrapper in wrapped_jobs.WRAPPERS:
            actual, ran = found[kind, wrapper]
            assert ran >= ({"layer_norm", "linear"} if kind in ("vit", "timm") else {"conv_bn_relu"})
            assert actual.keys() == expected.keys()
            name = f"{kind} in {wrapper}"
            assert_parity(actual, expected, exact, kind="gradient", sample_dim=None, name=name)
