"""Inside DDP and FSDP2: two processes find the gradients of one."""

from __future__ import annotations

import pytest
import wrapped_jobs

import fastvr
from fastvr.testing import assert_parity, truth_model


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], wrapped_jobs.Found]:
    return wrapped_jobs.run(tmp_path_factory.mktemp("wrapped"))


@pytest.mark.parametrize("wrapper", wrapped_jobs.WRAPPERS)
@pytest.mark.parametrize("kind", wrapped_jobs.KINDS)
def test_two_processes_have_the_gradients_of_one(kind, wrapper, found) -> None:
    model, x = wrapped_jobs.make(kind), wrapped_jobs.images()
    with fastvr.use_backend("reference"):
        truth = truth_model(model)
        expected = wrapped_jobs.gradients(model, x)
        exact = wrapped_jobs.gradients(truth, x.double())
    actual, ran = found[kind, wrapper]
    assert ran >= ({"layer_norm", "linear"} if kind in ("vit", "timm") else {"conv_bn_relu"})
    assert actual.keys() == expected.keys()
    assert_parity(actual, expected, exact, kind="gradient", sample_dim=None)
