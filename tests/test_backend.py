"""Which implementation runs, what is said where it is not the one asked for, and what a failure leads to."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from contract import randn

from fastvr import backend
from fastvr.ops.layer_norm import LAYER_NORM, layer_norm
from fastvr.ops.linear import LINEAR, linear

pytest.importorskip("triton")


@pytest.fixture
def on_sm_90():
    """Choices as on that GPU; on meta tensors, since nothing can be launched."""
    with backend.assume_architecture("sm_90"), backend.use_backend("auto"):
        yield


def test_a_block_ends_and_a_call_stays():
    before = backend.current_backend()
    with backend.use_backend("triton"):
        with backend.use_backend("reference"):
            assert backend.current_backend() == "reference"
        assert backend.current_backend() == "triton"
        backend.use_backend("reference")
        assert backend.current_backend() == "reference"
    assert backend.current_backend() == before


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, reference; got 'cuda'"):
        backend.use_backend("cuda")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"FASTVR_BACKEND": "reference"}, "reference False"),
        ({"FASTVR_STRICT": "1"}, "auto True"),
        ({"FASTVR_BACKEND": "", "FASTVR_STRICT": ""}, "auto False"),
        ({"FASTVR_BACKEND": "fast"}, "FASTVR_BACKEND must be one of auto, triton, reference; got 'fast'"),
        ({"FASTVR_STRICT": "maybe"}, "FASTVR_STRICT must be 0 or 1; got 'maybe'"),
    ],
)
def test_environment(variables, said):
    code = "from fastvr import backend; print(backend.current_backend(), backend._state.strict)"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTVR_")}
    done = subprocess.run([sys.executable, "-c", code], env=kept | variables, capture_output=True, text=True)
    assert said in done.stdout + done.stderr


def test_without_a_measurement_the_vendors_product_and_our_layer_norm_run(on_sm_90):
    x, weight = torch.empty(4, 64, device="meta"), torch.empty(64, 64, device="meta")
    assert not backend.kernel_runs(
        "linear",
        (x, weight, None, None, None, "none"),
        x.device,
        unsupported=LINEAR.unsupported,
        measured=LINEAR.measured,
    )
    assert backend.kernel_runs(
        "layer_norm",
        (x, weight[0], None, 1e-6, None),
        x.device,
        unsupported=LAYER_NORM.unsupported,
        measured=LAYER_NORM.measured,
    )


def test_where_pytorch_is_chosen_autograd_is_pytorchs_own(on_sm_90):
    """Through the operator the backward pass would compute the forward pass again."""
    x = torch.empty(4, 64, device="meta", requires_grad=True)
    weight = torch.empty(64, 64, device="meta")
    with backend.observe() as ran:
        assert "Backward" in type(linear(x, weight).grad_fn).__name__
        assert "fastvr" not in type(linear(x, weight).grad_fn).__name__
    assert dict(ran) == {("linear", "reference"): 2}
    assert "fastvr" in type(layer_norm(x, weight[0]).grad_fn).__name__


def test_strict_refuses_what_the_kernel_cannot_take(on_sm_90):
    x, weight = torch.empty(4, 8, dtype=torch.float64, device="meta"), torch.empty(8, device="meta").double()
    assert layer_norm(x, weight).shape == (4, 8)
    with (
        backend.use_backend("auto", strict=True),
        pytest.raises(backend.BackendError, match=r"fastvr\.layer_norm: no Triton kernel runs here: dtype"),
    ):
        layer_norm(x, weight)


def test_the_reason_is_logged_once(on_sm_90, caplog):
    backend._log_once.cache_clear()
    x, weight = torch.empty(4, 8, dtype=torch.float64, device="meta"), torch.empty(8, device="meta").double()
    with caplog.at_level(logging.INFO, logger="fastvr"):
        layer_norm(x, weight)
        layer_norm(x, weight)
    assert [record.getMessage() for record in caplog.records] == [
        "fastvr.layer_norm runs in PyTorch: dtype torch.float64; kernels take float32, float16 and bfloat16"
    ]


def _failing(*args: object) -> torch.Tensor:
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(300_000, 232_448, "shared memory")


def _run(kernel):
    x = torch.empty(4, 8, device="meta")
    if not backend.kernel_runs(
        "an_op", (x,), x.device, unsupported=lambda x: None, measured=lambda x: "triton"
    ):
        return backend.run_reference("an_op", lambda x: x, (x,))
    return backend.run_kernel("an_op", (x,), x.device, kernel=kernel, reference=lambda x: x)


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("Failed to find C compiler"),
        RuntimeError("PassManager::run failed"),
        OSError("No space left on device"),
        subprocess.CalledProcessError(1, "gcc"),
    ],
)
def test_whatever_keeps_a_kernel_from_being_built_leaves_pytorch(fault, on_sm_90, monkeypatch):
    monkeypatch.setattr(backend, "_failed", set())

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise fault

    with pytest.warns(RuntimeWarning, match=r"fastvr\.an_op: the Triton kernel failed on sm_90"):
        assert _run(broken).shape == (4, 8)


def test_a_kernel_that_fails_is_replaced_once_with_a_warning(on_sm_90, monkeypatch):
    monkeypatch.setattr(backend, "_failed", set())
    with pytest.warns(RuntimeWarning, match=r"fastvr\.an_op: the Triton kernel failed on sm_90 .*OutOfRes"):
        _run(_failing)
    with backend.observe() as ran:
        _run(_failing)  # not tried again
    assert dict(ran) == {("an_op", "reference"): 1}


def test_strict_raises_what_the_kernel_raised(on_sm_90, monkeypatch):
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(backend, "_failed", set())
    with backend.use_backend("auto", strict=True), pytest.raises(OutOfResources):
        _run(_failing)


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_the_gpu_raises_is_never_swallowed(fault, on_sm_90, monkeypatch):
    monkeypatch.setattr(backend, "_failed", set())

    def full(x: torch.Tensor) -> torch.Tensor:
        raise fault("no room")

    with pytest.raises(fault):
        _run(full)
    assert not backend._failed


def test_on_a_cpu_auto_is_pytorch_even_where_triton_interprets():
    with backend.use_backend("auto"), backend.observe() as ran:
        linear(randn(2, 8), randn(4, 8))
    assert dict(ran) == {("linear", "reference"): 1}


def test_fake_tensors_take_the_operator_without_looking_for_a_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), backend.use_backend("auto"):
        y = linear(torch.empty(3, 8, device="cuda:0"), torch.empty(5, 8, device="cuda:0"))
    assert y.shape == (3, 5)
    assert y.device == torch.device("cuda:0")


def test_the_kernel_is_called_directly_where_nobody_watches(monkeypatch):
    def refused(*args: object) -> torch.Tensor:
        raise AssertionError("the operator was called")

    x, weight = randn(2, 8), torch.nn.Parameter(randn(4, 8))
    monkeypatch.setattr(LINEAR, "overload", refused)
    with backend.use_backend("triton"), backend.observe() as ran:
        linear(x, weight.detach())
        with torch.no_grad():
            linear(x, weight)
        with torch.inference_mode():
            linear(x, weight)
    assert dict(ran) == {("linear", "triton"): 3}


class _Subclass(torch.Tensor):
    pass


def _dispatch_mode():
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


@pytest.mark.parametrize(
    "watched",
    [
        lambda x, w: linear(x, w.requires_grad_()),
        lambda x, w: linear(x.as_subclass(_Subclass), w),
        lambda x, w: torch.jit.trace(linear, (x, w)),
        lambda x, w: _inside(_dispatch_mode(), x, w),
        lambda x, w: _inside(torch.device("cpu"), x, w),
        lambda x, w: _inside(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), x, w),
        lambda x, w: torch.func.functionalize(linear)(x, w),
    ],
    ids=["gradient", "subclass", "trace", "dispatch mode", "function mode", "profiler", "transform"],
)
def test_the_operator_is_called_where_somebody_watches(watched, monkeypatch):
    called = []
    operator = LINEAR.overload

    def noted(*args: object) -> torch.Tensor:
        called.append(True)
        return operator(*args)

    monkeypatch.setattr(LINEAR, "overload", noted)
    with backend.use_backend("triton"):
        watched(randn(2, 8), randn(4, 8))
    assert called


def _inside(context, x, weight):
    with context:
        return linear(x, weight)
