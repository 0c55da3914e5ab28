"""What every op must hold beyond its numbers, and the grid that cases are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvr.backend import use_backend
from fastvr.ops.cpu import mkldnn
from fastvr.testing import assert_parity

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRID = SimpleNamespace(
    architectures=["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"],
)

needs_onednn = pytest.mark.skipif(mkldnn.missing() is not None, reason=str(mkldnn.missing()))


def triton_forced() -> use_backend:
    """A fallback must not pass for a kernel."""
    return use_backend("triton")


def randn(*size: int, dtype: torch.dtype = torch.float32, **options: object) -> torch.Tensor:
    """Normal values; the same for every dtype up to rounding. ``requires_grad`` after the rounding."""
    requires_grad = options.pop("requires_grad", False)
    x = torch.randn(*size, device="cpu").to(dtype).to(**options)  # type: ignore[call-overload]
    return x.requires_grad_() if requires_grad else x


def assert_nan_stays_in_its_sample(fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    """Poison one sample; the others come out bitwise as before."""
    with triton_forced():
        clean = fn(x)
        for poison in (float("nan"), float("inf")):
            poisoned = x.clone()
            poisoned[1] = poison
            y = fn(poisoned)
            others = [i for i in range(len(x)) if i != 1]
            assert torch.equal(y[others], clean[others])
            assert not torch.isfinite(y[1]).all()


def assert_batch_invariant(fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    """``fn(x)[i]`` is ``fn(x[i:i+1])``, bitwise; the caller forces one configuration."""
    with triton_forced():
        whole = fn(x)
        # the interpreter's dot is NumPy's, whose rounding depends on where in a tile a row lies; the first
        # sample lies in the same place
        for i in (0, len(x) - 1) if x.is_cuda else (0,):
            assert torch.equal(whole[i : i + 1], fn(x[i : i + 1]))


def assert_order_does_not_matter(fn: Callable[[], torch.Tensor]) -> None:
    """The same bits whatever order programs run in; the caller forces a configuration that makes several."""
    if torch.cuda.is_available():
        pytest.skip("a GPU runs programs in its own order")
    from fastvr.testing import interpreter

    with triton_forced():
        expected = fn()
        for seed in range(2):
            with interpreter.shuffle(seed):
                assert torch.equal(fn(), expected)


def assert_autocast(
    op: Callable[..., torch.Tensor], eager: Callable[..., torch.Tensor], **given: Any
) -> None:
    """Under autocast to bfloat16 the kernel gives eager's dtype, within the parity rule of eager's result."""
    device = next(value.device for value in given.values() if isinstance(value, torch.Tensor))
    exact = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        expected = eager(**given)
        with triton_forced():
            actual = op(**given)
    assert_parity(actual, expected, eager(**exact), name="under autocast")


def assert_compiles(fn: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    """One graph for ``torch.compile``, with the values and gradients of the plain call; an op in the exported
    program. ``tensors`` require gradients."""
    with triton_forced():
        expected = fn(*tensors)
        upstream = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, tensors, upstream)
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        result = compiled(*tensors)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        for ours, plain in zip(torch.autograd.grad(result, tensors, upstream), gradients, strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=0)

        class Module(torch.nn.Module):
            def forward(self, *args: torch.Tensor) -> torch.Tensor:
                return fn(*args)

        program = torch.export.export(Module(), tuple(t.detach() for t in tensors))
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert any(target.startswith("fastvr.") for target in targets), targets
