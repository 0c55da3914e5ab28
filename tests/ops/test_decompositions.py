"""What an operator means, as exporters take it: functional, and of PyTorch's own operators."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastvr
from fastvr import doctor
from fastvr.ops._op import OPS


@pytest.mark.parametrize("name", sorted(OPS))
def test_decompositions_are_functional(name) -> None:
    with FakeTensorMode(), torch.no_grad():
        args = doctor._arguments(torch.device("cpu"), torch.float32)[name]
        decomposition = fastvr.decompositions()[OPS[name].overload]
        program = make_fx(lambda *given: decomposition(*given))(*args)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    operators = [call for call in calls if isinstance(call, torch._ops.OpOverload)]
    assert operators
    assert not [call for call in operators if call._schema.is_mutable or call.namespace == "fastvr"]
