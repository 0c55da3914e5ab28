"""The shapes of bench/cases.py: all ops have some, and every one is a call that the op takes."""

from __future__ import annotations

import importlib
import random

import cases
import inputs
import pytest
import torch
from random_cases import random_case

import fastvr
from fastvr import backend
from fastvr.ops._op import OPS


def _unsupported(case: cases.Case, dtype: torch.dtype) -> list[str]:
    arguments = inputs.make(case, dtype, "meta")
    schema = inputs.SchemaCalls()
    with backend.use_backend("triton"), backend.assume_architecture("sm_90"), schema:
        inputs.public(case.op)(**arguments)
    assert schema.calls, f"{case} called no operator"
    return [reason for name, args in schema.calls if (reason := OPS[name].unsupported(*args))]


def test_every_op_is_benchmarked() -> None:
    for op in cases.OPS:
        inputs.public(op)
    assert set(cases.OPS) == set(OPS)
    assert set(cases.REAL) == set(cases.SMALL)


@pytest.mark.parametrize("op", cases.OPS)
def test_every_op_has_a_benchmark_file(op: str) -> None:
    module = importlib.import_module(f"bench_{inputs.module(op)}")
    assert callable(getattr(module, f"test_{op}"))


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("op", cases.OPS)
def test_listed_cases_run_on_the_kernel_and_cost_something(op: str, real: bool) -> None:
    listed = cases.cases(op, real=real)
    assert len({str(case) for case in listed}) == len(listed)
    for case in listed:
        assert _unsupported(case, torch.bfloat16) == []
        flops, moved = inputs.cost(op, inputs.make(case, torch.bfloat16, "meta"))
        assert moved > 0
        without = ("layer_norm", "batch_norm_act", "batch_norm_act_max_pool", "max_pool", "swiglu", "dropout")
        assert flops > 0 or op.removesuffix("_backward").removesuffix("_training") in without


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("op", cases.OPS)
def test_random_cases_run_on_the_kernel(op: str, small: bool) -> None:
    rng = random.Random(1)
    drawn = [random_case(op, rng, small=small) for _ in range(60)]
    for case in drawn:
        assert _unsupported(case, torch.float16) == [], case
    assert len({case.sizes for case in drawn}) > 10


def test_random_cases_are_the_same_for_the_same_seed() -> None:
    first, again = (random_case("linear", random.Random(7), small=True) for _ in range(2))
    assert first == again


def test_the_convolutions_are_those_of_resnet50() -> None:
    with torch.device("meta"):
        model = fastvr.ResNet50().eval()
    found: set[tuple[int, ...]] = set()

    def note(module: torch.nn.Conv2d, args: tuple[torch.Tensor, ...]) -> None:
        found.add((*module.weight.shape[:3], module.stride[0], module.padding[0], args[0].shape[-1]))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(note)
    with backend.use_backend("reference"), torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    names = ("out", "channels", "kernel", "stride", "padding", "width")
    assert found == {tuple(case[name] for name in names) for case in cases.REAL["conv_bn_relu"]}


def test_batch_is_all_that_at_batch_changes() -> None:
    case = cases.REAL["attention"][0]
    other = case.at_batch(3)
    assert other["batch"] == 3
    assert other.at_batch(case["batch"]) == case


def test_seeded_inputs_are_the_same_and_others_differ() -> None:
    case = cases.SMALL["linear"][0]
    x, again, other = (inputs.make(case, torch.float32, "cpu", seed=seed)["x"] for seed in (0, 0, 1))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)


def test_cost_of_a_linear_by_hand() -> None:
    case = cases.Case.of("linear", "by hand", batch=2, tokens=3, k=5, n=7, bias=False)
    flops, moved = inputs.cost("linear", inputs.make(case, torch.float16, "meta"))
    assert flops == 2 * (2 * 3) * 5 * 7
    assert moved == 2 * (6 * 5 + 7 * 5 + 6 * 7)
